"""The tensors of a call as the kernels take them: a table of addresses, and where walks are cut."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu.transform import TILE
from aadp_kernels.addresses import SUM_UNIT
from aadp_kernels.layout import Layout

NATIVE = (torch.float32, torch.float64)

# Columns of the table of tensors: the layer's element that it begins with, its elements, then the
# address and the bytes an element of the value, of what is subtracted and of the output.
FIRST, SIZE, VALUE, VALUE_BYTES, MINUS, MINUS_BYTES, OUT, OUT_BYTES = range(8)


class LayerCuts(NamedTuple):
    """Where walks over layers are cut: their sizes decide it, so that it is made once a layout.

    Attributes:
        bounds: int64 [L + 1], the rows of the table that belong to each layer.
        ends: int64 [L], one past the last element of each layer that is in the table.
        skip: int64 [L], tiles of each layer that come before what is in the table.
        tiles: int64 [L + 1], where the tiles of each layer begin.
        chunks: int64 [L + 1], where its units of SUM_UNIT elements begin; at least one each.
        elements: of all layers.
    """

    bounds: np.ndarray
    ends: np.ndarray
    skip: np.ndarray
    tiles: np.ndarray
    chunks: np.ndarray
    elements: int

    @classmethod
    def build(cls, bounds: Sequence[int], ends: Sequence[int], first_tile: int = 0) -> LayerCuts:
        """For layers whose tensors begin in the tile `first_tile`."""
        stops = np.array(ends, np.int64)
        skip = np.full_like(stops, first_tile)
        tiles, chunks = np.zeros((2, len(stops) + 1), np.int64)
        np.cumsum(-(-stops // TILE) - skip, out=tiles[1:])
        np.cumsum(np.maximum(1, -(-stops // SUM_UNIT)), out=chunks[1:])
        return cls(np.array(bounds, np.int64), stops, skip, tiles, chunks, sum(ends))


@lru_cache(maxsize=64)
def cuts_of(layout: Layout) -> LayerCuts:
    """The cuts of whole layers."""
    return LayerCuts.build(layout.bounds, layout.dims)


class TensorTable(NamedTuple):
    """The tensors of a call, sorted by layer, as the kernels take them.

    Attributes:
        entries: int64 [T, 8], one row a tensor; its addresses are those of `keep`.
        cuts: Their layers.
        keep: Tensors that must live while the table is in use.
    """

    entries: np.ndarray
    cuts: LayerCuts
    keep: list[Tensor]

    @classmethod
    def of_layout(
        cls,
        layout: Layout,
        values: Sequence[Tensor],
        minus: Sequence[Tensor] | None = None,
        out: Sequence[Tensor] | None = None,
    ) -> TensorTable:
        """For native tensors [K, *shape] (`minus`: [*shape]); without `out` only to read."""
        rows = entries_of(layout, values, minus, out)
        keep = [*values, *(minus or ()), *(out or ())]
        return cls(np.array(rows, np.int64).reshape(-1, 8), cuts_of(layout), keep)


def entries_of(
    layout: Layout,
    values: Sequence[Tensor],
    minus: Sequence[Tensor] | None,
    out: Sequence[Tensor] | None,
) -> list[int]:
    """`entries` of `TensorTable.of_layout`, row after row."""
    rows: list[int] = []
    for first, size, i in _extents(layout):
        value = values[i]
        here = address(value), value.element_size()
        less = (0, 0) if minus is None else (address(minus[i]), minus[i].element_size())
        if out is not None and out is not values:
            written = address(out[i]), out[i].element_size()
        else:
            written = here
        rows += (first, size, *here, *less, *written)
    return rows


def address(tensor: Tensor) -> int:
    """Where the contiguous values of a tensor begin."""
    place = tensor.data_ptr()
    if not place and tensor.numel():
        raise ValueError(f"tensors must have values, got a {type(tensor).__name__} without memory")
    return place


@lru_cache(maxsize=64)
def _extents(layout: Layout) -> tuple[tuple[int, int, int], ...]:
    """First element in its layer, size and index of each tensor, layer after layer."""
    return tuple((layout.offsets[i], layout.sizes[i], i) for i in layout.order)


def native(tensor: Tensor) -> Tensor:
    """Contiguous float32 or float64 of the same values; the tensor itself where it is that."""
    if tensor.dtype not in NATIVE:
        tensor = tensor.float()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def target(tensor: Tensor) -> Tensor:
    """What to write for `tensor`: itself where it is native, else new memory."""
    if tensor.dtype in NATIVE and tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.empty(tensor.shape, dtype=dtype)


def copy_back(targets: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Copy what was not written to `out` itself; autograd learns of what was."""
    written = []
    for made, tensor in zip(targets, out, strict=True):
        if made is not tensor:
            tensor.copy_(made)
        elif not tensor.is_inference():
            written.append(tensor)
    if written:
        torch.autograd.graph.increment_version(written)
