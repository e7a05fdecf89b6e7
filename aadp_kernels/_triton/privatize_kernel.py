"""The kernel of `privatize_`: norms, certified clipping and noise of all layers in one launch."""

# Triton's constexpr arguments, ranges and launch options have no types that fit.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aadp_kernels._triton.grid import (
    grid_noise,
    quantise,
    quantum,
    quantum_weight,
    release,
)
from aadp_kernels._triton.noise import load_source, tile_noise
from aadp_kernels._triton.tile_access import (
    AGAIN,
    LAST,
    difference,
    load_pair,
    store,
    tile_index,
)

_NORMAL = tl.constexpr(torch.finfo(torch.float64).tiny)


@triton.jit
def _add_tile(
    value, sum1, sum2, P: tl.constexpr,
):  # fmt: skip
    """Sums of |value| and value^2, the neighbours of a row in the dtype of `value`."""
    sum1 += tl.sum(tl.abs(value), axis=1).to(tl.float64)
    if P == 2:
        wide = value.to(tl.float64)
        sum2 += tl.sum(wide * wide, axis=1)
    return sum1, sum2


@triton.jit
def _ordered_sum(partials, begin, end):
    """Sum of partials[begin:end] in an order that depends on begin and end alone."""
    lane = tl.arange(0, 512)
    total = tl.zeros([512], tl.float64)
    at = begin
    while at < end:
        total += tl.load(partials + at + lane, mask=at + lane < end, other=0.0, volatile=True)
        at += 512
    return tl.sum(total, axis=0)


@triton.jit
def _finish_unit(
    unit, row, layer, total1, total2, layers, clip, clip_stride, scale, scale_stride, votes_at,
    votes_stride, norm1_out, votes_out, clipped_out, nonfinite_out, P: tl.constexpr,
    FORM: tl.constexpr,
):  # fmt: skip
    """Statistics of a unit, and its factor in float64: NaN for a unit that is not finite."""
    norm = tl.sqrt(total2) if P == 2 else total1
    finite = (norm < float("inf")) & (total1 < float("inf"))
    bound = norm * tl.load(layers + layer * 5)
    # What is cut to integers is rounded in float64, whatever the dtype of the tensors.
    rounding = layers + layer * 5 + 1
    if FORM == "grid":
        rounding += 2 * (tl.load(scale + row * scale_stride + layer) != 0).to(tl.int32)
    limit = tl.load(clip + row * clip_stride + layer)
    valid = limit >= 0
    limit = tl.where(valid, limit, 0.0)
    clipped = (bound > limit) & finite
    room = limit - tl.load(rounding + 1)
    room = tl.where(room > 0, room, 0.0)
    divisor = tl.where(clipped, bound * tl.load(rounding), 1.0)
    factor = tl.where(clipped, room / divisor, 1.0)
    # A subnormal factor has lost the digits that the bound counts on.
    factor = tl.where(valid & (factor >= _NORMAL), factor, 0.0)
    vote = 0.0
    if votes_at is not None:
        at = tl.load(votes_at + row * votes_stride + layer)
        vote = tl.where(total1 <= at, 0.5, -0.5)
        vote = tl.where(finite & (at == at), vote, 0.0)
    tl.store(norm1_out + unit, total1)
    tl.store(votes_out + unit, vote)
    tl.store(clipped_out + unit, clipped.to(tl.int64))
    tl.store(nonfinite_out + unit, 1 - finite.to(tl.int64))
    return tl.where(finite, factor, float("nan"))


@triton.jit
def _round_down(factor, DTYPE: tl.constexpr):
    """The largest number of `DTYPE`, float32 or float64, that is not above `factor` >= 0."""
    near = factor.to(DTYPE)
    if DTYPE.primitive_bitwidth == 32:
        bits = near.to(tl.int32, bitcast=True) - (near.to(tl.float64) > factor).to(tl.int32)
        near = bits.to(tl.float32, bitcast=True)
    return near


