"""Sums of clipped per-record gradients with noise: two launches for a whole list of layers.

The first computes norms, and the last program of a (record, layer) turns them into a clip factor;
the second sums factor times gradient over the records, in order, and adds the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._triton._device import (
    MAX_PROGRAMS,
    launch,
    per_stream,
    slices,
    source_tensors,
    to_device,
)
from aadp_kernels._triton.clip_sum_kernels import (
    TRITON_DTYPES,
    norm_constants,
    norm_pieces,
    sum_tiles,
    tile_size,
)
from aadp_kernels._triton.noise import blocks_per_row, parts
from aadp_kernels.addresses import rounds_of
from aadp_kernels.contract import Bounds, ClipStats, Noise
from aadp_kernels.layout import Layout

PIECE = 16384  # elements of one record that a program of the first launch takes at most


@dataclass(frozen=True)
class _Group:
    """The work on the tensors of one dtype, as tables on the device."""

    dtype: torch.dtype
    pieces: Tensor
    tiles: Tensor


@dataclass(frozen=True)
class SumPlan:
    """The tables of a layout that the kernels read, on the device."""

    groups: tuple[_Group, ...]
    layers: Tensor
    statics: Tensor
    num_slots: int


def _upload(rows: Sequence[Any], device: torch.device) -> Tensor:
    """An int64 table on the device."""
    return to_device(np.array(rows, dtype=np.int64), device)


@per_stream(64)
def _plan(
    layout: Layout, dtypes: tuple[torch.dtype, ...], tile: int, device: torch.device
) -> SumPlan:
    """Pieces of the first launch, tiles of the second, and where a layer's slots lie."""
    pieces: dict[torch.dtype, list] = {dtype: [] for dtype in dtypes}
    tiles: dict[torch.dtype, list] = {dtype: [] for dtype in dtypes}
    layers, slots = [], 0
    for layer, members in enumerate(layout.members):
        first = slots
        for i in members:
            offset, size = layout.offsets[i], layout.sizes[i]
            starts = range(0, size, PIECE) if layout.dims[layer] else range(1)
            for start in starts:
                count = min(PIECE, size - start)
                pieces[dtypes[i]].append((i, start, count, layer, slots))
                slots += 1
            begin = offset // tile * tile
            tiles[dtypes[i]] += [(i, at) for at in range(begin, offset + size, tile)]
        layers.append((first, slots - first, layout.dims[layer]))
    return SumPlan(
        tuple(
            _Group(dtype, _upload(pieces[dtype], device), _upload(tiles[dtype], device))
            for dtype in pieces
        ),
        _upload(layers, device),
        _upload(list(zip(layout.layer_of, layout.offsets, layout.sizes, strict=True)), device),
        slots,
    )


def clip_sum(
    per_sample: Sequence[Tensor],
    layout: Layout,
    *,
    bounds: Bounds,
    mask: Tensor,
    weights: Tensor | None,
    sums: Sequence[Tensor] | None,
    quanta: Tensor | None,
) -> tuple[list[Tensor], ClipStats]:
    """`Backend.clip_sum`."""
    totals = sums
    if totals is None:
        kind = torch.float64 if quanta is None else torch.int64
        totals = [torch.empty(shape, dtype=kind, device=mask.device) for shape in layout.shapes]
    draw, flags = _draw(None, mask.device), {"FRESH": sums is None, "LAST": False}
    stats = _both_launches(
        per_sample, layout, bounds, mask, weights, (totals, totals), quanta, bounds.clip, draw=draw,
        flags=flags,
    )  # fmt: skip
    return list(totals), stats


def clip_sum_noise(
    per_sample: Sequence[Tensor],
    layout: Layout,
    *,
    bounds: Bounds,
    mask: Tensor,
    weights: Tensor | None,
    sums: Sequence[Tensor] | None,
    scale: Tensor,
    noise: Noise | None,
) -> tuple[list[Tensor], ClipStats]:
    """`Backend.clip_sum_noise`: running sums are read, and results written, by one kernel."""
    device, fresh = mask.device, sums is None
    results = [
        torch.empty(shape, dtype=record.dtype, device=device)
        for shape, record in zip(layout.shapes, per_sample, strict=True)
    ]
    before = sums or [torch.empty(0, dtype=torch.float64, device=device)] * len(results)
    stats = _both_launches(
        per_sample, layout, bounds, mask, weights, (before, results), None, scale,
        draw=_draw(noise, device), flags={"FRESH": fresh, "LAST": True},
    )  # fmt: skip
    return results, stats


