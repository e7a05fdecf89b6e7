"""The host's plan of a launch: chunks of layers, and tickets that say in which order they run.

A *unit* is one layer of one row (client). It is cut into *chunks*, each inside one tensor and at
most `CHUNK` elements, so that its bounds depend on the layout alone. A *ticket* is a chunk and what
to do with it: `NORM`, `APPLY` or, for a unit of one chunk, both. An apply ticket stands behind all
norm tickets of its unit.

Programs take tickets in order, each its next one before it works on the one it has, and wait in
apply tickets alone, for the norm tickets of a unit. No deadlock, whatever the number of programs:
of all tickets that are not done, let m be the first. What it waits for stands before it, so it is
done. Who holds m holds no earlier ticket that is not done, so it works on m. If nobody has taken m,
then all that were taken are done, and whoever finished last takes it. So m gets done.

An apply ticket reads again what its norm ticket read. It trails by a *window* of bytes, so that the
second read comes from the L2 cache. A unit larger than the window is applied from its end: what was
read last is in the cache still. bench/cache_model.py computes what that saves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._triton._device import stream_name, to_device
from aadp_kernels.layout import Layout

# All programs of a large GPU hold a chunk at once. Together these must be less than the window, or
# programs wait for each other: 1056 times 16 KB.
CHUNK = 1 << 12
NORM, APPLY = 1, 2
KIND_BITS = 2
MAX_CHUNKS = 1 << 31 - KIND_BITS  # their tickets are int32

# Apply tickets trail their norm tickets by so many bytes, where no device says otherwise.
WINDOW = 12 << 20
# Between the two reads of an element lie a window of norm tickets and one of apply tickets, and a
# third of outputs that are not in place. Some caches are two halves that each hold a copy.
WINDOWS_IN_L2 = 4

PLANS = 16  # that a layout remembers: dtypes, forms, cohorts, streams

COLUMNS = 8  # int64 of a chunk: tensor, shift, first, low, high, whole, unit, shift of row 0


@dataclass(frozen=True)
class LaunchPlan:
    """The tables of a launch, on its device.

    Attributes:
        tickets: int32, 4 * chunk + kind, in the order in which programs take them.
        chunks: int64 [chunks, 8]: tensor; shift, to be added to an element of the layer to give the
            element of the tensor; first element, a multiple of the tile; low and high, the bounds;
            end of the whole, aligned tiles; unit; shift of row 0 (of the reference).
        units: int32 [units, 2], first chunk and end of the chunks of each unit.
        free: Scratch that no launch is being made with.
    """

    tickets: Tensor
    chunks: Tensor
    units: Tensor
    free: list[Scratch] = field(default_factory=list)


@dataclass(frozen=True)
class Scratch:
    """Memory that a launch writes beside its results, and its step.

    A plan belongs to a stream, whose launches follow one another. So a launch may take the scratch
    of an earlier launch. It must not take that of a launch which another thread is still making:
    both threads would clear the counters first, and the second launch would find them used.

    Attributes:
        counters: int32, all of the next two; zero when a launch begins.
        done: int32 [units], chunks of each unit whose norms are summed.
        published: int64 [units], factors, see the kernel.
        partials: float64 [2, chunks], sums of the chunks.
        step: int64 0-d.
    """

    counters: Tensor
    done: Tensor
    published: Tensor
    partials: Tensor
    step: Tensor

    @classmethod
    def new(cls, units: int, chunks: int, device: torch.device) -> Scratch:
        # Offsets are multiples of 16 bytes, or each number of units would compile another kernel.
        flags = 8 + -(-units // 4) * 4
        # Whoever comes later may write them, inside of inference mode and outside.
        with torch.inference_mode(False):
            counters = torch.empty(flags + 2 * units, dtype=torch.int32, device=device)
            return cls(
                counters, counters[8:], counters[flags:].view(torch.int64),
                torch.empty(2 * chunks, dtype=torch.float64, device=device),
                torch.empty((), dtype=torch.int64, device=device),
            )  # fmt: skip


def window_of(device: torch.device) -> int:
    """Bytes by which apply tickets trail on a device: a share of its L2 cache."""
    if device.type != "cuda":
        return WINDOW
    return torch.cuda.get_device_properties(device).L2_cache_size // WINDOWS_IN_L2 or WINDOW


def _pieces(offset: int, size: int, tile: int) -> np.ndarray:
    """Bounds of the chunks of a tensor whose elements are offset .. offset + size - 1."""
    end = offset + size
    if size <= tile:
        return np.array([offset, end])
    # What lies before the first whole tile is a chunk of its own: the rest needs no masks.
    start = -(-offset // tile) * tile
    inner = np.arange(start, end, CHUNK)
    return np.concatenate([[offset] if start > offset else inner[:0], inner, [end]])


def _row_chunks(layout: Layout, tile: int) -> np.ndarray:
    """Chunks of row 0, int64 [chunks, 8], unit by unit; an empty layer has an empty chunk."""
    parts = []
    for layer, members in enumerate(layout.members):
        for i in members:
            offset, size = layout.offsets[i], layout.sizes[i]
            if not size:
                continue
            bounds = _pieces(offset, size, tile)
            rows = np.empty((len(bounds) - 1, COLUMNS), dtype=np.int64)
            low, high = bounds[:-1], bounds[1:]
            rows[:, 0], rows[:, 1], rows[:, 6], rows[:, 7] = i, -offset, layer, -offset
            rows[:, 2], rows[:, 3], rows[:, 4] = low // tile * tile, low, high
            rows[:, 5] = np.where(low % tile == 0, low + (high - low) // tile * tile, 0)
            parts.append(rows)
        if not layout.dims[layer]:
            parts.append(np.array([[members[0], 0, 0, 0, 0, 0, layer, 0]], dtype=np.int64))
    return np.concatenate(parts)


def _order(
    chunks: np.ndarray, begins: np.ndarray, ends: np.ndarray, itemsize: int, window: int
) -> np.ndarray:
    """Tickets; chunk c's unit has the chunks begins[c] .. ends[c] - 1."""
    index = np.arange(len(chunks))
    single = ends - begins == 1
    size = (chunks[:, 4] - chunks[:, 3]) * itemsize
    read = np.cumsum(size)
    unit_end = read[ends - 1]
    apply_at = np.maximum(read + window, unit_end)
    large = unit_end - (read - size)[begins] > window
    applied = np.where(large, begins + ends - 1 - index, index)
    # At the same place norm tickets come first: a stable sort keeps them so.
    place = np.concatenate([read, apply_at[~single]])
    code = np.concatenate(
        [
            index << KIND_BITS | np.where(single, NORM | APPLY, NORM),
            applied[~single] << KIND_BITS | APPLY,
        ]
    )
    return code[np.argsort(place, kind="stable")].astype(np.int32)


