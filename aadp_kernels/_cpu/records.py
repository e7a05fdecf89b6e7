"""`RecordKernels` in numba: the compiled parts of clip-in-backward."""

from __future__ import annotations

from aadp_kernels._cpu.backward_linear import (
    factors_and_counts,
    row_sums,
    scale_linear,
    scale_single,
)
from aadp_kernels._cpu.backward_norms import norm_layer_sums
from aadp_kernels._cpu.backward_products import product_sums

__all__ = [
    "factors_and_counts",
    "norm_layer_sums",
    "product_sums",
    "row_sums",
    "scale_linear",
    "scale_single",
]