def _both_launches(
    per_sample: Sequence[Tensor],
    layout: Layout,
    bounds: Bounds,
    mask: Tensor,
    weights: Tensor | None,
    places: tuple[Sequence[Tensor], Sequence[Tensor]],
    quanta: Tensor | None,
    scale: Tensor,
    *,
    draw: Any,
    flags: dict[str, bool],
) -> ClipStats:
    """Norms into factors, then sums with the noise; `places` are running sums and results."""
    device = mask.device
    plan = _plan(layout, tuple(t.dtype for t in per_sample), draw[2]["TILE"], device)
    rows = [_as_rows(t, size) for t, size in zip(per_sample, layout.sizes, strict=True)]
    tensors = _upload(
        [
            (x.data_ptr(), x.stride(0), total.data_ptr(), out.data_ptr())
            for x, total, out in zip(rows, *places, strict=True)
        ],
        device,
    )
    factors = torch.empty((layout.num_layers, len(mask)), dtype=torch.float64, device=device)
    stats = _clip(plan, layout, tensors, factors, bounds, mask, quanta)
    if weights is not None:
        factors *= weights
    _sum(plan, tensors, factors, scale, draw, flags | {"GRID": quanta is not None})
    return stats


def _as_rows(value: Tensor, size: int) -> Tensor:
    """[B, size] with neighbours side by side; a copy only where a view cannot have that."""
    rows = value.detach().reshape(value.shape[0], size)
    return rows if size <= 1 or rows.stride(1) == 1 else rows.contiguous()


def _clip(plan, layout, tensors, factors, bounds, mask, quanta) -> ClipStats:
    """First launch: `factors`, and statistics."""
    clip, p, votes_at = bounds
    batch, device = mask.shape[0], mask.device
    num_layers = layout.num_layers
    counts = torch.zeros(3 * num_layers + num_layers * batch, dtype=torch.int64, device=device)
    votes = votes_at is not None
    norm1 = None
    if p == 1 or votes:
        norm1 = torch.empty((batch, num_layers), dtype=torch.float64, device=device)
    slots = torch.empty((batch, plan.num_slots, 2), dtype=torch.float64, device=device)
    at_once = max(1, MAX_PROGRAMS // max(1, batch))
    for group in plan.groups:
        for some in slices(len(group.pieces) if batch else 0, at_once):
            pieces = group.pieces[some]
            launch(
                norm_pieces, (len(pieces) * batch,), device, pieces, plan.layers, tensors,
                mask.view(torch.uint8), clip.contiguous(),
                votes_at.contiguous() if votes else clip, clip if quanta is None else quanta, slots,
                factors, slots if norm1 is None else norm1, counts, batch, plan.num_slots,
                num_layers, GRID=quanta is not None, P=p, VOTES=votes,
                **norm_constants(group.dtype), enable_fp_fusion=False,
            )  # fmt: skip
    vote, clipped, bad = counts[: 3 * num_layers].view(3, -1)
    return ClipStats(norm1, vote.to(torch.float64) / 2, clipped, bad)


def _sum(plan, tensors, factors, scale, draw, flags) -> None:
    """Second launch: clipped sums, with noise if they are the last."""
    (step, key, coefficients, bands), client, constants = draw
    for group in plan.groups:
        if len(group.tiles):
            launch(
                sum_tiles, (len(group.tiles),), factors.device, group.tiles, plan.statics, tensors,
                factors, scale.contiguous(), step, client, key, factors.shape[1], coefficients,
                bands, **flags, **constants,
                BLOCKS=blocks_per_row(
                    constants["FORM"], constants["CHACHA"], group.dtype.itemsize
                ),
                **sum_constants(group.dtype, grid=flags["GRID"]),
            )  # fmt: skip


def sum_constants(dtype: torch.dtype, *, grid: bool) -> dict[str, Any]:
    """Constants and options of the second launch; more registers than these would only idle."""
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "ITEMSIZE": dtype.itemsize,
        "enable_fp_fusion": False,
        "maxnreg": 160 if grid else 128,
    }


def _draw(noise: Noise | None, device: torch.device) -> tuple[Any, Tensor, dict[str, Any]]:
    """Where the noise comes from: `source_tensors`, the client, and constants of the code."""
    rng = "philox10" if noise is None else noise.rng
    form = "wide" if noise is None else noise.form
    chacha = rng.startswith("chacha")
    constants = {
        "NOISE": noise is not None,
        "TILE": tile_size(form, chacha),
        "GAUSSIAN": noise is not None and noise.mechanism == "gaussian",
        "FORM": form,
        "CHACHA": chacha,
        "ROUNDS": rounds_of(rng),
        "PARTS": parts(form, chacha),
    }
    if noise is None:
        unused = torch.empty(1, dtype=torch.int64, device=device)
        return (unused, unused, None, None), unused, constants
    return source_tensors(noise, device), noise.clients, constants
