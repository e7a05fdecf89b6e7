"""The two kernels of `clip_sum_noise`: norms into clip factors, and clipped sums with noise.

All arithmetic on gradients is float64 and in an order that depends on nothing but the layout.
"""

# Triton's constexpr arguments, ranges and launch options have no types that fit.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from aadp_kernels import grid
from aadp_kernels._triton.noise import load_source, part_index, tile_noise, to_element

ROWS_AHEAD = tl.constexpr(4)  # records whose loads are in flight together

_EPS = tl.constexpr(2.0**-52)
_MAX_WEIGHT = tl.constexpr(grid.MAX_WEIGHT)
_LIMIT = tl.constexpr(float(grid.LIMIT))
_SUM_LIMIT = tl.constexpr(grid.SUM_LIMIT)
_RECORDS_AT_ONCE = tl.constexpr(grid.RECORDS_AT_ONCE)
_SMALLEST = tl.constexpr(2.0**-1074)
_NORMAL = tl.constexpr(2.0**-1022)
TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def tile_size(form: str, chacha: bool) -> int:
    """Elements of a program of the second launch, for four warps."""
    return 2048 if form == "fast" and chacha else 1024


def norm_constants(dtype: torch.dtype) -> dict[str, Any]:
    """Constants of the first launch: a block is one 128-bit load of every thread of four warps."""
    block = 4 * 32 * 16 // dtype.itemsize
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "ITEMSIZE": dtype.itemsize,
        "BLOCK": block,
        "LOG2": block.bit_length() - 1,
    }


