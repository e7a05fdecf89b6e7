"""Tests that run in several processes share the cores."""

import os

import torch

_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _PROCESSES > 1:
    # Two at least: some tests are of work that several threads share.
    torch.set_num_threads(max(2, torch.get_num_threads() // _PROCESSES))
