"""Numba as a back end, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from aadp_kernels._cpu import grid_release, noise
from aadp_kernels._cpu.clip_sum import clip_sum, clip_sum_noise
from aadp_kernels._cpu.grid_release import layer_integers
from aadp_kernels._cpu.noise import coins
from aadp_kernels._cpu.privatize import layer_norms, privatize
from aadp_kernels.contract import Noise, Segment

__all__ = [
    "clip_sum",
    "clip_sum_noise",
    "coins",
    "layer_integers",
    "layer_norms",
    "privatize",
    "scaled_noise",
]


def scaled_noise(
    source: Noise, segment: Segment, scale: float | Tensor, dtype: torch.dtype
) -> Tensor:
    """`Backend.scaled_noise`."""
    form = grid_release if source.form == "grid" else noise
    return form.scaled_noise(source, segment, scale, dtype)