@triton.jit
def _apply_tile(
    x, reference, out, shift, shift0, element, low, high, factor, scale, drawn_from, client, layer,
    thresholds, FULL: tl.constexpr, NOISY: tl.constexpr, X: tl.constexpr, REFERENCE: tl.constexpr,
    OUT: tl.constexpr, DTYPE: tl.constexpr, TILE: tl.constexpr, GAUSSIAN: tl.constexpr,
    FORM: tl.constexpr, CHACHA: tl.constexpr, ROUNDS: tl.constexpr, BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """out = (x - reference) * factor + scale * noise of a tile; no product if the factor is NaN.

    In the grid form `factor` turns elements into quanta and `scale` is the quantum.
    """
    # The loads come first: they are under way while the noise is drawn.
    loaded = ()
    for part in tl.static_range(PARTS):
        index = tile_index(part, TILE, GAUSSIAN, FORM, CHACHA, BLOCKS)
        pair = load_pair(
            x, shift + element, reference, shift0 + element, index, low, high, FULL, X, REFERENCE,
            LAST,
        )  # fmt: skip
        loaded += (pair,)
    if NOISY and FORM == "grid":
        step, key = drawn_from
        noise = (
            grid_noise(
                element, step, client, layer, key, thresholds, TILE, GAUSSIAN, CHACHA, ROUNDS
            ),
        )
    elif NOISY:
        noise = tile_noise(
            element, drawn_from, client, layer, TILE, GAUSSIAN, FORM, CHACHA, ROUNDS, BLOCKS, PARTS
        )
    for part in tl.static_range(PARTS):
        index = tile_index(part, TILE, GAUSSIAN, FORM, CHACHA, BLOCKS)
        value = difference(loaded[part], REFERENCE, DTYPE)
        if NOISY and FORM == "grid":
            value = release(quantise(value, factor), noise[part], scale, GAUSSIAN)
        elif NOISY:
            value = tl.where(factor == factor, value * factor, 0.0) + noise[part].to(DTYPE) * scale
        else:
            # A scale that no noise was drawn for must not pass for privacy.
            value = tl.where(factor == factor, value * factor, 0.0)
            value = tl.where(scale == 0, value, float("nan"))
        store(out, shift + element, index, low, high, value, FULL, OUT)


@triton.jit
def _apply_chunk(
    x, reference, out, shift, shift0, first, low, high, whole, factor, scale, drawn_from, client,
    layer, thresholds, NOISY: tl.constexpr, X: tl.constexpr, REFERENCE: tl.constexpr,
    OUT: tl.constexpr, DTYPE: tl.constexpr, TILE: tl.constexpr, GAUSSIAN: tl.constexpr,
    FORM: tl.constexpr, CHACHA: tl.constexpr, ROUNDS: tl.constexpr, BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Whole tiles without masks (128-bit accesses), then the rest with them."""
    element = first
    while element < whole:
        _apply_tile(
            x, reference, out, shift, shift0, element, 0, 0, factor, scale, drawn_from, client,
            layer, thresholds, True, NOISY, X, REFERENCE, OUT, DTYPE, TILE, GAUSSIAN, FORM, CHACHA,
            ROUNDS, BLOCKS, PARTS,
        )  # fmt: skip
        element += TILE
    while element < high:
        begin = tl.maximum(low - element, 0).to(tl.int32)
        end = tl.minimum(high - element, TILE).to(tl.int32)
        _apply_tile(
            x, reference, out, shift, shift0, element, begin, end, factor, scale, drawn_from,
            client, layer, thresholds, False, NOISY, X, REFERENCE, OUT, DTYPE, TILE, GAUSSIAN, FORM,
            CHACHA, ROUNDS, BLOCKS, PARTS,
        )  # fmt: skip
        element += TILE


@triton.jit
def _write_chunk(
    x, reference, out, shift, shift0, first, low, high, whole, factor, amount, client, layer,
    step_pointer, key_pointer, coefficients, bands, thresholds, NOISY: tl.constexpr,
    X: tl.constexpr, REFERENCE: tl.constexpr, OUT: tl.constexpr, DTYPE: tl.constexpr,
    TILE: tl.constexpr, GAUSSIAN: tl.constexpr, FORM: tl.constexpr, CHACHA: tl.constexpr,
    ROUNDS: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`_apply_chunk` of a float64 factor and noise scale; a scale that is none gives NaN."""
    amount = tl.where((amount >= 0) & (amount < float("inf")), amount, float("nan"))
    weight = _round_down(factor, DTYPE)
    unit_scale = amount.to(DTYPE)
    if FORM == "grid":
        unit_scale = quantum(amount, GAUSSIAN)
        if amount != 0:
            weight = quantum_weight(factor, unit_scale)
    drawn_from = None
    if NOISY:
        drawn_from = load_source(step_pointer, key_pointer, coefficients, bands, CHACHA)
    if NOISY and amount != 0:
        _apply_chunk(
            x, reference, out, shift, shift0, first, low, high, whole, weight, unit_scale,
            drawn_from, client, layer, thresholds, True, X, REFERENCE, OUT, DTYPE, TILE, GAUSSIAN,
            FORM, CHACHA, ROUNDS, BLOCKS, PARTS,
        )  # fmt: skip
    else:
        _apply_chunk(
            x, reference, out, shift, shift0, first, low, high, whole, weight, amount, drawn_from,
            client, layer, thresholds, False, X, REFERENCE, OUT, DTYPE, TILE, GAUSSIAN, FORM,
            CHACHA, ROUNDS, BLOCKS, PARTS,
        )  # fmt: skip


@triton.jit
def _chunk_sums(
    x, reference, shift, shift0, first, low, high, whole, X: tl.constexpr,
    REFERENCE: tl.constexpr, DTYPE: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums of |x - reference| and, for P = 2, of its square over a chunk."""
    index = tl.arange(0, TILE // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    sum1 = tl.zeros([TILE // WIDTH], tl.float64)
    sum2 = tl.zeros([TILE // WIDTH], tl.float64)
    element = first
    while element < whole:
        pair = load_pair(
            x, shift + element, reference, shift0 + element, index, 0, 0, True, X, REFERENCE,
            AGAIN,
        )  # fmt: skip
        sum1, sum2 = _add_tile(difference(pair, REFERENCE, DTYPE), sum1, sum2, P)
        element += TILE
    while element < high:
        pair = load_pair(
            x, shift + element, reference, shift0 + element, index,
            tl.maximum(low - element, 0).to(tl.int32),
            tl.minimum(high - element, TILE).to(tl.int32), False, X, REFERENCE, AGAIN,
        )  # fmt: skip
        sum1, sum2 = _add_tile(difference(pair, REFERENCE, DTYPE), sum1, sum2, P)
        element += TILE
    return tl.sum(sum1, axis=0), tl.sum(sum2, axis=0)


@triton.jit
def _unit_sums(
    total1, total2, chunk, unit, begin, end, num_chunks, partials, done, P: tl.constexpr
):
    """Sums of a unit, and whether this program is the last of it to add some.

    The count orders memory: what others stored before they counted is seen by who counts last.
    """
    last = end - begin == 1
    if end - begin > 1:
        tl.store(partials + chunk, total1)
        if P == 2:
            tl.store(partials + num_chunks + chunk, total2)
        last = tl.atomic_add(done + unit, 1, sem="acq_rel") == end - begin - 1
        if last:
            total1 = _ordered_sum(partials, begin, end)
            if P == 2:
                total2 = _ordered_sum(partials + num_chunks, begin, end)
    return total1, total2, last


@triton.jit
def _publish_factor(published, unit, factor):
    """Factor and notice in one word that zero stands for nothing in: the complement of its bits.

    The complement is zero for a NaN of another kind than `_finish_unit` gives.
    """
    tl.atomic_xchg(published + unit, ~factor.to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit
def _await_factor(published, unit):
    """The factor of a unit that other programs sum; its tickets were taken before this one."""
    word = tl.load(published + unit, volatile=True)
    while word == 0:
        word = tl.load(published + unit, volatile=True)
    return (~word).to(tl.float64, bitcast=True)


@triton.jit
def _load_chunk(table):
    """Tensor, shifts, bounds and unit of a row of `LaunchPlan.chunks`."""
    tensor, shift, first = tl.load(table), tl.load(table + 1), tl.load(table + 2)
    low, high, whole = tl.load(table + 3), tl.load(table + 4), tl.load(table + 5)
    unit = tl.load(table + 6).to(tl.int32)  # fewer than `MAX_CHUNKS`
    return tensor, shift, tl.load(table + 7), first, low, high, whole, unit


@triton.jit
def _take(counter, LANES: tl.constexpr):
    """Asks for the next ticket, which one lane will have; nobody waits for it here."""
    lane = tl.arange(0, LANES)
    return tl.atomic_add(counter + lane * 0, 1, mask=lane == 0, sem="relaxed")


@triton.jit
def _taken(lanes, LANES: tl.constexpr):
    """The ticket that was asked for, in all lanes."""
    return tl.sum(tl.where(tl.arange(0, LANES) == 0, lanes, 0), axis=0)


@triton.jit(
    do_not_specialize=[
        "ticket_count", "clip_stride", "scale_stride", "votes_stride", "num_layers", "num_tensors",
        "num_chunks", "bands",
    ],
    # Views of what training keeps: another alignment must not compile another kernel.
    do_not_specialize_on_alignment=["clip", "scale", "votes_at", "step_pointer", "clients"],
)  # fmt: skip
def privatize_kernel(
    tickets, ticket_count, counter, chunks, units, layers, addresses, done, published, partials,
    clip, clip_stride, scale, scale_stride, votes_at, votes_stride, step_pointer, clients,
    key_pointer, norm1_out, votes_out, clipped_out, nonfinite_out, num_layers, num_tensors,
    num_chunks, thresholds, coefficients, bands,
    X: tl.constexpr, REFERENCE: tl.constexpr, OUT: tl.constexpr, DTYPE: tl.constexpr,
    P: tl.constexpr, NOISY: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
    GAUSSIAN: tl.constexpr, FORM: tl.constexpr, CHACHA: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCKS: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """out = (x - reference) * factor(norm) + scale * noise, for every unit of a plan.

    Persistent programs take tickets, of which `launch_plan` says the order and why no program waits
    for ever. A norm ticket adds |x| (and x^2) of its chunk into a slot of its own, in the dtype
    `DTYPE` over `WIDTH` neighbours and in float64 beyond. The program that ends a unit adds its
    slots in order and publishes the factor. Apply tickets wait for that factor. Products and sums
    are of the dtype `DTYPE`. A program asks for its next ticket before it works on the one it has,
    so that it need not wait for the answer.

    The factor is published and read without an order of memory: it is all that is read of another
    program. An element is written after it was read for the norm, since what is written depends on
    a factor that depends on what was read.
    """
    ticket = _taken(_take(counter, LANES), LANES)
    while ticket < ticket_count:
        ahead = _take(counter, LANES)
        code = tl.load(tickets + ticket)
        chunk = (code >> 2).to(tl.int64)
        tensor, shift, shift0, first, low, high, whole, unit = _load_chunk(chunks + chunk * 8)
        row = (unit // num_layers).to(tl.int64)
        layer = unit % num_layers
        begin = tl.load(units + unit * 2)
        end = tl.load(units + unit * 2 + 1)
        x = tl.load(addresses + tensor)
        out = tl.load(addresses + num_tensors + tensor)
        reference = x
        if REFERENCE is not None:
            reference = tl.load(addresses + 2 * num_tensors + tensor)
        # The only chunk of its unit, in one launch: nobody else has or wants its factor.
        only_chunk = (code & 3) == 3
        factor = tl.full([], 0.0, tl.float64)
        if code & 1:
            total1, total2 = _chunk_sums(
                x, reference, shift, shift0, first, low, high, whole, X, REFERENCE, DTYPE, P, TILE,
                WIDTH,
            )  # fmt: skip
            total1, total2, last = _unit_sums(
                total1, total2, chunk, unit, begin, end, num_chunks, partials, done, P
            )
            if last:
                factor = _finish_unit(
                    unit, row, layer, total1, total2, layers, clip, clip_stride, scale,
                    scale_stride, votes_at, votes_stride, norm1_out, votes_out, clipped_out,
                    nonfinite_out, P, FORM,
                )  # fmt: skip
                if not only_chunk:
                    _publish_factor(published, unit, factor)
        if code & 2:
            if not only_chunk:
                factor = _await_factor(published, unit)
            amount = tl.load(scale + row * scale_stride + layer)
            client = tl.load(clients + row).to(tl.uint32)
            _write_chunk(
                x, reference, out, shift, shift0, first, low, high, whole, factor, amount, client,
                layer.to(tl.uint32), step_pointer, key_pointer, coefficients, bands, thresholds,
                NOISY, X, REFERENCE, OUT, DTYPE, TILE, GAUSSIAN, FORM, CHACHA, ROUNDS, BLOCKS,
                PARTS,
            )  # fmt: skip
        ticket = _taken(ahead, LANES)
