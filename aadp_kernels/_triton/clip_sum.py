"""Sums of clipped per-record gradients with noise: two launches for a whole list of layers.

The first computes norms, and the last program of a (record, layer) turns them into a clip factor;
the second sums factor times gradient over the records, in order, and adds the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._torch.clip_sum import finish
from aadp_kernels._torch.privatize import ClipStats, Noise
from aadp_kernels._triton import grid
from aadp_kernels._triton._device import key_tensor, per_stream, step_tensor, to_device
from aadp_kernels._triton.clip_sum_kernels import (
    TRITON_DTYPES,
    norm_constants,
    norm_pieces,
    sum_tiles,
    tile_size,
)
from aadp_kernels._triton.noise import blocks_per_row, parts
from aadp_kernels.layout import Layout

PIECE = 16384  # elements of one record that a program of the first launch takes at most


@dataclass(frozen=True)
class _Group:
    """The work on the tensors of one dtype, as tables on the device."""

    dtype: torch.dtype
    pieces: Tensor
    tiles: Tensor


@dataclass(frozen=True)
class _Plan:
    """What a call needs to know of the layout, as tables on the device."""

    groups: tuple[_Group, ...]
    layers: Tensor
    statics: Tensor
    num_slots: int


class _GridNoise:
    """The integers of a `Noise` of the grid form, drawn by Triton: one launch a layer."""

    def __init__(self, noise: Noise) -> None:
        self.noise, self.mechanism = noise, noise.mechanism

    def draw(self, layout: Layout, scale: Tensor) -> list[Tensor | None]:
        """Per layer, noise in quanta, int64 [1, d_l]."""
        noise = self.noise
        return [
            grid.scaled_noise(
                noise.rng, tuple(noise.key_words), (layer, 0, dim), noise.clients, step=noise.step,
                mechanism=noise.mechanism, form="grid", scale=1.0, dtype=torch.int64,
            )
            if dim else None
            for layer, dim in enumerate(layout.dims)
        ]  # fmt: skip


def _upload(rows: Sequence[Any], device: torch.device) -> Tensor:
    """An int64 table on the device."""
    return to_device(np.array(rows, dtype=np.int64), device)


@per_stream(64)
def _plan(
    layout: Layout, dtypes: tuple[torch.dtype, ...], tile: int, device: torch.device
) -> _Plan:
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
    return _Plan(
        tuple(
            _Group(dtype, _upload(pieces[dtype], device), _upload(tiles[dtype], device))
            for dtype in pieces
        ),
        _upload(layers, device),
        _upload(list(zip(layout.layer_of, layout.offsets, layout.sizes, strict=True)), device),
        slots,
    )


def clip_sum_noise(
    per_sample: Sequence[Tensor],
    layout: Layout,
    *,
    clip: Tensor,
    scale: Tensor,
    p: int,
    noise: Noise | None,
    mask: Tensor,
    votes_at: Tensor | None,
    accumulate: Sequence[Tensor] | None,
    last: bool,
    quanta: Tensor | None,
) -> tuple[list[Tensor], ClipStats]:
    """Sums (with noise if last), and statistics: `aadp_kernels.clip_sum_noise` after its checks."""
    batch, device = mask.shape[0], mask.device
    dtypes = tuple(t.dtype for t in per_sample)
    noised = last and quanta is None
    draw = _draw(noise if noised else None, device)
    plan = _plan(layout, dtypes, draw[1]["TILE"], device)
    rows = [_as_rows(t, size) for t, size in zip(per_sample, layout.sizes, strict=True)]
    kind = torch.float64 if quanta is None else torch.int64
    sums = _destination(accumulate, layout, kind, device, needed=not noised)
    results = sums
    if noised:
        results = [
            torch.empty(shape, dtype=dtype, device=device)
            for shape, dtype in zip(layout.shapes, dtypes, strict=True)
        ]
    tensors = _upload(
        [
            (x.data_ptr(), x.stride(0), total.data_ptr(), out.data_ptr())
            for x, total, out in zip(rows, sums, results, strict=True)
        ],
        device,
    )
    factors = torch.empty((layout.num_layers, batch), dtype=torch.float64, device=device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        stats = _clip(plan, layout, tensors, factors, clip, mask, votes_at, quanta, p)
        flags = {"FRESH": accumulate is None, "LAST": noised, "GRID": quanta is not None}
        _sum(plan, tensors, factors, scale, draw, flags)
    if last and not noised:
        drawn: Any = None if noise is None else _GridNoise(noise)
        results = finish(sums, layout, scale=scale, noise=drawn, dtypes=dtypes, quanta=quanta)
    return results, stats


def _as_rows(value: Tensor, size: int) -> Tensor:
    """[B, size] with neighbours side by side; a copy only where a view cannot have that."""
    rows = value.detach().reshape(value.shape[0], size)
    return rows if size <= 1 or rows.stride(1) == 1 else rows.contiguous()


def _destination(
    accumulate: Sequence[Tensor] | None,
    layout: Layout,
    dtype: torch.dtype,
    device: torch.device,
    *,
    needed: bool,
) -> list[Tensor]:
    """Running sums to read, to write, or neither."""
    if accumulate is not None:
        return list(accumulate)
    shapes = layout.shapes if needed else [torch.Size([0])] * len(layout.shapes)
    return [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]


def _clip(plan, layout, tensors, factors, clip, mask, votes_at, quanta, p) -> ClipStats:
    """First launch: `factors`, and statistics."""
    batch, device = mask.shape[0], mask.device
    num_layers = layout.num_layers
    counts = torch.zeros(3 * num_layers + num_layers * batch, dtype=torch.int64, device=device)
    votes = votes_at is not None
    norm1 = None
    if p == 1 or votes:
        norm1 = torch.empty((batch, num_layers), dtype=torch.float64, device=device)
    slots = torch.empty((batch, plan.num_slots, 2), dtype=torch.float64, device=device)
    kernel: Any = norm_pieces
    for group in plan.groups:
        if batch and len(group.pieces):
            kernel[(len(group.pieces) * batch,)](
                group.pieces, plan.layers, tensors, mask.view(torch.uint8), clip.contiguous(),
                votes_at.contiguous() if votes else clip, clip if quanta is None else quanta, slots,
                factors, slots if norm1 is None else norm1, counts, batch, plan.num_slots,
                num_layers, GRID=quanta is not None, P=p, VOTES=votes,
                **norm_constants(group.dtype), enable_fp_fusion=False,
            )  # fmt: skip
    vote, clipped, bad = counts[: 3 * num_layers].view(3, -1)
    return ClipStats(norm1, vote.to(torch.float64) / 2, clipped, bad)


def _sum(plan, tensors, factors, scale, draw, flags) -> None:
    """Second launch: clipped sums, with noise if they are the last."""
    kernel: Any = sum_tiles
    pointers, constants = draw
    for group in plan.groups:
        if len(group.tiles):
            kernel[(len(group.tiles),)](
                group.tiles, plan.statics, tensors, factors, scale.contiguous(), *pointers,
                factors.shape[1], **flags, **constants,
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


def _draw(noise: Noise | None, device: torch.device) -> tuple[list[Tensor], dict[str, Any]]:
    """Where the noise comes from: (step, client, key) on the device, and constants of the code."""
    rng = "philox10" if noise is None else noise.rng
    form = "wide" if noise is None else noise.form
    chacha = rng.startswith("chacha")
    constants = {
        "NOISE": noise is not None,
        "TILE": tile_size(form, chacha),
        "GAUSSIAN": noise is not None and noise.mechanism == "gaussian",
        "FORM": form,
        "CHACHA": chacha,
        "ROUNDS": int(rng.removeprefix("chacha").removeprefix("philox")),
        "PARTS": parts(form, chacha),
    }
    if noise is None:
        return [torch.empty(1, dtype=torch.int64, device=device)] * 3, constants
    key = key_tensor(tuple(noise.key_words), device)
    return [step_tensor(noise.step, device), noise.clients, key], constants
