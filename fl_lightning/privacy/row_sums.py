"""Sums of a cohort's rows in float64, without a copy of the cohort."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fl_lightning.local.rows import flat_rows

# Copies are of at most so many elements, or of one row: they stay in the cache.
_AT_ONCE = 1 << 16


def add_rows(totals: Sequence[Tensor], tensors: Sequence[Tensor], weights: Tensor) -> None:
    """Add the rows of some tensors, each times its weight, to a total of each, in place.

    Args:
        totals: float64, contiguous, on the CPU; those of the tensors without their first dimension.
        tensors: [k, ...], floating.
        weights: of the rows [k].

    Guarantees:
        Products and sums are float64.
    """
    weights = weights.double()
    small: list[tuple[Tensor, Tensor]] = []
    room = _AT_ONCE
    for total, value in zip(totals, tensors, strict=True):
        flat = flat_rows(value)
        if flat.numel() > _AT_ONCE:
            _add_large(total.view(-1), flat, weights)
            continue
        if flat.numel() > room:
            _add_small(small, weights)
            small, room = [], _AT_ONCE
        small.append((total, flat))
        room -= flat.numel()
    _add_small(small, weights)


def _add_large(total: Tensor, rows: Tensor, weights: Tensor) -> None:
    """Some rows [k, n] at a time."""
    size = max(1, _AT_ONCE // rows.shape[1])
    if size > 1:
        for part, weight in zip(rows.split(size), weights.split(size), strict=True):
            total += (part.double().cpu() * weight[:, None]).sum(0)
        return
    memory = torch.empty_like(total)  # one for all: new memory costs more than the sums
    for row, weight in zip(rows.unbind(), weights.tolist(), strict=True):
        total.add_(memory.copy_(row), alpha=weight)


def _add_small(small: Sequence[tuple[Tensor, Tensor]], weights: Tensor) -> None:
    """Of several tensors at once: each alone would cost a few calls."""
    if not small:
        return
    rows = torch.cat([flat for _, flat in small], 1).double().cpu()
    sums = (rows * weights[:, None]).sum(0).split([flat.shape[1] for _, flat in small])
    for (total, _), part in zip(small, sums, strict=True):
        total += part.view(total.shape)
