"""Clipped sums of records whose weight gradient is a product over positions, in numba.

A record's gradient is made, measured and added while it stays in the cache: no patches and no
gradients of a batch are written to memory.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from aadp_kernels._cpu._jit import jit, wide_vectors
from aadp_kernels._cpu.backward_linear import clip_factor
from aadp_kernels._cpu.gather_gemm import COLUMNS1, COLUMNS2, VECTOR, tile1, tile2
from aadp_kernels._cpu.row_sums import absolute, add_scaled, jit_sums, memory, square
from aadp_kernels.contract import Geometry

# Elements of a record's gradient, and of its input and output, that a core's own cache holds.
MOST = 1 << 17
# Relative error bound of norms that were summed in float64.
SLACK = 2.0**-33
_UNITS, _SMALLEST_UNIT = 16, 8


def _columns(geometry: Geometry) -> int:
    """Columns of a group's weight."""
    return geometry.channels // geometry.groups * math.prod(geometry.kernel)


def _width(geometry: Geometry, out: int, dtype: torch.dtype) -> int:
    """Features of a group's output, padded to whole vectors."""
    lanes = VECTOR // dtype.itemsize
    return -(-out // geometry.groups // lanes) * lanes


def fits(geometry: Geometry, out: int, dtype: torch.dtype) -> bool:
    """Whether a record's gradient and what it is made of stay in the cache."""
    return _extent(geometry, out, dtype) <= MOST


@lru_cache(maxsize=256)
def _extent(geometry: Geometry, out: int, dtype: torch.dtype) -> int:
    """The elements of the largest of them."""
    width = geometry.groups * _width(geometry, out, dtype)
    inner = geometry.channels * math.prod(geometry.size)
    products = width * max(_columns(geometry), math.prod(geometry.positions))
    return max(products, inner)


class ProductPlan(NamedTuple):
    """A geometry as the kernel takes it.

    Attributes:
        base: Bytes from a padded record's beginning to each position.
        columns: Bytes from there to each column of a group; the last is repeated, so that tiles
            may run over the end.
        shape: Channels and spatial sizes of the input.
        padding: As in `Geometry`; also groups and last.
        groups: See padding.
        last: See padding.
        rows: Columns of a group.
        out: Features of the output.
        width: Features of a group, padded to whole vectors.
    """

    base: np.ndarray
    columns: np.ndarray
    shape: tuple[int, int, int]
    padding: tuple[int, int]
    groups: int
    last: bool
    rows: int
    out: int
    width: int

    def sizes(self) -> tuple[int, int, int, int]:
        """Elements of a padded input, of a turned output gradient, of a record's gradients."""
        (channels, high, wide), (above, left) = self.shape, self.padding
        padded = channels * (high + 2 * above) * (wide + 2 * left) if above or left else 0
        direct = self.last and self.groups == 1 and self.width == self.out
        turned = 0 if direct else self.groups * len(self.base) * self.width
        return padded, turned, self.groups * len(self.columns) * self.width, self.out


@lru_cache(maxsize=256)
def product_plan(geometry: Geometry, out: int, dtype: torch.dtype) -> ProductPlan:
    high, wide = (n + 2 * pad for n, pad in zip(geometry.size, geometry.padding, strict=True))
    base = [
        y * geometry.step[0] * wide + x * geometry.step[1]
        for y, x in itertools.product(*map(range, geometry.positions))
    ]
    columns = [
        (c * high + y * geometry.gap[0]) * wide + x * geometry.gap[1]
        for c in range(geometry.channels // geometry.groups)
        for y, x in itertools.product(*map(range, geometry.kernel))
    ]
    columns += columns[-1:] * max(COLUMNS1, COLUMNS2)
    return ProductPlan(
        dtype.itemsize * np.array(base, np.int64), dtype.itemsize * np.array(columns, np.int64),
        (geometry.channels, *geometry.size), geometry.padding, geometry.groups, geometry.last,
        _columns(geometry), out, _width(geometry, out, dtype),
    )  # fmt: skip


@jit
def _pad(x, plan, out):
    """Copy a record x into the inside of `out`, whose border is zero."""
    (channels, high, wide), (above, beside) = plan.shape, plan.padding
    across = wide + 2 * beside
    for c in range(channels):
        for y in range(high):
            start = (c * (high + 2 * above) + y + above) * across + beside
            row = x[(c * high + y) * wide : (c * high + y + 1) * wide]
            for j in range(wide):
                out[start + j] = row[j]


@jit
def _turn(g, plan, turned, bias):
    """g [out, positions] (`last`: [positions, out]) as [groups, positions, width]; sums in bias.

    The order of the sums is written out. With `jit_sums` the compiler chose another one where it
    saw the caller, so a run that compiled and a run that loaded from the cache had other bits.
    """
    positions, out, width = len(plan.base), plan.out, plan.width
    each = out // plan.groups
    fours = positions - positions % 4
    for o in range(out):
        start = (o // each) * positions * width + o % each
        at, step = (o, out) if plan.last else (o * positions, 1)
        sum0 = sum1 = sum2 = sum3 = g.dtype.type(0)
        for t in range(0, fours, 4):
            value0, value1 = g[at + t * step], g[at + (t + 1) * step]
            value2, value3 = g[at + (t + 2) * step], g[at + (t + 3) * step]
            turned[start + t * width] = value0
            turned[start + (t + 1) * width] = value1
            turned[start + (t + 2) * width] = value2
            turned[start + (t + 3) * width] = value3
            sum0, sum1, sum2, sum3 = sum0 + value0, sum1 + value1, sum2 + value2, sum3 + value3
        for t in range(fours, positions):
            turned[start + t * width] = g[at + t * step]
            sum0 += g[at + t * step]
        bias[o] = (sum0 + sum1) + (sum2 + sum3)


@jit_sums
def _sum_positions(g, out, bias):
    """Sums of g [positions, out]."""
    wide_vectors()
    for o in range(out):
        bias[o] = 0
    for start in range(0, len(g), out):
        for o in range(out):
            bias[o] += g[start + o]


@jit
def _multiply(a, g, plan, record, dtype, bytes_each):
    """record [columns and a tile, width] = gathered aᵀ g of a group; all three are addresses."""
    step, lanes = plan.width * bytes_each, VECTOR // bytes_each
    base, columns, positions = plan.base.ctypes.data, plan.columns.ctypes.data, len(plan.base)
    for low in range(0, plan.width, 2 * lanes):
        right, out = g + low * bytes_each, record + low * bytes_each
        if plan.width - low >= 2 * lanes:
            for j in range(0, plan.rows, COLUMNS2):
                at = columns + 8 * j
                tile2(out + j * step, step, a, base, at, right, step, positions, dtype)
        else:
            for j in range(0, plan.rows, COLUMNS1):
                at = columns + 8 * j
                tile1(out + j * step, step, a, base, at, right, step, positions, dtype)


@jit
def _gradient(x, g, plan, wanted, scratch, dtype, record, own):
    """A record's gradient of the weight [groups, columns and a tile, width] and of the bias [out].

    Returns its L1 norm and squared L2 norm, 0 where not wanted.
    """
    weight, bias, l1, l2 = wanted
    bytes_each, left, right = g.itemsize, x.ctypes.data, g.ctypes.data
    channels, high, wide = plan.shape
    above, beside = plan.padding
    if above + beside > 0:
        size = channels * (high + 2 * above) * (wide + 2 * beside)
        _pad(x, plan, memory(scratch[0], size, dtype))
        left = scratch[0]
    if plan.last and plan.groups == 1 and plan.width == plan.out:
        _sum_positions(g, plan.out, own)
    else:
        size = plan.groups * len(plan.base) * plan.width
        _turn(g, plan, memory(scratch[1], size, dtype), own)
        right = scratch[1]
    norm1, total = 0.0, 0.0
    if bias:
        norm1, total = absolute(own), square(own)
    if weight:
        plane = channels // plan.groups * (high + 2 * above) * (wide + 2 * beside)
        whole, used = len(plan.columns) * plan.width, plan.rows * plan.width
        for i in range(plan.groups):
            part = record[i * whole : i * whole + used]
            _multiply(
                left + i * plane * bytes_each, right + i * len(plan.base) * plan.width * bytes_each,
                plan, part.ctypes.data, dtype, bytes_each,
            )  # fmt: skip
            if l1:
                norm1 += absolute(part)
            if l2:
                total += square(part)
    return norm1, total


@jit
def clip_units(
    a, g, plan, weight, bias, largest, shrink, p, mask, clip, votes_at, per_client, each, scratch,
    dtype, sum_w, sum_b, counts, begin, end,
):  # fmt: skip
    """Clipped sums of units of `each` records of a client: sum_w, sum_b and counts [units, ...].

    a and g are [K * B, elements of a record]; `scratch` holds four addresses of memory of the
    sizes of the plan, the first two of them zeros.
    """
    batch, used = mask.shape[1], plan.rows * plan.width
    whole = len(plan.columns) * plan.width
    record, own = (
        memory(scratch[2], plan.groups * whole, dtype),
        memory(scratch[3], plan.out, dtype),
    )
    for unit in range(begin, end):
        k, first = unit // per_client, unit % per_client * each
        wanted = (weight, bias, p == 1 or not np.isnan(votes_at[k]), p == 2)
        for b in range(first, min(batch, first + each)):
            if not mask[k, b]:
                continue
            x, y = a[k * batch + b], g[k * batch + b]
            norm_a, norm_g = np.sqrt(square(x)), np.sqrt(square(y))
            norm1, total = 0.0, 0.0
            finite = norm_a * norm_g + norm_a + norm_g <= largest
            if finite:
                norm1, total = _gradient(x, y, plan, wanted, scratch, dtype, record, own)
            norm = norm1 if p == 1 else np.sqrt(total)
            factor = clip_factor(
                norm1, norm, finite, True, clip[k], votes_at[k], SLACK, counts[unit]
            )
            if factor == 0:
                continue
            lowered = g.dtype.type(factor * shrink if factor < 1 else factor)
            if weight:
                for i in range(plan.groups):
                    part = record[i * whole : i * whole + used]
                    add_scaled(sum_w[unit, i * used : (i + 1) * used], lowered, part)
            if bias:
                add_scaled(sum_b[unit], lowered, own)


@lru_cache(maxsize=256)
def split_records(clients: int, batch: int) -> tuple[int, int]:
    """Units a client and records a unit, whatever the number of threads."""
    units = min(-(-_UNITS // clients), -(-batch // _SMALLEST_UNIT))
    return units, -(-batch // units)
