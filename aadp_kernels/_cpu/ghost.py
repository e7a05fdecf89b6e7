"""Clip-in-backward's norms and clip factors in numba.

They compute what `_torch.ghost_clip` computes, norms in float64, in one pass over memory and
without the cost of some twenty small torch calls a slice.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu._jit import jit
from aadp_kernels._cpu._threads import spread


def _jit_sums(function):
    """Compile with sums in any order, so that they become vector instructions."""
    return jit(function, fastmath={"reassoc", "nsz"})


@_jit_sums
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


@jit
def _scale_linear(
    sums_a, sums_g, g, weight, bias, largest, shrink, p, mask, clip, votes_at, slack, scaled, total,
    counts,
):  # fmt: skip
    """g [K, B, out] times the clip factors of g aᵀ into `scaled`, its sum over B into `total`.

    Norms of g aᵀ are products of those of g and a, sums [2, K, B] of |.| and squares. Returns
    whether all records were finite.
    """
    clean = True
    for k in range(g.shape[0]):
        for b in range(g.shape[1]):
            norm1 = (sums_a[0, k, b] * weight + bias) * sums_g[0, k, b]
            square = (sums_a[1, k, b] * weight + bias) * sums_g[1, k, b]
            norm_a, norm_g = np.sqrt(sums_a[1, k, b]), np.sqrt(sums_g[1, k, b])
            finite = norm_a * norm_g + norm_a + norm_g <= largest
            clean = clean and finite
            norm = norm1 if p == 1 else np.sqrt(square)
            factor = clip_factor(
                norm1, norm, finite, mask[k, b], clip[k], votes_at[k], slack, counts[k]
            )
            if factor == 0:
                scaled[k, b] = 0
                continue
            if factor < 1:
                factor *= shrink
            for j in range(g.shape[2]):
                value = g[k, b, j] * factor
                scaled[k, b, j] = value
                total[k, j] += value
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
        clip.numpy(), _levels(votes_at, len(norm)), slack, factor, counts,
    )  # fmt: skip
    return torch.from_numpy(factor), torch.from_numpy(counts)


def _levels(votes_at: Tensor | None, clients: int) -> np.ndarray:
    return np.full(clients, np.nan) if votes_at is None else votes_at.numpy()


def scale_linear(
    a: Tensor,
    g: Tensor,
    *,
    weight: bool,
    bias: bool,
    largest: float,
    p: int,
    mask: Tensor,
    clip: Tensor,
    votes_at: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Output gradients of a linear layer [K, B, out] times the clip factors of their records.

    Args:
        a: inputs [K, B, in].
        g: output gradients [K, B, out].
        weight: whether the weight gradient counts in the norm.
        bias: whether the bias gradient does.
        largest: bound on the norms of a finite record.
        p: norm of the clipping.
        mask: [K, B], bool.
        clip: [K], float64; also votes_at.
        votes_at: see clip.

    Returns:
        The scaled gradients, their sums over the records [K, out], counts [K, 3] and whether all
        records were finite.
    """
    clients, _, out = g.shape
    scaled, counts = torch.empty_like(g), np.zeros((clients, 3))
    total = np.zeros((clients, out))
    clean = _scale_linear(
        _sums(a), _sums(g), g.detach().numpy(), float(weight), float(bias), largest,
        1 - 8 * torch.finfo(g.dtype).eps, p, mask.numpy(), clip.numpy(), _levels(votes_at, clients),
        1e-12, scaled.numpy(), total, counts,
    )  # fmt: skip
    return scaled, torch.from_numpy(total).to(g.dtype), torch.from_numpy(counts), clean
