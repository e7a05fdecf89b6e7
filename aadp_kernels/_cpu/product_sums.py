"""Clipped sums of products over positions, of all records on torch's threads."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu._jit import jit, jit_inline
from aadp_kernels._cpu._parallel import parallel, region_for
from aadp_kernels._cpu.backward_products import (
    clip_units,
    fits,
    product_plan,
    rows_of,
    split_records,
    total_of,
)
from aadp_kernels._cpu.limits import Limits, limits_of, limits_of_one, rounding, torch_dtype
from aadp_kernels._cpu.row_sums import add_scaled, bytes_of
from aadp_kernels.contract import ClipRule, Geometry, GradientsNeeded, OneClient
from aadp_kernels.threads import run_on_threads

_LINE = 64  # bytes of a line of the cache
_ROWS = 16  # columns that are added up and turned at once


@jit_inline
def _line(space):
    """The address of the first line of the cache in a work space that has room for one more."""
    place = space.ctypes.data
    return place + -place % _LINE


@jit
def _sum_units(
    a, g, plan, sizes, weight, bias, largest, shrink, p, mask, clip, votes_at, per_client, each,
    dtype, sum_w, sum_b, counts, begin, end,
):  # fmt: skip
    """`clip_units` with work space of its own, of the sizes of the plan; sums begin at zero."""
    spare = _LINE // bytes_of(dtype)
    padded, turned = np.zeros(sizes[0] + spare, g.dtype), np.zeros(sizes[1] + spare, g.dtype)
    record, own = np.empty(sizes[2] + spare, g.dtype), np.empty(sizes[3] + spare, g.dtype)
    sum_w[begin:end], sum_b[begin:end], counts[begin:end] = 0, 0, 0
    scratch = np.array([_line(padded), _line(turned), _line(record), _line(own)])
    clip_units(
        a, g, plan, weight, bias, largest, shrink, p, mask, clip, votes_at, per_client, each,
        scratch, dtype, sum_w, sum_b, counts, begin, end,
    )  # fmt: skip
    # Named once more, since memory is freed behind its last name and the kernel knows addresses.
    return len(padded) + len(turned) + len(record) + len(own)


@jit
def _add_units(sum_w, plan, per_client, whole, begin, end):
    """whole [K, out, columns] = the clients' sums over their units, in order.

    In parts of some columns of a group.
    """
    inside, width = plan.out // plan.groups, plan.width
    parts = -(-plan.rows // _ROWS)
    total = np.empty(_ROWS * width, sum_w.dtype)
    for part in range(begin, end):
        k, i = part // (parts * plan.groups), part // parts % plan.groups
        low = part % parts * _ROWS
        count = min(_ROWS, plan.rows - low)
        start = (i * plan.rows + low) * width
        own = total[: count * width]
        own[:] = sum_w[k * per_client, start : start + len(own)]
        for unit in range(k * per_client + 1, (k + 1) * per_client):
            add_scaled(own, own.dtype.type(1), sum_w[unit, start : start + len(own)])
        for o in range(inside):
            for c in range(count):
                whole[k, i * inside + o, low + c] = own[c * width + o]


@jit
def _sum_parallel(given, units, joining, parts, threads, region):
    """`_sum_units` and `_add_units`, of all units and parts."""
    if region != 0:
        parallel(_sum_units, given, units, threads, region)
        parallel(_add_units, joining, parts, threads, region)
    else:
        _sum_units(*given, np.int64(0), units)
        _add_units(*joining, np.int64(0), parts)


def product_sums(
    a: Tensor, g: Tensor, geometry: Geometry, out: int, rule: ClipRule
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`RecordKernels.product_sums`.

    Args:
        a: inputs [K, B, ...], float32 or float64.
        g: output gradients [K, B, ...].
        geometry: of the layer.
        out: features of the output.
        rule: how to clip.

    Returns:
        Weight [K, out, columns], bias [K, out] and counts [K, 3], the sums in the dtype of g and
        whatever the number of threads; None if a record is too large to stay in the cache.
    """
    if not fits(geometry, out, a.dtype):
        return None
    return sums_of_rows(rows_of(a), rows_of(g), geometry, out, rule.needed, limits_of(rule))


def sums_of_rows(
    a: np.ndarray, g: np.ndarray, geometry: Geometry, out: int, needed: GradientsNeeded,
    limits: Limits,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`product_sums` of records that are rows [K * B, elements]."""
    clients, batch = limits.mask.shape
    dtype, plan = g.dtype, product_plan(geometry, out, torch_dtype(g))
    per_client, each = split_records(clients, batch)
    units = clients * per_client
    size = plan.groups * plan.rows * plan.width if needed.weight else 0
    sum_w, sum_b = (np.empty((units, n), dtype) for n in (size, out * needed.bias))
    counts = np.empty((units, 3))
    whole = torch.empty(clients, out, plan.rows if needed.weight else 0, dtype=torch_dtype(g))
    given = (
        a, g, plan, plan.sizes(), needed.weight, needed.bias, *rounding(g), needed.p,
        *limits, per_client, each, dtype, sum_w, sum_b, counts,
    )  # fmt: skip
    joining = sum_w, plan, per_client, whole.numpy()
    parts = clients * plan.groups * -(-plan.rows // _ROWS) if needed.weight else 0
    products = len(plan.base) * plan.rows * plan.width
    elements = clients * batch * (products // 8 + g.shape[1])
    threads, region = region_for(elements)
    if threads == 1 or region:
        _sum_parallel(given, units, joining, parts, threads, region)
    else:
        run_on_threads(partial(_sum_units, *given), units, elements=elements)
        _add_units(*joining, np.int64(0), parts)
    return whole, total_of(sum_b, clients), total_of(counts, clients)


def product_single(
    a: Tensor,
    g: Tensor,
    geometry: Geometry,
    out: int,
    needed: GradientsNeeded,
    one: OneClient,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`RecordKernels.product_single`."""
    if not fits(geometry, out, g.dtype):
        return None
    batch = len(g)
    limits = limits_of_one(*one, batch)
    found = sums_of_rows(rows_of(a[None]), rows_of(g[None]), geometry, out, needed, limits)
    return found[0][0], found[1][0], found[2][0]
