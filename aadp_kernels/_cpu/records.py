"""`RecordKernels` in numba: the compiled parts of clip-in-backward."""

from __future__ import annotations

from aadp_kernels._cpu.backward_embedding import embedding_norms, embedding_single, embedding_sums
from aadp_kernels._cpu.backward_linear import (
    factors_and_counts,
    row_sums,
    scale_linear,
    scale_single,
)
from aadp_kernels._cpu.backward_norms import norm_layer_single, norm_layer_sums
from aadp_kernels._cpu.gram import gram_squares
from aadp_kernels._cpu.product_sums import product_single, product_sums

__all__ = [
    "embedding_norms",
    "embedding_single",
    "embedding_sums",
    "factors_and_counts",
    "gram_squares",
    "norm_layer_single",
    "norm_layer_sums",
    "product_single",
    "product_sums",
    "row_sums",
    "scale_linear",
    "scale_single",
]
