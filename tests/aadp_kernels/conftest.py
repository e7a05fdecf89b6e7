"""Without a CUDA device the Triton kernels run in Triton's interpreter."""

import os

import torch

# Triton reads the variable once, when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
