"""Triton as a back end."""

from __future__ import annotations

import torch
from torch import Tensor

from aadp_kernels._triton import grid, noise
from aadp_kernels._triton.clip_sum import clip_sum, clip_sum_noise
from aadp_kernels._triton.grid import layer_integers
from aadp_kernels._triton.privatize import privatize
from aadp_kernels.contract import Noise, Segment

__all__ = ["clip_sum", "clip_sum_noise", "layer_integers", "privatize", "scaled_noise"]


def scaled_noise(
    source: Noise, segment: Segment, scale: float | Tensor, dtype: torch.dtype
) -> Tensor:
    """`Backend.scaled_noise`."""
    form = grid if source.form == "grid" else noise
    return form.scaled_noise(source, segment, scale, dtype)
