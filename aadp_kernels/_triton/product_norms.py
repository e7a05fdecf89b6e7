"""Exact L1 and L2 norms of per-record weight gradients that are never written.

A weight gradient of a record is g^T a, a matrix product over its positions t. A program computes
one tile of it in registers, takes the sums of |.| and of squares, and drops it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aadp_kernels._triton._device import MAX_PROGRAMS, launch, slices

_BLOCK = 64
_SLOTS_AT_ONCE = 256


@triton.jit
def _store_tile_sums(acc, slots_ptr, slot):
    """Sums of |acc| and acc^2 in float64: the tile's two numbers."""
    wide = acc.to(tl.float64)
    tl.store(slots_ptr + 2 * slot, tl.sum(tl.reshape(tl.abs(wide), [acc.numel])))
    tl.store(slots_ptr + 2 * slot + 1, tl.sum(tl.reshape(wide * wide, [acc.numel])))


# A length changes from batch to batch: it must not compile another kernel.
@triton.jit(do_not_specialize=["length", "tiles_across", "tiles"])
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


@triton.jit(do_not_specialize=["slots"])
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


def product_norms(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
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
        that depends on neither B nor the run: the same bits every time.

    Edge cases:
        NaN or Inf in a record spoils that record's norms only. T, in or out of 0 gives 0.

    Reference:
        Goodfellow 2015, arXiv:1510.01799 and Li, Tramèr, Liang, Hashimoto 2022, arXiv:2110.05679
        (L2); the product itself instead of two T x T ones gives L1 as well.
    """
    if a.dim() != 3 or g.dim() != 3 or a.shape[:2] != g.shape[:2]:
        raise ValueError(
            f"a and g must be [B, T, in] and [B, T, out], got {tuple(a.shape)}, {tuple(g.shape)}"
        )
    if a.dtype != g.dtype or a.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"a and g must be float32, bfloat16 or float16 alike, got {a.dtype} and {g.dtype}"
        )
    batch, length, columns, rows = *a.shape, g.shape[2]
    tile = options(rows, columns, a.dtype)
    across = triton.cdiv(columns, tile["BLOCK_COLUMNS"])
    tiles = across * triton.cdiv(rows, tile["BLOCK_ROWS"])
    l1 = torch.zeros(batch, dtype=torch.float64, device=a.device)
    l2sq = torch.zeros_like(l1)
    if batch and tiles:
        slots = torch.empty((batch, tiles, 2), dtype=torch.float64, device=a.device)
        for some in slices(batch, max(1, MAX_PROGRAMS // tiles)):
            part = slots[some]
            launch(
                linear_tiles, (len(part) * tiles,), a.device, a[some], g[some], part, length,
                columns, rows, across, tiles, *a.stride(), *g.stride(), **tile,
            )  # fmt: skip
        launch(
            sum_slots, (batch,), a.device, slots, l1, l2sq, tiles, BLOCK=_SLOTS_AT_ONCE,
            enable_fp_fusion=False,
        )  # fmt: skip
    return l1, l2sq
