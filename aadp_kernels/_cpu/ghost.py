"""Clip-in-backward's norms and clip factors in numba.

They compute what `_torch.ghost_clip` computes, norms in float64, in one pass over memory and
without the cost of some twenty small torch calls a slice.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu._jit import jit, wide_vectors
from aadp_kernels._cpu._threads import spread
from aadp_kernels._cpu.rows import absolute, jit_sums, memory, square

_EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


@jit_sums
def _sum_rows(x, absolute, squares, begin, end):
    """Sums of |x| and of x^2 of the rows [begin, end) of x [R, n]."""
    for row in range(begin, end):
        total1, total2 = 0.0, 0.0
        for j in range(x.shape[1]):
            value = np.float64(x[row, j])
            total1 += abs(value)
            total2 += value * value
        absolute[row] += total1
        squares[row] += total2


@jit
def clip_factor(norm1, norm, finite, live, clip, votes_at, slack, counts):
    """Clip factor of a record, operation by operation as `Terms.settle`; counts [3] move on."""
    if not live:
        return 0.0
    if not finite:
        counts[2] += 1
        return 0.0
    if not np.isnan(votes_at):
        counts[0] += 0.5 if norm1 <= votes_at else -0.5
    inflated = norm * (1 + slack)
    if inflated <= clip:
        return 1.0
    counts[1] += 1
    return clip * (1 - 1e-12) / inflated if clip >= 0 else 0.0


@jit
def _settle(norm1, norm, finite, mask, clip, votes_at, slack, factor, counts):
    """Clip factors of [K, B] records; votes_at is NaN for no votes."""
    for k in range(norm.shape[0]):
        for b in range(norm.shape[1]):
            factor[k, b] = clip_factor(
                norm1[k, b], norm[k, b], finite[k, b], mask[k, b], clip[k], votes_at[k], slack,
                counts[k],
            )  # fmt: skip


@jit_sums
def _scale(x, factor, out, total):
    wide_vectors()
    for j in range(len(x)):
        value = x[j] * factor
        out[j] = value
        total[j] += value


@jit
def _scale_linear(
    a, g, weight, bias, largest, shrink, p, mask, clip, votes_at, slack, scaled, total, counts
):
    """g [K, B, out] times the clip factors of g aᵀ into `scaled`, its sum over B into `total`.

    Norms of g aᵀ are products of those of g and a [K, B, in]. A mask [K, 0] masks nothing. Returns
    whether all records were finite.
    """
    clean, (clients, batch, out), features = True, g.shape, a.shape[2]
    for k in range(clients):
        needs_l1 = p == 1 or not np.isnan(votes_at[k])
        sums = np.zeros(out)
        for b in range(batch):
            row = (k * batch + b) * g.itemsize
            row_a = memory(a.ctypes.data + row * features, features, a.dtype)
            row_g = memory(g.ctypes.data + row * out, out, g.dtype)
            row_scaled = memory(scaled.ctypes.data + row * out, out, g.dtype)
            square_a, square_g = square(row_a), square(row_g)
            norm_a, norm_g = np.sqrt(square_a), np.sqrt(square_g)
            finite = norm_a * norm_g + norm_a + norm_g <= largest
            clean = clean and finite
            norm1 = 0.0
            if needs_l1:
                norm1 = (absolute(row_a) * weight + bias) * absolute(row_g)
            norm = norm1 if p == 1 else np.sqrt((square_a * weight + bias) * square_g)
            live = mask.shape[1] == 0 or mask[k, b]
            factor = clip_factor(norm1, norm, finite, live, clip[k], votes_at[k], slack, counts[k])
            if factor == 0:
                row_scaled[:] = 0
                continue
            if factor < 1:
                factor *= shrink
            _scale(row_g, factor, row_scaled, sums)
        for j in range(out):
            total[k, j] = sums[j]
    return clean


def row_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of |x| and of x^2 over everything but the two leading axes: float64 [K, B] each."""
    norm1, square = torch.from_numpy(_sums(x))
    return norm1, square


