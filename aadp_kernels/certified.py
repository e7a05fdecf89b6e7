"""Arithmetic that all back ends share: certified clip factors, votes, noise on top of values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from aadp_kernels.contract import Bounds, ClipStats, Precision
from aadp_kernels.layout import Layout

_LARGEST = {d: torch.finfo(d).max ** 0.5 / 4096 for d in (torch.float32, torch.float64)}


def noisy_layers(layout: Layout, scale: Tensor) -> Sequence[int]:
    """Layers where somebody's scale is positive; all on an accelerator, where none is read."""
    if not scale.is_cpu:
        return layout.filled
    each = (scale if scale.dim() == 1 else scale.any(0)).tolist()
    return layout.filled if all(each) else [i for i in layout.filled if each[i]]


def clip_factors(
    norm: Tensor, clip: Tensor, finite: Tensor, count: int | Tensor, dtype: torch.dtype | Precision
) -> tuple[Tensor, Tensor]:
    """Factors f with ‖f x‖ <= clip, certified, and which units were clipped.

    `count` elements in float64 give the norm a relative error below count * 2^-52. One unit of the
    output dtype's precision covers its rounding, its smallest number covers underflow. Below the
    clip norm f is exactly one; a unit that is not finite has zero. For [K, L] of several layers
    `count` is float64 [L] and a `Precision` stands for their dtypes.
    """
    info = torch.finfo(dtype) if isinstance(dtype, torch.dtype) else dtype
    bound = norm * (1 + (count + 16) * 2.0**-52)
    clipped = (bound > clip) & finite
    room = (clip - count * info.smallest_normal * info.eps).clamp(min=0)
    factor = torch.where(clipped, room / torch.where(clipped, bound * (1 + info.eps), 1.0), 1.0)
    # A subnormal factor has lost the digits that the bound counts on.
    normal = factor >= torch.finfo(torch.float64).tiny
    return torch.where(finite & (clip >= 0) & normal, factor, 0.0), clipped


def ballots(norm1: Tensor, votes_at: Tensor | None, counts: Tensor) -> Tensor:
    """1[norm1 <= votes_at] - 1/2 for units that count, zero for the others."""
    if votes_at is None:
        return torch.zeros_like(norm1)
    vote = torch.where(norm1 <= votes_at, 0.5, -0.5).to(torch.float64)
    return torch.where(counts & ~torch.isnan(votes_at), vote, 0.0)


def largest(dtype: torch.dtype) -> float:
    """Bound on the norms, and their product, of a record that counts as finite.

    Far below the square root of the dtype's maximum no norm can overflow.
    """
    return _LARGEST[dtype]


def coarsest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype of the least precision."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def by_rows(privatize: Callable[..., ClipStats]) -> Callable[..., ClipStats]:
    """For an implementation that knows rows only: an update alone is one row.

    Then bounds, scale and statistics are [L] outside, [1, L] within.
    """

    @wraps(privatize)
    def either(*args: Any, bounds: Bounds, scale: Tensor, **kwargs: Any) -> ClipStats:
        if bounds.clip.dim() == 2:
            return privatize(*args, bounds=bounds, scale=scale, **kwargs)
        votes_at = None if bounds.votes_at is None else bounds.votes_at[None]
        row = Bounds(bounds.clip[None], bounds.p, votes_at)
        stats = privatize(*args, bounds=row, scale=scale[None], **kwargs)
        l1_norm = None if stats.l1_norm is None else stats.l1_norm[0]
        return ClipStats(l1_norm, stats.votes[0], stats.clipped[0], stats.nonfinite[0])

    return either