@triton.jit
def _wide(x):
    """Any floating dtype to float64."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32).to(tl.float64)


@triton.jit
def _ordered_sum(x, LOG2: tl.constexpr):
    """Sum of a float64 [2^LOG2] along a fixed tree: the same bits for every layout of threads."""
    for level in tl.static_range(1, LOG2 + 1):
        low, high = tl.split(tl.reshape(x, [1 << (LOG2 - level), 2]))
        x = low + high
    return tl.sum(x)


@triton.jit
def _piece_sums(pointer, count, NEED1: tl.constexpr, NEED2: tl.constexpr, BLOCK: tl.constexpr):
    """Lanes of the sums of |x| and x^2 over `count` neighbours."""
    lane = tl.arange(0, BLOCK)
    acc1 = tl.zeros([BLOCK], tl.float64)
    acc2 = tl.zeros([BLOCK], tl.float64)
    full = count // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        x = _wide(tl.load(pointer + start + lane))
        if NEED1:
            acc1 += tl.abs(x)
        if NEED2:
            acc2 += x * x
    if full < count:
        x = _wide(tl.load(pointer + full + lane, full + lane < count, other=0.0))
        if NEED1:
            acc1 += tl.abs(x)
        if NEED2:
            acc2 += x * x
    return acc1, acc2


@triton.jit
def _finish_record(
    slots_ptr, factors_ptr, norms_ptr, counts_ptr, clip_ptr, votes_ptr, quanta_ptr, record, batch,
    layer, num_layers, first, pieces, dim, live, P: tl.constexpr, NEED1: tl.constexpr,
    NEED2: tl.constexpr, VOTES: tl.constexpr, GRID: tl.constexpr,
):  # fmt: skip
    """Slots of a (record, layer) into its norm, factor, vote and counts (`clip_factors`)."""
    lane = tl.arange(0, 128)
    acc1 = tl.zeros([128], tl.float64)
    acc2 = tl.zeros([128], tl.float64)
    for start in range(0, pieces, 128):
        at = slots_ptr + 2 * (first + start + lane)
        there = start + lane < pieces
        if NEED1:
            acc1 += tl.load(at, there, other=0.0)
        if NEED2:
            acc2 += tl.load(at + 1, there, other=0.0)
    norm1 = _ordered_sum(acc1, 7)
    norm = norm1
    if P == 2:
        norm = tl.sqrt(_ordered_sum(acc2, 7))
    clip = tl.load(clip_ptr + layer)
    finite = norm < float("inf")
    counted = finite & live
    bound = norm * (1.0 + (dim + 16).to(tl.float64) * _EPS)
    clipped = (bound > clip) & counted
    room = tl.maximum(clip - dim.to(tl.float64) * _SMALLEST, 0.0)
    factor = tl.where(clipped, room / tl.where(clipped, bound * (1.0 + _EPS), 1.0), 1.0)
    # A subnormal factor has lost the digits that the bound counts on.
    factor = tl.where(counted & (clip >= 0.0) & (factor >= _NORMAL), factor, 0.0)
    if GRID:
        quantum = tl.load(quanta_ptr + layer)
        step = tl.where(quantum > 0.0, quantum, 1.0)
        factor = tl.where(quantum > 0.0, tl.minimum(factor / step, _MAX_WEIGHT), 0.0)
    tl.store(factors_ptr + layer * batch + record, factor)
    if NEED1:
        tl.store(norms_ptr + record * num_layers + layer, norm1)
    if VOTES:
        limit = tl.load(votes_ptr + layer)
        ballot = tl.where(norm1 <= limit, 1, -1).to(tl.int64)
        tl.atomic_add(counts_ptr + layer, ballot, mask=counted & (limit == limit))
    one = tl.full([], 1, tl.int64)
    tl.atomic_add(counts_ptr + num_layers + layer, one, mask=clipped)
    tl.atomic_add(counts_ptr + 2 * num_layers + layer, one, mask=live & (finite == 0))


@triton.jit(
    do_not_specialize=["batch", "num_slots", "num_layers"],
    do_not_specialize_on_alignment=["mask_ptr", "clip_ptr", "votes_ptr", "quanta_ptr"],
)
def norm_pieces(
    pieces_ptr, layers_ptr, tensors_ptr, mask_ptr, clip_ptr, votes_ptr, quanta_ptr, slots_ptr,
    factors_ptr, norms_ptr, counts_ptr, batch, num_slots, num_layers,
    DTYPE: tl.constexpr, ITEMSIZE: tl.constexpr, P: tl.constexpr, VOTES: tl.constexpr,
    GRID: tl.constexpr, BLOCK: tl.constexpr, LOG2: tl.constexpr,
):  # fmt: skip
    """factors[l, b] = min(1, C_l / ||x[b, l]||_P), certified, 0 for records that do not count.

    GRID: divided by the layer's quantum.

    Grid: [pieces * B]; sums are float64. pieces: (tensor, start, count, layer, slot) each; layers:
    (first slot, slots, elements) each; tensors: (address of x, record stride) each; counts: votes,
    clipped, non-finite [3, L], then a counter of arrivals for each (record, layer).
    """
    NEED1: tl.constexpr = P == 1 or VOTES
    NEED2: tl.constexpr = P == 2
    program = tl.program_id(0)
    piece = pieces_ptr + 5 * (program // batch).to(tl.int64)
    record = (program % batch).to(tl.int64)
    tensor, start, count = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2).to(tl.int32)
    layer, slot = tl.load(piece + 3), tl.load(piece + 4)
    address, stride = tl.load(tensors_ptr + 4 * tensor), tl.load(tensors_ptr + 4 * tensor + 1)
    address += (record * stride + start) * ITEMSIZE
    pointer = address.to(tl.pointer_type(DTYPE))
    if address % 16 == 0:
        acc1, acc2 = _piece_sums(tl.multiple_of(pointer, 16), count, NEED1, NEED2, BLOCK)
    else:
        acc1, acc2 = _piece_sums(pointer, count, NEED1, NEED2, BLOCK)
    slots_ptr += 2 * record * num_slots
    if NEED1:
        tl.store(slots_ptr + 2 * slot, _ordered_sum(acc1, LOG2))
    if NEED2:
        tl.store(slots_ptr + 2 * slot + 1, _ordered_sum(acc2, LOG2))
    tl.debug_barrier()
    arrivals = counts_ptr + 3 * num_layers + layer * batch + record
    first, pieces, dim = (
        tl.load(layers_ptr + 3 * layer), tl.load(layers_ptr + 3 * layer + 1),
        tl.load(layers_ptr + 3 * layer + 2),
    )  # fmt: skip
    arrived = tl.atomic_add(arrivals, tl.full([], 1, tl.int64), sem="acq_rel", scope="gpu")
    if arrived == pieces - 1:
        live = tl.load(mask_ptr + record) != 0
        _finish_record(
            slots_ptr, factors_ptr, norms_ptr, counts_ptr, clip_ptr, votes_ptr, quanta_ptr,
            record, batch, layer, num_layers, first, pieces, dim, live, P, NEED1, NEED2, VOTES,
            GRID,
        )  # fmt: skip


@triton.jit
def _add_rows(
    acc, pointer, stride, factors, begin, end, inside, MASKED: tl.constexpr, GRID: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """acc + sum over records of factor * x, in order; records of factor zero are not read.

    GRID: every product is cut to an integer, toward zero, as the specification does.
    """
    for start in range(begin, end, ROWS):
        for ahead in tl.static_range(ROWS):
            factor = tl.load(factors + start + ahead)
            # An integer first: the interpreter broadcasts a comparison in the dtype of its sides.
            there = tl.broadcast_to((factor != 0.0).to(tl.int32), inside.shape) != 0
            if MASKED:
                there = inside & there
            value = _wide(tl.load(pointer + (start + ahead) * stride, there, other=0.0)) * factor
            if GRID:
                acc += tl.minimum(tl.maximum(value, -_LIMIT), _LIMIT).to(tl.int64)
            else:
                acc += value
    return acc


@triton.jit
def _noisy(value, noise, scale):
    """value + scale * noise; NaN for a scale that is none, every bit kept where it is zero."""
    good = (scale >= 0.0) & (scale < float("inf"))
    noisy = tl.where(good, value + noise.to(tl.float64) * scale, float("nan"))
    return tl.where(scale == 0.0, value, noisy)


@triton.jit
def _sum_part(
    source, stride, sums, factors, batch, inside, MASKED: tl.constexpr, FRESH: tl.constexpr,
    GRID: tl.constexpr,
):  # fmt: skip
    """The clipped sum of one part of a tile, on top of the running one."""
    acc = tl.zeros(inside.shape, tl.int64 if GRID else tl.float64)
    if not FRESH:
        acc = tl.load(sums, inside if MASKED else None)
    together = batch // ROWS_AHEAD * ROWS_AHEAD
    if GRID:
        for begin in range(together * 0, together, _RECORDS_AT_ONCE):
            acc = tl.minimum(tl.maximum(acc, -_SUM_LIMIT), _SUM_LIMIT)
            end = tl.minimum(begin + _RECORDS_AT_ONCE, together)
            acc = _add_rows(
                acc, source, stride, factors, begin, end, inside, MASKED, True, ROWS_AHEAD
            )
    else:
        acc = _add_rows(
            acc, source, stride, factors, together * 0, together, inside, MASKED, False, ROWS_AHEAD
        )
    return _add_rows(acc, source, stride, factors, together, batch, inside, MASKED, GRID, 1)


@triton.jit
def _store_part(sums, target, acc, mask, LAST: tl.constexpr):
    """The running sum, or the result in its dtype."""
    if LAST:
        tl.store(target, to_element(acc, target.dtype.element_ty), mask)
    else:
        tl.store(sums, acc, mask)


@triton.jit(
    do_not_specialize=["batch", "bands"],
    do_not_specialize_on_alignment=["factors_ptr", "scale_ptr", "step_ptr", "client_ptr"],
)
def sum_tiles(
    tiles_ptr, statics_ptr, tensors_ptr, factors_ptr, scale_ptr, step_ptr, client_ptr, key_ptr,
    batch, coefficients_ptr, bands, DTYPE: tl.constexpr, ITEMSIZE: tl.constexpr,
    FRESH: tl.constexpr, LAST: tl.constexpr, GRID: tl.constexpr, NOISE: tl.constexpr,
    TILE: tl.constexpr, GAUSSIAN: tl.constexpr, FORM: tl.constexpr, CHACHA: tl.constexpr,
    ROUNDS: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out = sums + sum_b factors[l, b] * x[b] + scale_l * noise, elementwise; accumulates float64.

    GRID: sums + sum_b trunc(factors[l, b] * x[b]), int64 and without noise.
    Grid: [tiles]. A tile is TILE elements of a layer from a multiple of TILE on, as far as one
    tensor has them. tiles: (tensor, first element) each; statics: (layer, offset, size) of each
    tensor; tensors: (address of x, record stride, address of sums, address of out) each.
    """
    tile = tiles_ptr + 2 * tl.program_id(0).to(tl.int64)
    tensor, first = tl.load(tile), tl.load(tile + 1)
    static = statics_ptr + 3 * tensor
    layer, offset, size = tl.load(static), tl.load(static + 1), tl.load(static + 2)
    tensors_ptr += 4 * tensor
    stride = tl.load(tensors_ptr + 1)
    address = tl.load(tensors_ptr) + (first - offset) * ITEMSIZE
    source = address.to(tl.pointer_type(DTYPE))
    sums_address = tl.load(tensors_ptr + 2) + (first - offset) * 8
    sums = sums_address.to(tl.pointer_type(tl.int64 if GRID else tl.float64))
    target_address = tl.load(tensors_ptr + 3) + (first - offset) * ITEMSIZE
    target = target_address.to(tl.pointer_type(DTYPE))
    factors, batch = factors_ptr + layer * batch, batch.to(tl.int64)
    scale = tl.load(scale_ptr + layer)
    aligned = (address | (stride * ITEMSIZE) | sums_address | target_address) % 16 == 0
    whole = aligned & (first >= offset) & (first + TILE <= offset + size)
    if NOISE:
        drawn_from = load_source(step_ptr, key_ptr, coefficients_ptr, bands, CHACHA)
        client = tl.load(client_ptr).to(tl.uint32)
        stream = layer.to(tl.uint32)
    if NOISE and PARTS > 1:
        noise = tile_noise(
            first, drawn_from, client, stream, TILE, GAUSSIAN, FORM, CHACHA, ROUNDS, BLOCKS, PARTS
        )
    for part in tl.static_range(PARTS):
        index = part_index(part, TILE, FORM, CHACHA, BLOCKS)
        inside = (first + index >= offset) & (first + index < offset + size)
        if whole:
            acc = _sum_part(
                tl.multiple_of(source, 16) + index, tl.multiple_of(stride, 16 // ITEMSIZE),
                tl.multiple_of(sums, 16) + index, factors, batch, inside, False, FRESH,
                GRID,
            )  # fmt: skip
        else:
            acc = _sum_part(
                source + index, stride, sums + index, factors, batch, inside, True, FRESH, GRID
            )
        if NOISE and PARTS == 1:
            noise = tile_noise(
                first, drawn_from, client, stream, TILE, GAUSSIAN, FORM, CHACHA, ROUNDS, BLOCKS,
                PARTS,
            )  # fmt: skip
        if NOISE:
            acc = _noisy(acc, noise[part], scale)
        elif LAST:
            acc = tl.where(scale == 0.0, acc, float("nan"))
        if whole:
            _store_part(
                tl.multiple_of(sums, 16) + index, tl.multiple_of(target, 16) + index, acc, None,
                LAST,
            )  # fmt: skip
        else:
            _store_part(sums + index, target + index, acc, inside, LAST)
