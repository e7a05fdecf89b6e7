"""Standard noise of the forms fast and wide as Triton device functions, and its launch.

A program draws the noise of a *tile*, `TILE` consecutive elements of one layer that begin at a
multiple of `TILE`. A tile comes as one part, or as four for ChaCha in the fast form, each a matrix
[rows, width] whose rows are runs of consecutive elements that one thread holds: `part_index` says
which. So every word is made where it is used and memory is read and written in 128-bit pieces.

`BLOCKS` is the number of consecutive Philox blocks in a row. The words, their addresses and what is
made of them are those of `addresses`.

Noise is drawn from a step and a key, or from tables of several (`load_source`), whose noise is
added in registers.
"""

# Triton's constexpr arguments, ranges and launch options have no types that fit.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aadp_kernels._triton._device import MAX_ROWS, launch, slices, source_tensors
from aadp_kernels._triton.fast_noise import INTERPRET, fast_chacha, fast_philox
from aadp_kernels._triton.rng import chacha, load_key
from aadp_kernels._triton.wide_noise import wide_pair
from aadp_kernels._triton.word_rows import join_columns, philox_rows, split_columns
from aadp_kernels.addresses import DOMAINS, LAYER_BITS, rounds_of
from aadp_kernels.contract import Noise, Segment

TILE = 1024  # of `noise_kernel`

_DOMAIN = tl.constexpr(1 << LAYER_BITS)
_GAUSSIAN, _LAPLACE = tl.constexpr(DOMAINS["gaussian"]), tl.constexpr(DOMAINS["laplace"])


def parts(form: str, chacha: bool) -> int:
    """Parts of a tile."""
    return 4 if form == "fast" and chacha else 1


