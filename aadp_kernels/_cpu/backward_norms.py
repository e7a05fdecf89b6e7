"""Clipped sums of the gradients of normalisation layers over the last axes, in numba."""

from __future__ import annotations

from functools import partial

import numpy as np
from torch import Tensor

from aadp_kernels._cpu._jit import jit, wide_vectors
from aadp_kernels._cpu._parallel import parallel, region_for
from aadp_kernels._cpu.backward_linear import clip_factor
from aadp_kernels._cpu.backward_products import SLACK, rows_of, split_records, total_of
from aadp_kernels._cpu.limits import Limits, limits_of, limits_of_one, rounding
from aadp_kernels._cpu.row_sums import absolute, add_scaled, jit_sums, square
from aadp_kernels.contract import ClipRule, GradientsNeeded, OneClient
from aadp_kernels.threads import run_on_threads


@jit_sums
def _gradient(a, g, own):
    """own[0] = sum over positions of a * g, own[1] = that of g; a and g are [positions * n]."""
    wide_vectors()
    n = own.shape[1]
    own[:] = 0
    for start in range(0, len(g), n):
        for j in range(n):
            own[0, j] += a[start + j] * g[start + j]
            own[1, j] += g[start + j]


@jit_sums
def _normalise(x, mean, scale, out):
    """out = (x - mean) * scale, with a mean and a scale for each position."""
    wide_vectors()
    n = len(x) // len(mean)
    for t in range(len(mean)):
        for j in range(t * n, t * n + n):
            out[j] = (x[j] - mean[t]) * scale[t]


@jit
def clip_units(
    a, g, mean, scale, first, last, largest, shrink, p, mask, clip, votes_at, per_client, each,
    sums, counts, begin, end,
):  # fmt: skip
    """Clipped sums of units of `each` records of a client: sums [units, 2, n], counts [units, 3].

    a and g are [K * B, positions * n]; a is normalised, or is to be with mean and scale
    [K * B, positions]. Of the gradients of weight (0) and bias (1), those from `first` to
    `last` - 1 count.
    """
    batch, own = mask.shape[1], np.empty_like(sums[0])
    normed = np.empty_like(a[0])
    sums[begin:end], counts[begin:end] = 0, 0
    for unit in range(begin, end):
        k, start = unit // per_client, unit % per_client * each
        for b in range(start, min(batch, start + each)):
            if not mask[k, b]:
                continue
            row = k * batch + b
            x, y = a[row], g[row]
            if mean.shape[1] > 0:
                _normalise(x, mean[row], scale[row], normed)
                x = normed
            norm_a, norm_g = np.sqrt(square(x)), np.sqrt(square(y))
            finite = norm_a * norm_g + norm_a + norm_g <= largest
            norm1, total = 0.0, 0.0
            if finite:
                _gradient(x, y, own)
                for i in range(first, last):
                    norm1 += absolute(own[i])
                    total += square(own[i])
            norm = norm1 if p == 1 else np.sqrt(total)
            factor = clip_factor(
                norm1, norm, finite, True, clip[k], votes_at[k], SLACK, counts[unit]
            )
            if factor == 0:
                continue
            lowered = g.dtype.type(factor * shrink if factor < 1 else factor)
            for i in range(first, last):
                add_scaled(sums[unit, i], lowered, own[i])


@jit
def _clip_parallel(given, units, threads, region):
    if region != 0:
        parallel(clip_units, given, units, threads, region)
    else:
        clip_units(*given, np.int64(0), units)


def norm_layer_sums(a: Tensor, g: Tensor, n: int, rule: ClipRule) -> tuple[Tensor, Tensor, Tensor]:
    """`RecordKernels.norm_layer_sums`.

    Args:
        a: normalised inputs [K, B, ..., n elements], float32 or float64.
        g: output gradients of the same shape and dtype.
        n: elements of weight and bias.
        rule: how to clip.
    """
    rows, slopes = rows_of(a), rows_of(g)
    ready = np.empty((0, 0), slopes.dtype)
    return _sums_of_rows(rows, slopes, ready, ready, n, rule.needed, limits_of(rule))


def norm_layer_single(
    x: Tensor,
    g: Tensor,
    mean: Tensor,
    scale: Tensor,
    n: int,
    needed: GradientsNeeded,
    one: OneClient,
) -> tuple[Tensor, Tensor, Tensor]:
    """`RecordKernels.norm_layer_single`."""
    rows, slopes, means, scales = (rows_of(t[None]) for t in (x, g, mean, scale))
    limits = limits_of_one(*one, len(g))
    found = _sums_of_rows(rows, slopes, means, scales, n, needed, limits)
    return found[0][0], found[1][0], found[2][0]


def _sums_of_rows(
    a: np.ndarray, g: np.ndarray, mean: np.ndarray, scale: np.ndarray, n: int,
    needed: GradientsNeeded, limits: Limits,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sums of weight and bias [K, n] and counts [K, 3]; records are rows [K * B, elements]."""
    clients, batch = limits.mask.shape
    per_client, each = split_records(clients, batch)
    units = clients * per_client
    sums, counts = np.empty((units, 2, n), g.dtype), np.empty((units, 3))
    given = (
        a, g, mean, scale, 0 if needed.weight else 1, 2 if needed.bias else 1, *rounding(g),
        needed.p, *limits, per_client, each, sums, counts,
    )  # fmt: skip
    threads, region = region_for(g.size)
    if threads == 1 or region:
        _clip_parallel(given, units, threads, region)
    else:
        run_on_threads(partial(clip_units, *given), units, elements=g.size)
    total = total_of(sums, clients).view(clients, 2, n)
    # Apart: views of one tensor would be written and counted together.
    return total[:, 0].clone(), total[:, 1].clone(), total_of(counts, clients)
