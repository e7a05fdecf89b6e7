"""Plain torch as a back end: the specification that the others are measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aadp_kernels._torch.clip_sum import clip_sum, clip_sum_noise
from aadp_kernels._torch.grid import integer_noise
from aadp_kernels._torch.noise import coins, standard_noise
from aadp_kernels._torch.privatize import draw, layer_norms, privatize
from aadp_kernels.contract import Noise, Segment
from aadp_kernels.grid import OFFSETS, quantum
from aadp_kernels.layout import Layout

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
    noise: Noise, segment: Segment, scale: float | Tensor, dtype: torch.dtype
) -> Tensor:
    """`Backend.scaled_noise`."""
    if noise.form != "grid":
        (values,) = standard_noise(noise, [segment])
        return (values * scale).to(dtype)
    (counts,) = integer_noise(noise, [segment])
    if dtype == torch.int64:
        return counts
    scale = torch.as_tensor(scale, dtype=torch.float64, device=counts.device)
    size = quantum(scale, noise.mechanism)
    return ((counts.to(torch.float64) + OFFSETS[noise.mechanism]) * size).to(dtype)


def layer_integers(noise: Noise, layout: Layout, scale: Tensor) -> Sequence[Tensor | None]:
    """`Backend.layer_integers`."""
    return draw(noise, layout, scale)
