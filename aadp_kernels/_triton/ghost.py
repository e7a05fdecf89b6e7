"""Exact L1 and L2 norms of per-record weight gradients that are never written.

A weight gradient of a record is g^T a, a matrix product over its positions t. A program computes
one tile of it in registers, takes the sums of |.| and of squares, and drops it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 64
_SLOTS_AT_ONCE = 256


@triton.jit
def _store_tile_sums(acc, slots_ptr, slot):
    """Sums of |acc| and acc^2 in float64: the tile's two numbers."""
    wide = acc.to(tl.float64)
    tl.store(slots_ptr + 2 * slot, tl.sum(tl.reshape(tl.abs(wide), [acc.numel])))
    tl.store(slots_ptr + 2 * slot + 1, tl.sum(tl.reshape(wide * wide, [acc.numel])))


@triton.jit
def linear_tiles(
    a_ptr, g_ptr, slots_ptr, length, columns, rows, tiles_across, tiles,
    a_record, a_position, a_column, g_record, g_position, g_row,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_LENGTH: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """slots[b, tile] = (sum |G|, sum G^2) over a tile of G = g[b]^T a[b].

    Grid: [B * tiles]. Products and their sum over positions are float32 (IEEE, no TF32), the sums
    over the tile float64.
    """
    slot = tl.program_id(0).to(tl.int64)
    record = slot // tiles
    tile = (slot % tiles).to(tl.int32)
    row = (tile // tiles_across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tile % tiles_across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    position = tl.arange(0, BLOCK_LENGTH)
    a_base = a_ptr + record * a_record + column.to(tl.int64)[None, :] * a_column
    g_base = g_ptr + record * g_record + row.to(tl.int64)[:, None] * g_row
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, length, BLOCK_LENGTH):
        t = start + position
        there = t < length
        t = t.to(tl.int64)
        g = tl.load(
            g_base + t[None, :] * g_position,
            (row < rows)[:, None] & there[None, :], other=0.0,
        )  # fmt: skip
        a = tl.load(
            a_base + t[:, None] * a_position,
            there[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        if WIDEN:
            a, g = a.to(tl.float32), g.to(tl.float32)
        acc = tl.dot(g, a, acc, input_precision="ieee")
    _store_tile_sums(acc, slots_ptr, slot)


@triton.jit
def conv_tiles(
    x_ptr, g_ptr, slots_ptr, height, width, out_width, length, columns, rows, tiles_across, tiles,
    x_record, x_channel, x_row, x_column, g_record, g_channel, g_position,
    channels, kernel_area, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    KERNEL_W: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_LENGTH: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """`linear_tiles` of a convolution: the columns of a are gathered from x [B, in, H, W].

    Column c of the patches is (channel, kernel row, kernel column), position t an output pixel.
    Grid: [B * GROUPS * tiles].
    """
    slot = tl.program_id(0).to(tl.int64)
    record = slot // (tiles * GROUPS)
    group = (slot // tiles) % GROUPS
    tile = (slot % tiles).to(tl.int32)
    row = (tile // tiles_across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tile % tiles_across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    channel = (column // kernel_area).to(tl.int64)
    down = (column % kernel_area) // KERNEL_W * dilation_h - pad_h
    right = column % KERNEL_W * dilation_w - pad_w
    position = tl.arange(0, BLOCK_LENGTH)
    x_base = x_ptr + record * x_record + (group * channels + channel)[None, :] * x_channel
    g_base = g_ptr + record * g_record + (group * rows + row.to(tl.int64))[:, None] * g_channel
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, length, BLOCK_LENGTH):
        t = start + position
        there = t < length
        y = (t // out_width * stride_h)[:, None] + down[None, :]
        z = (t % out_width * stride_w)[:, None] + right[None, :]
        inside = (y >= 0) & (y < height) & (z >= 0) & (z < width)
        inside = inside & there[:, None] & (column < columns)[None, :]
        g = tl.load(
            g_base + t.to(tl.int64)[None, :] * g_position,
            (row < rows)[:, None] & there[None, :], other=0.0,
        )  # fmt: skip
        a = tl.load(x_base + y.to(tl.int64) * x_row + z.to(tl.int64) * x_column, inside, other=0.0)
        if WIDEN:
            a, g = a.to(tl.float32), g.to(tl.float32)
        acc = tl.dot(g, a, acc, input_precision="ieee")
    _store_tile_sums(acc, slots_ptr, slot)


@triton.jit
def sum_slots(slots_ptr, l1_ptr, l2sq_ptr, slots, BLOCK: tl.constexpr):
    """l1[b], l2sq[b] = sums of record b's slots, always in the same order. Grid: [B], float64."""
    record = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    acc1 = tl.zeros([BLOCK], tl.float64)
    acc2 = tl.zeros([BLOCK], tl.float64)
    for start in range(0, slots, BLOCK):
        at = slots_ptr + 2 * (record * slots + start + lane)
        acc1 += tl.load(at, start + lane < slots, other=0.0)
        acc2 += tl.load(at + 1, start + lane < slots, other=0.0)
    tl.store(l1_ptr + record, tl.sum(acc1))
    tl.store(l2sq_ptr + record, tl.sum(acc2))


def options(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tile of a program; small layers get small tiles. One static choice: nothing is tuned."""
    return {
        "BLOCK_ROWS": min(_BLOCK, max(16, triton.next_power_of_2(rows))),
        "BLOCK_COLUMNS": min(_BLOCK, max(16, triton.next_power_of_2(columns))),
        "BLOCK_LENGTH": 16 if dtype == torch.float32 else 32,
        # The interpreter multiplies the bits of bfloat16 as if they were integers.
        "enable_fp_fusion": True,
        "WIDEN": triton.knobs.runtime.interpret,  # pyright: ignore[reportAttributeAccessIssue]
    }


@torch.library.custom_op("aadp_kernels::ghost_norms", mutates_args=())
def ghost_norms(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of every record's `g[b].T @ a[b]`, which is not written.

    Args:
        a: Inputs [B, T, in], float32, bfloat16 or float16. Private.
        g: Output gradients [B, T, out], of the same dtype. Private.

    Returns:
        (L1 norms [B], squared L2 norms [B]), float64.

    Raises:
        ValueError: Shapes or dtypes that do not fit.

    Guarantees:
        Products are summed over T in float32 without TF32, and the entries in float64 in an order
        that depends on neither B nor the run: the same bits every time. Under torch.vmap the mapped
        dimension joins the batch.

    Edge cases:
        NaN or Inf in a record spoils that record's norms only. T, in or out of 0 gives 0.

    Reference:
        Goodfellow 2015, arXiv:1510.01799 and Li, Tramèr, Liang, Hashimoto 2022, arXiv:2110.05679
        (ghost norms, L2); the product itself instead of two T x T ones gives L1 as well.
    """
    if a.dim() != 3 or g.dim() != 3 or a.shape[:2] != g.shape[:2]:
        raise ValueError(
            f"a and g must be [B, T, in] and [B, T, out], got {tuple(a.shape)}, {tuple(g.shape)}"
        )
    _check_dtypes(a, g)
    length, columns, rows = a.shape[1], a.shape[2], g.shape[2]
    tile = options(rows, columns, a.dtype)
    across = triton.cdiv(columns, tile["BLOCK_COLUMNS"])
    tiles = across * triton.cdiv(rows, tile["BLOCK_ROWS"])
    sizes = (length, columns, rows, across, tiles)
    return _norms(linear_tiles, tiles, a, g, (*sizes, *a.stride(), *g.stride()), tile)


@torch.library.custom_op("aadp_kernels::conv_ghost_norms", mutates_args=())
def conv_ghost_norms(
    x: Tensor,
    g: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Norms of every record's weight gradient of `F.conv2d`, from patches that are not written.

    Args:
        x: Inputs [B, in, H, W], float32, bfloat16 or float16. Private.
        g: Output gradients [B, out, H', W'], of the same dtype. Private.
        kernel: (height, width) of the kernel; stride, padding and dilation likewise.
        stride: See kernel.
        padding: See kernel.
        dilation: See kernel.
        groups: As in F.conv2d.

    Returns:
        (L1 norms [B], squared L2 norms [B]), float64.

    Raises:
        ValueError: Shapes or dtypes that do not fit.

    Guarantees:
        As `ghost_norms`.
    """
    if x.dim() != 4 or g.dim() != 4 or x.shape[0] != g.shape[0]:
        raise ValueError(
            f"x and g must be [B, in, H, W] and [B, out, H', W'], got {tuple(x.shape)}, "
            f"{tuple(g.shape)}"
        )
    if x.shape[1] % groups or g.shape[1] % groups:
        raise ValueError(f"groups must divide {x.shape[1]} and {g.shape[1]}, got {groups}")
    _check_dtypes(x, g)
    channels, rows = x.shape[1] // groups, g.shape[1] // groups
    area = kernel[0] * kernel[1]
    tile = options(rows, channels * area, x.dtype)
    across = triton.cdiv(channels * area, tile["BLOCK_COLUMNS"])
    tiles = across * triton.cdiv(rows, tile["BLOCK_ROWS"])
    flat = g.flatten(2)
    sizes = (x.shape[2], x.shape[3], g.shape[3], flat.shape[2], channels * area, rows)
    window = (channels, area, *stride, *padding, *dilation)
    return _norms(
        conv_tiles, groups * tiles, x, flat,
        (*sizes, across, tiles, *x.stride(), *flat.stride(), *window),
        {"KERNEL_W": kernel[1], "GROUPS": groups, **tile},
    )  # fmt: skip


def _check_dtypes(a: Tensor, g: Tensor) -> None:
    """Raise unless both have the same dtype, one the kernels take."""
    if a.dtype != g.dtype or a.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"inputs and gradients must be float32, bfloat16 or float16 alike, got {a.dtype} and "
            f"{g.dtype}"
        )


def _norms(
    kernel: Any, per_record: int, a: Tensor, g: Tensor, numbers: Sequence[int], options: dict
) -> tuple[Tensor, Tensor]:
    """Tiles into slots, slots into norms."""
    batch = a.shape[0]
    l1 = torch.zeros(batch, dtype=torch.float64, device=a.device)
    l2sq = torch.zeros_like(l1)
    if batch and per_record:
        slots = torch.empty((batch, per_record, 2), dtype=torch.float64, device=a.device)
        total: Any = sum_slots
        with torch.cuda.device(a.device) if a.is_cuda else nullcontext():
            kernel[(batch * per_record,)](a, g, slots, *numbers, **options)
            total[(batch,)](
                slots, l1, l2sq, per_record, BLOCK=_SLOTS_AT_ONCE, enable_fp_fusion=False
            )
    return l1, l2sq


def _fake(a: Tensor, g: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes for tracing."""
    return (
        a.new_empty(a.shape[:1], dtype=torch.float64),
        a.new_empty(a.shape[:1], dtype=torch.float64),
    )


def _folding(op):
    """A vmap rule that makes the mapped dimension part of the batch."""

    def rule(info, in_dims, a: Tensor, g: Tensor, *rest: object):
        size = info.batch_size
        folded = [
            (value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)).flatten(
                0, 1
            )
            for value, dim in ((a, in_dims[0]), (g, in_dims[1]))
        ]
        l1, l2sq = op(*folded, *rest)
        return (l1.view(size, -1), l2sq.view(size, -1)), (0, 0)

    return rule


for _op in (ghost_norms, conv_ghost_norms):
    _op.register_fake(_fake)
    _op.register_vmap(_folding(_op))
