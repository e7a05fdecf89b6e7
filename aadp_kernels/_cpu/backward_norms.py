"""Clipped sums of the gradients of normalisation layers over the last axes, in numba."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu._jit import jit, wide_vectors
from aadp_kernels._cpu._parallel import parallel, region_for
from aadp_kernels._cpu.backward_linear import clip_factor
from aadp_kernels._cpu.backward_products import SLACK, split_records
from aadp_kernels._cpu.limits import Limits, limits_of, limits_of_one, numpy_dtype, rounding
from aadp_kernels._cpu.row_sums import absolute, add_scaled, jit_sums, rows_at, square
from aadp_kernels._cpu.tensor_table import address
from aadp_kernels.contract import ClipRule, GradientsNeeded, OneClient
from aadp_kernels.threads import run_on_threads


@jit_sums
def _gradient(a, g, n, mean, scale, own):
    """own[0] = sum over positions of a * g, own[1] = that of g; a and g are [positions * n].

    a is normalised, or is to be with a mean and a scale for each position. Returns the squared
    norms of a and g.
    """
    wide_vectors()
    own[:] = 0
    total_a, total_g, ready = 0.0, 0.0, len(mean) == 0
    for t in range(len(g) // n):
        shift, factor = own.dtype.type(0), own.dtype.type(1)
        if not ready:
            shift, factor = mean[t], scale[t]
        for j in range(n):
            left, right = (a[t * n + j] - shift) * factor, g[t * n + j]
            own[j] += left * right
            own[n + j] += right
            total_a += np.float64(left) * np.float64(left)
            total_g += np.float64(right) * np.float64(right)
    return total_a, total_g


@jit
def clip_units(
    a, g, mean, scale, shape, first, last, largest, shrink, p, mask, clip, votes_at, per_client,
    each, dtype, sums, counts, begin, end,
):  # fmt: skip
    """Clipped sums of units of `each` records of a client: sums [units, 2 * n], counts [units, 3].

    a, g, mean and scale are addresses of records, whose number, elements and positions are in
    `shape`; a is normalised where they have 0 positions. Of the gradients of weight (0) and
    bias (1), those from `first` to `last` - 1 count.
    """
    batch, n = mask.shape[1], sums.shape[1] // 2
    x, y = rows_at(a, shape[0], shape[1], dtype), rows_at(g, shape[0], shape[1], dtype)
    means, scales = (
        rows_at(mean, shape[0], shape[2], dtype),
        rows_at(scale, shape[0], shape[2], dtype),
    )
    own = np.empty(2 * n, sums.dtype)
    sums[begin:end], counts[begin:end] = 0, 0
    for unit in range(begin, end):
        k, start = unit // per_client, unit % per_client * each
        for b in range(start, min(batch, start + each)):
            if not mask[k, b]:
                continue
            row = k * batch + b
            norm_a, norm_g = _gradient(x[row], y[row], n, means[row], scales[row], own)
            norm_a, norm_g = np.sqrt(norm_a), np.sqrt(norm_g)
            finite = norm_a * norm_g + norm_a + norm_g <= largest
            used = own[first * n : last * n]
            norm1, norm = 0.0, 0.0
            if finite:
                norm1, norm = absolute(used), np.sqrt(square(used))
            factor = clip_factor(
                norm1, norm1 if p == 1 else norm, finite, True, clip[k], votes_at[k], SLACK,
                counts[unit],
            )  # fmt: skip
            if factor == 0:
                continue
            lowered = sums.dtype.type(factor * shrink if factor < 1 else factor)
            add_scaled(sums[unit, first * n : last * n], lowered, used)


@jit
def _add_units(sums, seen, per_client, weight, bias, dtype, counts):
    """The clients' sums over their units, in order: of weights and biases, [K, n] at addresses."""
    n = sums.shape[1] // 2
    weights, biases = rows_at(weight, len(counts), n, dtype), rows_at(bias, len(counts), n, dtype)
    counts[:] = 0
    for k in range(len(counts)):
        weights[k], biases[k] = sums[k * per_client, :n], sums[k * per_client, n:]
        for unit in range(k * per_client, (k + 1) * per_client):
            if unit > k * per_client:
                add_scaled(weights[k], sums.dtype.type(1), sums[unit, :n])
                add_scaled(biases[k], sums.dtype.type(1), sums[unit, n:])
            for i in range(3):
                counts[k, i] += seen[unit, i]


@jit
def _clip_parallel(given, units, joining, threads, region):
    if region != 0:
        parallel(clip_units, given, units, threads, region)
    else:
        clip_units(*given, np.int64(0), units)
    _add_units(*joining)


def norm_layer_sums(a: Tensor, g: Tensor, n: int, rule: ClipRule) -> tuple[Tensor, Tensor, Tensor]:
    """`RecordKernels.norm_layer_sums`.

    Args:
        a: normalised inputs [K, B, ..., n elements], float32 or float64.
        g: output gradients of the same shape and dtype.
        n: elements of weight and bias.
        rule: how to clip.
    """
    return _sums(a, g, None, (len(a), n), rule.needed, limits_of(rule))


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
    return _sums(x, g, (mean, scale), (n,), needed, limits_of_one(*one, len(g)))


def _sums(
    a: Tensor, g: Tensor, by: tuple[Tensor, Tensor] | None, shape: tuple[int, ...],
    needed: GradientsNeeded, limits: Limits,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sums of weight and bias, each of this shape, and counts [K, 3], [3] where there is no K.

    `by` has the means and the scales that are to normalise a; None: it is normalised.
    """
    clients, batch = limits.mask.shape
    per_client, each = split_records(clients, batch)
    units, records = clients * per_client, max(1, clients * batch)
    mean, scale = by or (a[:0], a[:0])
    a, g, mean, scale = (t.resolve_neg().contiguous() for t in (a, g, mean, scale))
    dtype = numpy_dtype(g)
    sums, seen = np.empty((units, 2 * shape[-1]), dtype), np.empty((units, 3))
    weight, bias, counts = g.new_empty(shape), g.new_empty(shape), np.empty((clients, 3))
    given = (
        address(a), address(g), address(mean), address(scale),
        (clients * batch, g.numel() // records, mean.numel() // records), 0 if needed.weight else 1,
        2 if needed.bias else 1, *rounding(g.dtype), needed.p, *limits, per_client, each, dtype,
        sums, seen,
    )  # fmt: skip
    joining = sums, seen, per_client, address(weight), address(bias), dtype, counts
    threads, region = region_for(g.numel())
    if threads == 1 or region:
        _clip_parallel(given, units, joining, threads, region)
    else:
        run_on_threads(partial(clip_units, *given), units, elements=g.numel())
        _add_units(*joining)
    return weight, bias, torch.from_numpy(counts[0] if len(shape) == 1 else counts)