def blocks_per_row(form: str, chacha: bool, itemsize: int) -> int:
    """Philox blocks in a row so that a row of the tensor is 128 bits, or 1 for ChaCha."""
    if chacha:
        return 1
    return max(1, 16 // itemsize // (4 if form == "fast" else 2))


@triton.jit
def part_index(part: tl.constexpr, TILE: tl.constexpr, FORM: tl.constexpr, CHACHA: tl.constexpr,
               BLOCKS: tl.constexpr):  # fmt: skip
    """Elements of a part relative to the first of its tile: int32 [rows, width]."""
    if CHACHA and FORM == "fast":
        block = tl.arange(0, TILE // 16)
        start = (block // 32) * 512 + (block % 32) * 4 + part * 128
        index = start[:, None] + tl.arange(0, 4)[None, :]
    else:
        width: tl.constexpr = 8 if CHACHA else (4 if FORM == "fast" else 2) * BLOCKS
        index = tl.arange(0, TILE // width)[:, None] * width + tl.arange(0, width)[None, :]
    return index


@triton.jit
def load_source(step_pointer, key_pointer, coefficients, bands, CHACHA: tl.constexpr):
    """What `tile_noise` draws from, of the tensors of `source_tensors`.

    (step, key), loaded once a program, or (steps, keys, coefficients, bands), which stay in memory.
    """
    if coefficients is None:
        key = load_key(key_pointer, CHACHA)
        return tl.load(step_pointer).to(tl.uint32), key
    else:
        return step_pointer, key_pointer, coefficients, bands


@triton.jit
def tile_noise(
    first, drawn_from, client, layer, TILE: tl.constexpr, GAUSSIAN: tl.constexpr,
    FORM: tl.constexpr, CHACHA: tl.constexpr, ROUNDS: tl.constexpr, BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Noise of scale one of the elements first .. first + TILE - 1 of a layer.

    Args:
        first: int64, a multiple of TILE (power of two; for ChaCha in the fast form >= 512).
        drawn_from: From `load_source`.
        client, layer: uint32 scalars.

    Returns:
        A tuple of parts [rows, width], float32 (fast) or float64 (wide), as `part_index` orders.
    """
    if len(drawn_from) == 2:
        step, key = drawn_from
        return _one_step(
            first, step, client, layer, key, TILE, GAUSSIAN, FORM, CHACHA, ROUNDS, BLOCKS, None
        )
    else:
        return _several_steps(
            first, drawn_from, client, layer, TILE, GAUSSIAN, FORM, CHACHA, ROUNDS, BLOCKS, PARTS
        )


@triton.jit
def _several_steps(
    first, tables, client, layer, TILE: tl.constexpr, GAUSSIAN: tl.constexpr, FORM: tl.constexpr,
    CHACHA: tl.constexpr, ROUNDS: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`tile_noise` of several steps: coefficients times noise, added in order.

    Added up are columns of parts, vectors: Triton would carry matrices through a loop in a layout
    that costs exchanges between threads in every turn.
    """
    steps, keys, coefficients, bands = tables
    kind: tl.constexpr = tl.float32 if FORM == "fast" else tl.float64
    shape: tl.constexpr = part_index(0, TILE, FORM, CHACHA, BLOCKS).shape
    # Negative zero plus z is z, whatever its sign: the first coefficient is one.
    total = ()
    for _ in tl.static_range(PARTS * shape[1]):
        total += (tl.full([shape[0]], -0.0, kind),)
    for term in range(bands):
        key = load_key(keys + term * (8 if CHACHA else 2), CHACHA)
        step, factor = tl.load(steps + term).to(tl.uint32), tl.load(coefficients + term).to(kind)
        columns = ()
        for block in tl.static_range(BLOCKS):
            drawn = _one_step(
                first, step, client, layer, key, TILE, GAUSSIAN, FORM, CHACHA, ROUNDS, BLOCKS, block
            )
            for part in tl.static_range(PARTS):
                columns += split_columns(drawn[part])
        added = ()
        for i in tl.static_range(PARTS * shape[1]):
            added += (total[i] + columns[i] * factor,)
        total = added
    parts = ()
    for part in tl.static_range(PARTS):
        parts += (join_columns(total[part * shape[1] : (part + 1) * shape[1]]),)
    return parts


@triton.jit
def _one_step(
    first, step, client, layer, key, TILE: tl.constexpr, GAUSSIAN: tl.constexpr,
    FORM: tl.constexpr, CHACHA: tl.constexpr, ROUNDS: tl.constexpr, BLOCKS: tl.constexpr,
    ONLY: tl.constexpr,
):  # fmt: skip
    """`tile_noise` of one step; ONLY: of one Philox block of each row, or None."""
    if FORM == "fast":
        if CHACHA:
            block = (first // 16).to(tl.uint32) + tl.arange(0, TILE // 16).to(tl.uint32)
            return fast_chacha(block, step, client, layer, key, ROUNDS, GAUSSIAN)
        else:
            rows: tl.constexpr = TILE // (4 * BLOCKS)
            start = (first // 4).to(tl.uint32)
            return (
                fast_philox(start, step, client, layer, key, ROUNDS, GAUSSIAN, rows, BLOCKS, ONLY),
            )
    else:
        domain: tl.constexpr = _GAUSSIAN if GAUSSIAN else _LAPLACE
        word = layer + domain * _DOMAIN
        if CHACHA:
            block = (first // 8).to(tl.uint32) + tl.arange(0, TILE // 8).to(tl.uint32)
            w = chacha(block, step, client, word, key, ROUNDS)
            pair0 = wide_pair(w[0], w[1], w[2], w[3], GAUSSIAN)
            pair1 = wide_pair(w[4], w[5], w[6], w[7], GAUSSIAN)
            pair2 = wide_pair(w[8], w[9], w[10], w[11], GAUSSIAN)
            pair3 = wide_pair(w[12], w[13], w[14], w[15], GAUSSIAN)
            quads = tl.join(tl.join(pair0, pair2), tl.join(pair1, pair3))
            # [rows, element, upper bit of the pair, lower bit]: the pair comes before the element.
            return (tl.reshape(tl.permute(quads, [0, 2, 3, 1]), [TILE // 8, 8]),)
        else:
            rows: tl.constexpr = TILE // (2 * BLOCKS)
            start = (first // 2).to(tl.uint32)
            a, b, c, d = philox_rows(start, step, client, word, key, ROUNDS, rows, BLOCKS, ONLY)
            return (wide_pair(a, b, c, d, GAUSSIAN),)


@triton.jit
def to_element(value, DTYPE: tl.constexpr):
    """`value` in a tensor's dtype; 16 bits come by way of float32, as they do in torch."""
    if DTYPE.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    if INTERPRET and DTYPE.name == "bf16":
        # The interpreter cuts bfloat16 off; a device rounds to nearest even.
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(value == value, bits, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)


@triton.jit
def _store_noise(
    out, scale, drawn_from, client, layer, first, low, high, TILE: tl.constexpr,
    GAUSSIAN: tl.constexpr, FORM: tl.constexpr, CHACHA: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    noise = tile_noise(
        first, drawn_from, client, layer, TILE, GAUSSIAN, FORM, CHACHA, ROUNDS, BLOCKS, PARTS
    )
    for part in tl.static_range(PARTS):
        element = first + part_index(part, TILE, FORM, CHACHA, BLOCKS)
        inside = (element >= low) & (element < high)
        value = noise[part].to(tl.float64) * scale
        tl.store(out + (element - low), to_element(value, out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["bands", "layer", "low", "high"],
    do_not_specialize_on_alignment=["scale_pointer", "step_pointer", "clients_pointer"],
)
def noise_kernel(
    out_pointer, scale_pointer, step_pointer, clients_pointer, key_pointer, layer, low, high,
    coefficients, bands, TILE: tl.constexpr, GAUSSIAN: tl.constexpr, FORM: tl.constexpr,
    CHACHA: tl.constexpr, ROUNDS: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out[k, i] = scale * noise(step, clients[k], layer, low + i) for low + i < high.

    Grid (tiles, K). The product is float64, rounded once to the dtype of `out`.
    """
    # A low or high below 2^31 comes as int32, and so would products with it.
    row, low, high = tl.program_id(1).to(tl.int64), low.to(tl.int64), high.to(tl.int64)
    first = (low // TILE + tl.program_id(0)) * TILE
    drawn_from = load_source(step_pointer, key_pointer, coefficients, bands, CHACHA)
    client = tl.load(clients_pointer + row).to(tl.uint32)
    scale = tl.load(scale_pointer)
    out = out_pointer + row * (high - low)
    _store_noise(
        out, scale, drawn_from, client, layer.to(tl.uint32), first, low, high, TILE, GAUSSIAN,
        FORM, CHACHA, ROUNDS, BLOCKS, PARTS,
    )  # fmt: skip


def scaled_noise(
    noise: Noise, segment: Segment, scale: float | Tensor, dtype: torch.dtype
) -> Tensor:
    """`Backend.scaled_noise` of the wide or fast form."""
    layer, offset, count = segment
    clients, device = noise.clients, noise.clients.device
    if isinstance(scale, Tensor):
        return (scaled_noise(noise, segment, 1.0, torch.float64) * scale).to(dtype)
    out = torch.empty((len(clients), count), dtype=dtype, device=device)
    tiles = -(-(offset + count) // TILE) - offset // TILE
    form, secure = noise.form, noise.rng.startswith("chacha")
    size = torch.full((), scale, dtype=torch.float64, device=device)
    step, key, coefficients, bands = source_tensors(noise, device)
    for rows in slices(len(clients) if count else 0, MAX_ROWS):
        some = clients[rows].contiguous()
        launch(
            noise_kernel, (tiles, len(some)), device, out[rows], size, step, some, key, layer,
            offset, offset + count, coefficients, bands, TILE=TILE,
            GAUSSIAN=noise.mechanism == "gaussian", FORM=form, CHACHA=secure,
            ROUNDS=rounds_of(noise.rng), BLOCKS=blocks_per_row(form, secure, dtype.itemsize),
            PARTS=parts(form, secure), enable_fp_fusion=form == "fast",
        )  # fmt: skip
    return out