def make(
    layout: Layout,
    rows: int,
    *,
    tile: int,
    itemsize: int,
    aligned: tuple[bool, ...],
    window: int | None = None,
) -> dict[str, np.ndarray]:
    """The tables of a `LaunchPlan` as arrays.

    Args:
        layout: The layers.
        rows: Rows (clients) K.
        tile: Elements of a tile, a power of two that divides `CHUNK`.
        itemsize: Bytes of an element of the narrowest tensor.
        aligned: Whether all addresses of each tensor are multiples of 16 bytes.
        window: Bytes by which apply tickets trail; `WINDOW` by default.
    """
    window = WINDOW if window is None else window
    row = _row_chunks(layout, tile)
    if len(row) * rows >= MAX_CHUNKS:
        raise ValueError(
            f"tensors must be fewer than {MAX_CHUNKS} pieces, got {rows} rows of {len(row)}"
        )
    chunks = np.tile(row, (rows, 1))
    of_row = np.repeat(np.arange(rows), len(row))
    sizes = np.array(layout.sizes, dtype=np.int64)[chunks[:, 0]]
    chunks[:, 6] += of_row * layout.num_layers
    usable = np.array(aligned)[chunks[:, 0]]
    # The reference has one row only, so its shift differs: both must keep the alignment.
    for shift in (chunks[:, 1], of_row * sizes):
        usable &= shift * itemsize % 16 == 0
    chunks[:, 1] += of_row * sizes
    chunks[:, 5] = np.where(usable, chunks[:, 5], 0)
    counts = np.bincount(chunks[:, 6], minlength=rows * layout.num_layers)
    ends = np.cumsum(counts)
    begin_of, end_of = (ends - counts)[chunks[:, 6]], ends[chunks[:, 6]]
    return {
        "tickets": _order(chunks, begin_of, end_of, itemsize, window),
        "chunks": chunks,
        "units": np.stack([ends - counts, ends], axis=1).astype(np.int32),
    }


def plan_launch(
    layout: Layout,
    rows: int,
    *,
    tile: int,
    itemsize: int,
    aligned: tuple[bool, ...],
    device: torch.device,
) -> LaunchPlan:
    """The plan of a launch; the layout remembers those that were used last."""
    cache: dict[Any, LaunchPlan] = vars(layout).setdefault("_triton_plans", {})
    stream = stream_name(device)
    name = (rows, tile, itemsize, aligned, device, stream)
    # Taken out and put back, each in one call of the dict, so that threads can share a layout.
    found = None if stream is None else cache.pop(name, None)
    if found is None:
        window = window_of(device)
        tables = make(layout, rows, tile=tile, itemsize=itemsize, aligned=aligned, window=window)
        found = LaunchPlan(**{key: to_device(table, device) for key, table in tables.items()})
    if stream is not None:
        cache[name] = found
        for oldest in list(cache)[:-PLANS]:
            cache.pop(oldest, None)
    return found
