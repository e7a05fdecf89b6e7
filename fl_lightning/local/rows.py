"""Tensors of several clients, [k, ...], and one number for each of them, [k]."""

from __future__ import annotations

from torch import Tensor


def own(value: Tensor) -> Tensor:
    """The tensor, or a copy where some of its elements share memory or have gaps between them."""
    apart = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride != apart:
            return value.contiguous()
        apart *= size
    return value


def columns(row: Tensor, like: Tensor) -> Tensor:
    """View [k] so that it broadcasts against [k, ...]."""
    return row.view(-1, *[1] * (like.ndim - 1))


def flat_rows(value: Tensor) -> Tensor:
    """Each client's tensor as a row, [k, ...] → [k, d]: a number for a 0-d parameter."""
    return value.flatten(1) if value.ndim > 1 else value[:, None]


def per_row(value: Tensor, factor: Tensor) -> Tensor:
    """Each client's tensor times its own number: [k, ...] × [k]."""
    return value * columns(factor, value)