def _sums(x: Tensor) -> np.ndarray:
    rows = x.detach().contiguous().view(x.shape[0] * x.shape[1], math.prod(x.shape[2:])).numpy()
    sums = np.zeros((2, len(rows)))

    def work(begin: int, end: int) -> None:
        _sum_rows(rows, sums[0], sums[1], begin, end)

    spread(work, len(rows), elements=rows.size // 4)
    return sums.reshape(2, *x.shape[:2])


def settle(
    norm1: Tensor | None,
    norm: Tensor,
    finite: Tensor,
    mask: Tensor,
    clip: Tensor,
    votes_at: Tensor | None,
    slack: float,
) -> tuple[Tensor, Tensor]:
    """Clip factors [K, B] and counts [K, 3], float64."""
    factor, counts = np.zeros(norm.shape), np.zeros((len(norm), 3))
    _settle(
        (norm if norm1 is None else norm1).numpy(), norm.numpy(), finite.numpy(), mask.numpy(),
        clip.numpy(), levels(votes_at, len(norm)), slack, factor, counts,
    )  # fmt: skip
    return torch.from_numpy(factor), torch.from_numpy(counts)


def levels(votes_at: Tensor | None, clients: int) -> np.ndarray:
    """Vote thresholds [K], NaN for no votes."""
    return _no_votes(clients) if votes_at is None else array_of(votes_at)


@lru_cache(maxsize=64)
def _no_votes(clients: int) -> np.ndarray:
    return np.full(clients, np.nan)


class Scaled(NamedTuple):
    """Output gradients of a linear layer times the clip factors of their records.

    Attributes:
        g: of the shape of the output gradients.
        total: its sum over the records [K, out] (or [out]), summed in float64.
        counts: votes, clipped and non-finite records [K, 3] (or [3]), float64.
        clean: whether all records were finite.
    """

    g: Tensor
    total: Tensor
    counts: Tensor
    clean: bool


def scale_linear(
    a: Tensor,
    g: Tensor,
    *,
    weight: bool,
    bias: bool,
    largest: float,
    p: int,
    mask: Tensor | None,
    clip: Tensor,
    votes_at: Tensor | None,
) -> Scaled:
    """Clip the gradients g aᵀ of records, of which no one is formed.

    Args:
        a: inputs [K, B, in], or [B, in] of one client, float32 or float64.
        g: output gradients [K, B, out], or [B, out].
        weight: whether the weight gradient counts in the norm.
        bias: whether the bias gradient does.
        largest: bound on the norms of a finite record.
        p: norm of the clipping.
        mask: which records count, bool [K, B] (or [B]); None: all.
        clip: [K] (or []); also votes_at (None or NaN: no votes).
        votes_at: see clip.
    """
    *lead, batch, out = g.shape
    inputs, slopes = a.detach().contiguous().numpy(), g.detach().contiguous().numpy()
    scaled, clients = np.empty_like(slopes), lead[0] if lead else 1
    total, counts = np.empty((clients, out), slopes.dtype), np.zeros((clients, 3))
    live = np.empty((clients, 0), np.bool_)
    if mask is not None:
        live = array_of(mask.expand(*lead, batch)).reshape(clients, batch)
    clean = _scale_linear(
        inputs.reshape(clients, batch, -1), slopes.reshape(clients, batch, out), float(weight),
        float(bias), largest, 1 - 8 * _EPS[g.dtype], p, live, array_of(clip),
        levels(votes_at, clients), 1e-12, scaled.reshape(clients, batch, out), total, counts,
    )  # fmt: skip
    sums, seen = total.reshape(*lead, out), counts.reshape(*lead, 3)
    return Scaled(torch.from_numpy(scaled), torch.from_numpy(sums), torch.from_numpy(seen), clean)


def array_of(x: Tensor) -> np.ndarray:
    """A small tensor as the one kind of array that kernels are compiled for, never 0-d."""
    array = np.ascontiguousarray(x.detach().numpy())
    return array if array.dtype == np.bool_ else array.astype(np.float64, copy=False)
