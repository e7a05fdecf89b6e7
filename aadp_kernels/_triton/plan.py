"""The host's plan of a launch: chunks of layers, and tickets that say in which order they run.

A *unit* is one layer of one row (client). It is cut into *chunks*, each inside one tensor and at
most `CHUNK` elements, so that its bounds depend on the layout alone. A *ticket* is a chunk and what
to do with it: `NORM`, `APPLY` or, for a unit of one chunk, both. Programs take tickets in order
and an apply ticket stands behind all norm tickets of its unit, so a program waits only for tickets
that were taken before its own: no deadlock, whatever the number of programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._triton._device import stream_name, to_device
from aadp_kernels.layout import Layout

CHUNK = 1 << 14
NORM, APPLY = 1, 2
KIND_BITS = 2

# Apply tickets trail their norm tickets by so many bytes at most: the second read is from L2.
WINDOW = 32 << 20

COLUMNS = 8  # int64 of a chunk: tensor, shift, first, low, high, whole, unit, shift of row 0


@dataclass(frozen=True)
class Plan:
    """The tables of a launch, on its device.

    Attributes:
        tickets: int32, 4 * chunk + kind, in the order in which programs take them.
        chunks: int64 [chunks, 8]: tensor; shift, to be added to an element of the layer to give the
            element of the tensor; first element, a multiple of the tile; low and high, the bounds;
            end of the whole, aligned tiles; unit; shift of row 0 (of the reference).
        units: int32 [units, 2], first chunk and end of the chunks of each unit.
        addresses: Lists of tensor addresses that were used before, on the device.
    """

    tickets: Tensor
    chunks: Tensor
    units: Tensor
    addresses: dict[tuple[int, ...], Tensor]


def _pieces(offset: int, size: int, tile: int) -> list[tuple[int, int]]:
    """Bounds of the chunks of a tensor whose elements are offset .. offset + size - 1."""
    end = offset + size
    if size <= tile:
        return [(offset, end)]
    # What lies before the first whole tile is a chunk of its own: the rest needs no masks.
    start = -(-offset // tile) * tile
    bounds = [offset] if start > offset else []
    bounds += [*range(start, end, CHUNK), end]
    return list(pairwise(bounds))


def _row_chunks(layout: Layout, tile: int) -> np.ndarray:
    """Chunks of row 0, int64 [chunks, 8], unit by unit; an empty layer has an empty chunk."""
    rows = []
    for layer, members in enumerate(layout.members):
        before = len(rows)
        for i in members:
            offset, size = layout.offsets[i], layout.sizes[i]
            for low, high in _pieces(offset, size, tile) if size else ():
                whole = low + (high - low) // tile * tile if low % tile == 0 else 0
                rows.append((i, -offset, low // tile * tile, low, high, whole, layer, -offset))
        if len(rows) == before:
            rows.append((members[0], 0, 0, 0, 0, 0, layer, 0))
    return np.array(rows, dtype=np.int64).reshape(-1, COLUMNS)


def _order(chunks: np.ndarray, ends: np.ndarray, itemsize: int) -> np.ndarray:
    """Tickets; `ends[c]` is the end of the chunks of chunk c's unit."""
    index = np.arange(len(chunks))
    single = np.bincount(chunks[:, 6])[chunks[:, 6]] == 1
    read = np.cumsum(chunks[:, 4] - chunks[:, 3]) * itemsize
    apply_at = np.maximum(read + WINDOW, read[ends - 1])
    # At the same place norm tickets come first: a stable sort keeps them so.
    place = np.concatenate([read, apply_at[~single]])
    code = np.concatenate(
        [
            index << KIND_BITS | np.where(single, NORM | APPLY, NORM),
            index[~single] << KIND_BITS | APPLY,
        ]
    )
    return code[np.argsort(place, kind="stable")].astype(np.int32)


def make(
    layout: Layout, rows: int, *, tile: int, itemsize: int, aligned: tuple[bool, ...]
) -> dict[str, np.ndarray]:
    """The tables of a `Plan` as arrays.

    Args:
        layout: The layers.
        rows: Rows (clients) K.
        tile: Elements of a tile, a power of two that divides `CHUNK`.
        itemsize: Bytes of an element of the narrowest tensor.
        aligned: Whether all addresses of each tensor are multiples of 16 bytes.
    """
    row = _row_chunks(layout, tile)
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
    return {
        "tickets": _order(chunks, ends[chunks[:, 6]], itemsize),
        "chunks": chunks,
        "units": np.stack([ends - counts, ends], axis=1).astype(np.int32),
    }


def plan(
    layout: Layout,
    rows: int,
    *,
    tile: int,
    itemsize: int,
    aligned: tuple[bool, ...],
    device: torch.device,
) -> Plan:
    """The plan of a launch; the layout remembers it."""
    cache = vars(layout).setdefault("_triton_plans", {})
    stream = stream_name(device)
    name = (rows, tile, itemsize, aligned, device, stream)
    if stream is not None and name in cache:
        return cache[name]
    tables = make(layout, rows, tile=tile, itemsize=itemsize, aligned=aligned)
    on_device = {key: to_device(table, device) for key, table in tables.items()}
    made = Plan(**on_device, addresses={})
    if stream is not None:
        cache[name] = made
    return made
