"""Releases of the grid form in numba: integer noise by itself, and updates cut to integers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu._jit import jit
from aadp_kernels._cpu.clip import DEAD, FACTOR, Decisions, decide_all
from aadp_kernels._cpu.elements import load_difference, store
from aadp_kernels._cpu.grid import Scratch, Source, draw_tile
from aadp_kernels._cpu.sum_and_write import unit_sums
from aadp_kernels._cpu.tensor_table import FIRST, SIZE, TensorTable
from aadp_kernels.certified import by_rows, noisy_layers
from aadp_kernels.contract import Bounds, ClipStats, Noise, Precision, Segment
from aadp_kernels.grid import LIMIT, MAX_WEIGHT, OFFSETS, quantum
from aadp_kernels.layout import Layout
from aadp_kernels.threads import run_on_threads

_FLOAT_LIMIT = float(LIMIT)


@jit
def integer_units(out, start, source, own, begin, end):
    """Tiles of the rows of `out`, int64 [K, n] of one layer, whose column 0 is element `start`."""
    per_tile = len(own.values)
    first = start // per_tile
    per_row = -(-(start + out.shape[1]) // per_tile) - first
    for unit in range(begin, end):
        row, tile = unit // per_row, first + unit % per_row
        low = tile * per_tile - start
        draw_tile(own, source, row, 0, tile)
        for e in range(max(0, -low), min(per_tile, out.shape[1] - low)):
            out[row, low + e] = own.values[e]


def integer_noise(noise: Noise, segments: Sequence[Segment]) -> list[Tensor]:
    """Noise in quanta, int64 [K, count] for every (layer, offset, count)."""
    results, rows = [], len(noise.clients)
    for layer, start, count in segments:
        out = torch.zeros((rows, count), dtype=torch.int64)
        results.append(out)
        if out.numel() == 0:
            continue
        source, array = Source.build(noise, [layer]), out.numpy()

        def work(begin: int, end: int, array=array, start=start, source=source) -> None:
            integer_units(array, start, source.own(), Scratch.build(source.per_tile), begin, end)

        per_row = -(-(start + count) // source.per_tile) - start // source.per_tile
        run_on_threads(work, rows * per_row, elements=8 * out.numel())
    return results


def layer_integers(noise: Noise, layout: Layout, scale: Tensor) -> list[Tensor | None]:
    """`Backend.layer_integers`."""
    layers = noisy_layers(layout, scale)
    found = integer_noise(noise, [(i, 0, layout.dims[i]) for i in layers])
    drawn = dict(zip(layers, found, strict=True))
    return [drawn.get(i) for i in range(layout.num_layers)]


def scaled_noise(
    noise: Noise, segment: Segment, scale: float | Tensor, dtype: torch.dtype
) -> Tensor:
    """`Backend.scaled_noise` of the grid form."""
    (counts,) = integer_noise(noise, [segment])
    if dtype == torch.int64:
        return counts
    size = quantum(scale, noise.mechanism)
    return ((counts.to(torch.float64) + OFFSETS[noise.mechanism]) * size).to(dtype)


@jit
def _release(x, count, weight, values, at, quantum, offset):
    """x = (trunc(x * weight) + values + offset) * quantum, integers within LIMIT."""
    for i in range(count):
        cut = np.int64(min(max(x[i] * weight, -_FLOAT_LIMIT), _FLOAT_LIMIT))
        noised = min(max(cut + values[at + i], -LIMIT), LIMIT)
        x[i] = (np.float64(noised) + offset) * quantum


@jit
def write_units(table, bounds, units, decisions, quanta, offset, source, own, begin, end):
    """Clipped rows on the grid with integer noise, in tiles of a layer; quanta are [K, L].

    A quantum of zero stands for no grid and no noise.
    """
    per_tile = len(own.values)
    x, minus = np.empty(per_tile, np.float64), np.empty(per_tile, np.float64)
    per_row = units[len(units) - 1]
    row, column, layer = begin // per_row, begin % per_row, 0
    for _ in range(begin, end):
        while column >= units[layer + 1]:
            layer += 1
        tile = column - units[layer]
        low, quantum = tile * per_tile, quanta[row, layer]
        if quantum > 0:
            draw_tile(own, source, row, layer, tile)
        for k in range(bounds[layer], bounds[layer + 1]):
            first, size = table[k, FIRST], table[k, SIZE]
            start, end_of = max(0, low - first), min(size, low + per_tile - first)
            count = end_of - start
            if count <= 0:
                continue
            if decisions.flags[DEAD, row, layer]:
                x[:count] = 0.0
            else:
                load_difference(x, minus, table, k, row, start, count)
            if quantum > 0:
                weight = min(decisions.numbers[FACTOR, row, layer] / quantum, MAX_WEIGHT)
                _release(x, count, weight, own.values, first + start - low, quantum, offset)
            else:
                x[:count] *= decisions.numbers[FACTOR, row, layer]
            store(x, table, k, row, start, count)
        column += 1
        if column == per_row:
            row, column, layer = row + 1, 0, 0


@by_rows
def privatize(
    table: TensorTable, layout: Layout, dtypes: Precision, noise: Noise, *, bounds: Bounds,
    scale: Tensor,
) -> ClipStats:  # fmt: skip
    """`_cpu.privatize.privatize` on the grid: exactly the specification."""
    clip, p, votes_at = bounds
    rows, elements = len(clip), len(clip) * sum(layout.dims)
    exact = torch.finfo(torch.float64)
    dtypes = Precision(
        torch.where(scale == 0, dtypes.eps, exact.eps),
        torch.where(scale == 0, dtypes.smallest_normal, exact.smallest_normal),
    )
    cuts, decisions = table.cuts, Decisions.build(layout, dtypes, clip, votes_at)
    decide_all(unit_sums(table, rows, p), cuts.chunks, p, decisions)
    source = Source.build(noise, range(layout.num_layers))
    units = np.zeros(layout.num_layers + 1, np.int64)
    np.cumsum(-(-cuts.ends // source.per_tile), out=units[1:])
    quanta = quantum(scale, noise.mechanism).contiguous().numpy()
    offset = OFFSETS[noise.mechanism]

    def work(begin: int, end: int) -> None:
        write_units(
            table.entries, cuts.bounds, units, decisions, quanta, offset, source.own(),
            Scratch.build(source.per_tile), begin, end,
        )  # fmt: skip

    run_on_threads(work, rows * int(units[-1]), elements=8 * elements)
    return decisions.stats()
