"""Clip-in-backward's norms and clip factors in numba.

They compute what `clip_in_backward/clip.py` computes, norms in float64, in one pass over memory and
without the cost of some twenty small torch calls a slice.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu._jit import jit, wide_vectors
from aadp_kernels._cpu._parallel import parallel, region_for
from aadp_kernels._cpu.limits import array_of, levels
from aadp_kernels._cpu.row_sums import absolute, bytes_of, jit_sums, memory, square
from aadp_kernels._cpu.tensor_table import address
from aadp_kernels.certified import largest
from aadp_kernels.contract import ClipRule, GradientsNeeded, OneClient
from aadp_kernels.threads import run_on_threads

# As kernels take them, and a factor that covers the roundings of a scaled row.
_DTYPES = {
    torch.float32: (np.dtype(np.float32), 1 - 8 * 2.0**-23),
    torch.float64: (np.dtype(np.float64), 1 - 8 * 2.0**-52),
}
_SLACK = 1e-12


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
    """Clip factor of a record, operation by operation as `clip_in_backward`; counts [3] move on."""
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
def _factors_and_counts(norm1, norm, finite, mask, clip, votes_at, slack, factor, counts):
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
def _row_norms(a, g, dtype, features, out, l1, l2, norms, begin, end):
    """Sums of a^2, g^2, |a| and |g| of the records begin .. end - 1 into `norms` [B, 4].

    Only those that are asked for.
    """
    for b in range(begin, end):
        row_a = memory(a + b * features * bytes_of(dtype), features, dtype)
        row_g = memory(g + b * out * bytes_of(dtype), out, dtype)
        if l2:
            norms[b, 0], norms[b, 1] = square(row_a), square(row_g)
        if l1:
            norms[b, 2], norms[b, 3] = absolute(row_a), absolute(row_g)


@jit
def _scale_rows(
    a, g, scaled, total, mask, dtype, batch, features, out, weight, bias, p, clip, votes_at,
    largest, shrink, threads, region,
):  # fmt: skip
    """g [B, out] times the clip factors of g aᵀ into `scaled`, its sum over B into `total` [out].

    Norms of g aᵀ are products of those of g and a [B, in]. The first five are addresses; that of a
    mask may be 0 and masks nothing. Returns whether all records were finite, and the counts.
    """
    norms, counts, sums = np.zeros((batch, 4)), np.zeros(3), np.zeros(out)
    l1, l2 = p == 1 or not np.isnan(votes_at), p == 2
    if region != 0:
        given = (a, g, dtype, features, out, l1, l2, norms)
        parallel(_row_norms, given, batch, threads, region)
    else:
        _row_norms(a, g, dtype, features, out, l1, l2, norms, np.int64(0), batch)
    live, clean, width = memory(mask, batch, np.bool_), True, out * bytes_of(dtype)
    for b in range(batch):
        norm_a, norm_g = norms[b, 2], norms[b, 3]
        if l2:
            norm_a, norm_g = np.sqrt(norms[b, 0]), np.sqrt(norms[b, 1])
        finite = norm_a * norm_g + norm_a + norm_g <= largest
        clean = clean and finite
        norm1 = (norms[b, 2] * weight + bias) * norms[b, 3]
        norm = norm1 if p == 1 else np.sqrt((norms[b, 0] * weight + bias) * norms[b, 1])
        counted = mask == 0 or live[b]
        factor = clip_factor(norm1, norm, finite, counted, clip, votes_at, _SLACK, counts)
        row = memory(scaled + b * width, out, dtype)
        if factor == 0:
            row[:] = 0
            continue
        if factor < 1:
            factor *= shrink
        _scale(memory(g + b * width, out, dtype), factor, row, sums)
    whole = memory(total, out, dtype)
    for j in range(out):
        whole[j] = sums[j]
    return clean, counts[0], counts[1], counts[2]


@jit
def _scale_clients(
    a, g, scaled, total, mask, dtype, clients, batch, features, out, weight, bias, p, clip,
    votes_at, largest, shrink, counts,
):  # fmt: skip
    """`_scale_rows` of all clients, with a mask; clip and votes_at are [K], counts [K, 3]."""
    clean, each = True, batch * bytes_of(dtype)
    for k in range(clients):
        found = _scale_rows(
            a + k * each * features, g + k * each * out, scaled + k * each * out,
            total + k * out * bytes_of(dtype), mask + k * batch, dtype, batch, features, out,
            weight, bias, p, clip[k], votes_at[k], largest, shrink, 1, 0,
        )  # fmt: skip
        clean = clean and found[0]
        counts[k, 0], counts[k, 1], counts[k, 2] = found[1], found[2], found[3]
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

    run_on_threads(work, len(rows), elements=rows.size // 4)
    return sums.reshape(2, *x.shape[:2])


def factors_and_counts(
    norm1: Tensor | None, norm: Tensor, finite: Tensor, rule: ClipRule, slack: float
) -> tuple[Tensor, Tensor]:
    """`RecordKernels.factors_and_counts`."""
    factor, counts = np.zeros(norm.shape), np.zeros((len(norm), 3))
    _factors_and_counts(
        (norm if norm1 is None else norm1).numpy(), norm.numpy(), finite.numpy(),
        rule.mask.numpy(), rule.clip.numpy(), levels(rule.votes_at, len(norm)), slack, factor,
        counts,
    )  # fmt: skip
    return torch.from_numpy(factor), torch.from_numpy(counts)


class Scaled(NamedTuple):
    """Output gradients of a linear layer times the clip factors of their records.

    Attributes:
        g: of the shape of the output gradients.
        total: its sum over the records [K, out] (or [out]), summed in float64.
        clean: whether all records were finite.
        counts: votes, clipped and non-finite records, float64 [K, 3] (or three numbers).
    """

    g: Tensor
    total: Tensor
    clean: bool
    counts: Any


def scale_linear(a: Tensor, g: Tensor, rule: ClipRule) -> Scaled:
    """`RecordKernels.scale_linear`: the gradients g aᵀ of records, of which no one is formed."""
    needed, mask = rule.needed, rule.mask.contiguous()
    a, g = a.resolve_neg().contiguous(), g.resolve_neg().contiguous()
    clients, batch, out = g.shape
    scaled, total, counts = torch.empty_like(g), g.new_empty((clients, out)), np.empty((clients, 3))
    dtype, shrink = _DTYPES[g.dtype]
    clean = _scale_clients(
        address(a), address(g), address(scaled), address(total), address(mask), dtype, clients,
        batch, a.shape[2], out, float(needed.weight), float(needed.bias), needed.p,
        array_of(rule.clip), levels(rule.votes_at, clients), largest(g.dtype), shrink, counts,
    )  # fmt: skip
    return Scaled(scaled, total, clean, torch.from_numpy(counts))


def scale_single(a: Tensor, g: Tensor, needed: GradientsNeeded, one: OneClient) -> Scaled:
    """`RecordKernels.scale_single`."""
    clip, mask, votes_at = one
    a, g = a.resolve_neg().contiguous(), g.resolve_neg().contiguous()
    batch, out = g.shape
    scaled, total = torch.empty_like(g), g.new_empty(out)
    if mask is not None:
        mask = (mask != 0).expand(batch).contiguous()
    dtype, shrink = _DTYPES[g.dtype]
    clean, *counts = _scale_rows(
        address(a), address(g), address(scaled), address(total),
        0 if mask is None else address(mask), dtype, batch, a.shape[1], out, float(needed.weight),
        float(needed.bias), needed.p, float(clip),
        math.nan if votes_at is None else float(votes_at), largest(g.dtype), shrink,
        *region_for(a.numel() + g.numel()),
    )  # fmt: skip
    return Scaled(scaled, total, clean, counts)
