"""Clipped sums of products over positions, of all records on torch's threads."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu._jit import jit, jit_inline
from aadp_kernels._cpu._parallel import parallel, region_for
from aadp_kernels._cpu.backward_products import clip_units, fits, product_plan, split_records
from aadp_kernels._cpu.limits import Limits, limits_of, limits_of_one, numpy_dtype, rounding
from aadp_kernels._cpu.row_sums import add_scaled, bytes_of, rows_at
from aadp_kernels._cpu.tensor_table import address
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
    a, g, shape, plan, sizes, weight, bias, largest, shrink, p, mask, clip, votes_at, per_client,
    each, dtype, sum_w, sum_b, counts, begin, end,
):  # fmt: skip
    """`clip_units` with work space of its own, of the sizes of the plan; sums begin at zero.

    a and g are addresses of records, `shape` says how many and the elements of each.
    """
    x, y = rows_at(a, shape[0], shape[1], dtype), rows_at(g, shape[0], shape[2], dtype)
    spare = _LINE // bytes_of(dtype)
    padded, turned = np.zeros(sizes[0] + spare, y.dtype), np.zeros(sizes[1] + spare, y.dtype)
    record, own = np.empty(sizes[2] + spare, y.dtype), np.empty(sizes[3] + spare, y.dtype)
    sum_w[begin:end], sum_b[begin:end], counts[begin:end] = 0, 0, 0
    scratch = np.array([_line(padded), _line(turned), _line(record), _line(own)])
    clip_units(
        x, y, plan, weight, bias, largest, shrink, p, mask, clip, votes_at, per_client, each,
        scratch, dtype, sum_w, sum_b, counts, begin, end,
    )  # fmt: skip
    # Named once more, since memory is freed behind its last name and the kernel knows addresses.
    return len(padded) + len(turned) + len(record) + len(own)


@jit
def _add_units(sum_w, plan, per_client, whole, dtype, begin, end):
    """The clients' sums over their units, in order, as weights [K, out, columns] at `whole`.

    In parts of some columns of a group.
    """
    inside, width = plan.out // plan.groups, plan.width
    parts = -(-plan.rows // _ROWS)
    total = np.empty(_ROWS * width, sum_w.dtype)
    rows = rows_at(whole, len(sum_w) // per_client * plan.out, plan.rows, dtype)
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
                rows[k * plan.out + i * inside + o, low + c] = own[c * width + o]


@jit
def _add_rest(sum_b, seen, per_client, total, dtype, counts):
    """The same of biases, [K, out] at `total`, and of counts [K, 3]."""
    rows, counts[:] = rows_at(total, len(counts), sum_b.shape[1], dtype), 0
    for k in range(len(counts)):
        rows[k] = sum_b[k * per_client]
        for unit in range(k * per_client, (k + 1) * per_client):
            if unit > k * per_client:
                add_scaled(rows[k], rows.dtype.type(1), sum_b[unit])
            for i in range(3):
                counts[k, i] += seen[unit, i]


@jit
def _sum_parallel(given, units, joining, parts, rest, threads, region):
    """`_sum_units`, `_add_units` and `_add_rest`, of all units and parts."""
    if region != 0:
        parallel(_sum_units, given, units, threads, region)
        parallel(_add_units, joining, parts, threads, region)
    else:
        _sum_units(*given, np.int64(0), units)
        _add_units(*joining, np.int64(0), parts)
    _add_rest(*rest)


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
    return _sums(a, g, (len(a),), geometry, out, rule.needed, limits_of(rule))


def product_single(
    a: Tensor,
    g: Tensor,
    geometry: Geometry,
    out: int,
    needed: GradientsNeeded,
    one: OneClient,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`RecordKernels.product_single`."""
    return _sums(a, g, (), geometry, out, needed, limits_of_one(*one, len(g)))


def _sums(
    a: Tensor, g: Tensor, lead: tuple[int, ...], geometry: Geometry, out: int,
    needed: GradientsNeeded, limits: Limits,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """`product_sums`; `lead` is the axis of the clients, none of one client."""
    if not fits(geometry, out, g.dtype):
        return None
    plan = product_plan(geometry, out, g.dtype)
    a, g = a.resolve_neg().contiguous(), g.resolve_neg().contiguous()
    clients, batch = limits.mask.shape
    dtype, columns = numpy_dtype(g), plan.rows if needed.weight else 0
    per_client, each = split_records(clients, batch)
    units, records = clients * per_client, clients * batch
    sum_w = np.empty((units, plan.groups * columns * plan.width), dtype)
    sum_b, seen = np.empty((units, out * needed.bias), dtype), np.empty((units, 3))
    whole, total = g.new_empty((*lead, out, columns)), g.new_empty((*lead, out * needed.bias))
    counts = np.empty((clients, 3))
    sizes = (records, *(t.numel() // max(1, records) for t in (a, g)))
    given = (
        address(a), address(g), sizes, plan, plan.sizes(), needed.weight, needed.bias,
        *rounding(g.dtype), needed.p, *limits, per_client, each, dtype, sum_w, sum_b, seen,
    )  # fmt: skip
    joining = sum_w, plan, per_client, address(whole), dtype
    rest = sum_b, seen, per_client, address(total), dtype, counts
    parts = clients * plan.groups * -(-columns // _ROWS)
    elements = records * (len(plan.base) * plan.rows * plan.width // 8) + g.numel()
    threads, region = region_for(elements)
    if threads == 1 or region:
        _sum_parallel(given, units, joining, parts, rest, threads, region)
    else:
        run_on_threads(partial(_sum_units, *given), units, elements=elements)
        _add_units(*joining, np.int64(0), parts)
        _add_rest(*rest)
    return whole, total, torch.from_numpy(counts if lead else counts[0])
