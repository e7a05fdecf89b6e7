"""Clipped sums of the gradients of embeddings, in numba."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu._jit import jit, wide_vectors
from aadp_kernels._cpu._parallel import parallel, region_for
from aadp_kernels._cpu.backward_linear import clip_factor
from aadp_kernels._cpu.backward_products import SLACK
from aadp_kernels._cpu.limits import Limits, limits_of, limits_of_one, rounding
from aadp_kernels._cpu.row_sums import absolute, add_scaled, jit_sums, square
from aadp_kernels.contract import ClipRule, GradientsNeeded, OneClient
from aadp_kernels.threads import run_on_threads

# Columns of a table that a thread adds to.
_COLUMNS = 64


@jit_sums
def _add(total, x):
    wide_vectors()
    for i in range(len(total)):
        total[i] += np.float64(x[i])


@jit
def clip_records(
    index, g, padding, largest, shrink, p, mask, clip, votes_at, factors, counts, norms, begin, end
):
    """Clip factors [K * B] and counts [K * B, 3] of records; rows of equal tokens add up first.

    Also their norms: L1 (0 if not needed) and squares, then the squares of g: `norms` [3, K * B].

    index is [K * B, T] and g [K * B, T, D]; rows of the token `padding` do not count.
    """
    batch, both = mask.shape[1], np.empty(g.shape[2], np.float64)
    for record in range(begin, end):
        k, tokens, rows = record // batch, index[record], g[record]
        factors[record], counts[record], norms[:, record] = 0, 0, 0
        if not mask[k, record % batch]:
            continue
        order = np.argsort(tokens, kind="mergesort")
        l1 = p == 1 or not np.isnan(votes_at[k])
        norm1, total, whole, start = 0.0, 0.0, 0.0, 0
        while start < len(order):
            token, stop = tokens[order[start]], start + 1
            while stop < len(order) and tokens[order[stop]] == token:
                stop += 1
            if token != padding:
                row = rows[order[start]]
                if stop == start + 1:
                    own = square(row)
                    total += own
                    whole += own
                    norm1 += absolute(row) if l1 else 0.0
                else:
                    both[:] = 0
                    for i in range(start, stop):
                        _add(both, rows[order[i]])
                        whole += square(rows[order[i]])
                    total += square(both)
                    norm1 += absolute(both) if l1 else 0.0
            start = stop
        norm = norm1 if p == 1 else np.sqrt(total)
        norms[0, record], norms[1, record], norms[2, record] = norm1, total, whole
        finite = np.sqrt(whole) <= largest
        factor = clip_factor(norm1, norm, finite, True, clip[k], votes_at[k], SLACK, counts[record])
        factors[record] = g.dtype.type(factor * shrink if factor < 1 else factor)


@jit
def add_rows(index, g, padding, factors, batch, sums, begin, end):
    """sums [K, tokens, D] += factor * row, in parts of some columns of a client, in order."""
    dim = g.shape[2]
    parts = -(-dim // _COLUMNS)
    for part in range(begin, end):
        k, low = part // parts, part % parts * _COLUMNS
        high = min(dim, low + _COLUMNS)
        for record in range(k * batch, (k + 1) * batch):
            if factors[record] == 0:
                continue
            for t in range(index.shape[1]):
                if index[record, t] != padding:
                    add_scaled(
                        sums[k, index[record, t], low:high], factors[record], g[record, t, low:high]
                    )


@jit
def _sum_parallel(first, records, second, parts, threads, region):
    if region != 0:
        parallel(clip_records, first, records, threads, region)
        parallel(add_rows, second, parts, threads, region)
    else:
        clip_records(*first, np.int64(0), records)
        add_rows(*second, np.int64(0), parts)


def embedding_sums(
    index: Tensor, g: Tensor, tokens: int, padding: int | None, rule: ClipRule
) -> tuple[Tensor, Tensor]:
    """`RecordKernels.embedding_sums`."""
    index, g = index.flatten(0, 1), g.flatten(0, 1)
    sums, counts = _sums_of_rows(index, g, tokens, padding, rule.needed, limits_of(rule))
    return sums, torch.from_numpy(counts)


def embedding_single(
    index: Tensor,
    g: Tensor,
    tokens: int,
    padding: int | None,
    needed: GradientsNeeded,
    one: OneClient,
) -> tuple[Tensor, Tensor]:
    """`RecordKernels.embedding_single`."""
    limits = limits_of_one(*one, len(index))
    sums, counts = _sums_of_rows(index, g, tokens, padding, needed, limits)
    return sums[0], torch.from_numpy(counts[0])


def embedding_norms(
    index: Tensor, g: Tensor, padding: int | None, l1: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`RecordKernels.embedding_norms`."""
    batch = len(index)
    norms, level = np.empty((3, batch)), torch.tensor(0.0 if l1 else torch.nan)
    limits = limits_of_one(torch.tensor(0.0), None, level, batch)
    rows, slopes = (np.ascontiguousarray(t.detach().numpy()) for t in (index, g))
    none = -1 if padding is None else padding
    factors = np.empty(batch, slopes.dtype)
    first = (
        rows, slopes, none, *rounding(g.dtype), 2, *limits, factors, np.empty((batch, 3)), norms,
    )  # fmt: skip
    threads, region = region_for(slopes.size)
    if threads == 1 or region:
        second = rows, slopes, none, factors, batch, np.empty((0, 0, slopes.shape[2]), slopes.dtype)
        _sum_parallel(first, batch, second, 0, threads, region)
    else:
        run_on_threads(partial(clip_records, *first), batch, elements=slopes.size)
    norm1, square, whole = torch.from_numpy(norms)
    return norm1, square, whole


def _sums_of_rows(
    index: Tensor, g: Tensor, tokens: int, padding: int | None, needed: GradientsNeeded,
    limits: Limits,
) -> tuple[Tensor, np.ndarray]:  # fmt: skip
    """Clipped sums [K, tokens, D] and counts [K, 3].

    Args:
        index: tokens [K * B, T], int64 within the table.
        g: gradients of their rows [K * B, T, D], float32 or float64.
        tokens: rows of the table.
        padding: a token without a gradient, or None.
        needed: the norm.
        limits: how to clip.
    """
    clients, batch = limits.mask.shape
    rows, slopes = (np.ascontiguousarray(t.detach().numpy()) for t in (index, g))
    dim = slopes.shape[2]
    sums = g.new_zeros((clients, tokens, dim))
    factors, counts = np.empty(len(rows), slopes.dtype), np.empty((len(rows), 3))
    none = -1 if padding is None else padding
    first = (
        rows, slopes, none, *rounding(g.dtype), needed.p, *limits,
        factors, counts, np.empty((3, len(rows))),
    )  # fmt: skip
    second = rows, slopes, none, factors, batch, sums.numpy()
    parts = clients * -(-dim // _COLUMNS)
    threads, region = region_for(slopes.size)
    if threads == 1 or region:
        _sum_parallel(first, len(rows), second, parts, threads, region)
    else:
        run_on_threads(partial(clip_records, *first), len(rows), elements=slopes.size)
        run_on_threads(partial(add_rows, *second), parts, elements=slopes.size)
    return sums, counts.reshape(clients, -1, 3).sum(1)
