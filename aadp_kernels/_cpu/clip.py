"""Clip factors in numba, and updates of many clients in one walk over memory.

A row's layer is summed, decided and written before the next is touched, so that it is still in the
cache when it is written. Few large rows are summed on all threads first and then written.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu._jit import jit
from aadp_kernels._cpu._threads import spread, threads_for
from aadp_kernels._cpu.passes import (
    SCRATCH,
    Plan,
    sum_units,
    unit_sums,
    write,
    write_units,
)
from aadp_kernels._cpu.pieces import Pieces, frame_of
from aadp_kernels._torch.privatize import ClipStats, Precision
from aadp_kernels.layout import Layout

_ROWS_PER_THREAD = 4
_TINY = float(np.finfo(np.float64).tiny)


class Cells(NamedTuple):
    """What is decided for every row and layer; all arrays but the first are [K, L].

    Attributes:
        elements: int64 [L], sizes of the layers.
        eps, smallest: float64, precision of the outputs.
        clip, votes_at: float64, as given; NaN does not vote.
        norm1: float64 out, L1 norm.
        votes: float64 out, 1[norm1 <= votes_at] - 1/2, zero for what is not finite.
        factor: float64 out, certified clip factors.
        clipped, dead: int64 out, 1 where the norm passed the clip norm; where it is not finite.
    """

    elements: np.ndarray
    eps: np.ndarray
    smallest: np.ndarray
    clip: np.ndarray
    votes_at: np.ndarray
    norm1: np.ndarray
    votes: np.ndarray
    factor: np.ndarray
    clipped: np.ndarray
    dead: np.ndarray

    @classmethod
    def build(
        cls, layout: Layout, dtypes: Precision, clip: Tensor, votes_at: Tensor | None
    ) -> Cells:
        """Nothing decided yet; `clip` and `votes_at` are [K, L], `dtypes` that or [L]."""
        numbers, flags = np.empty((7, *clip.shape)), np.empty((2, *clip.shape), np.int64)
        given = (*(t.numpy() for t in (*dtypes, clip)), np.nan if votes_at is None else votes_at)
        for array, values in zip(numbers, given, strict=False):
            array[...] = values
        return cls(frame_of(layout).ends, *numbers, *flags)

    def stats(self) -> ClipStats:
        """As tensors."""
        return ClipStats(*map(torch.from_numpy, (self.norm1, self.votes, self.clipped, self.dead)))


@jit
def decide(sums, units, p, cells, row, layer):
    """`_torch.privatize.clip_factors` and `ballots` of one row's layer, operation by operation."""
    norm1, norm = 0.0, 0.0
    for unit in range(units[layer], units[layer + 1]):
        norm1 += sums[0, row, unit]
        if p == 2:
            norm += sums[1, row, unit]
    norm = math.sqrt(norm) if p == 2 else norm1
    finite = math.isfinite(norm) and math.isfinite(norm1)
    clip, count, eps = cells.clip[row, layer], cells.elements[layer], cells.eps[row, layer]
    bound = norm * (1 + (count + 16) * 2.0**-52)
    clipped = bound > clip and finite
    factor = 1.0
    if clipped:
        factor = max(clip - count * cells.smallest[row, layer] * eps, 0.0) / (bound * (1 + eps))
    cells.factor[row, layer] = factor if finite and factor >= _TINY else 0.0
    cells.clipped[row, layer], cells.dead[row, layer] = clipped, not finite
    threshold, vote = cells.votes_at[row, layer], 0.0
    if finite and not math.isnan(threshold):
        vote = 0.5 if norm1 <= threshold else -0.5
    cells.norm1[row, layer], cells.votes[row, layer] = norm1, vote


@jit
def decide_all(sums, units, p, cells):
    """`decide` for every cell."""
    for row in range(len(cells.clip)):
        for layer in range(len(units) - 1):
            decide(sums, units, p, cells, row, layer)


@jit
def privatize_rows(pieces, bounds, units, p, sums, cells, plan, scratch, begin, end):
    """Sum, decide and write the layers of rows begin .. end - 1, one after another."""
    layers, tiles = len(units) - 1, plan.units
    for row in range(begin, end):
        start, tile = row * units[layers], row * tiles[layers]
        for layer in range(layers):
            low, high = start + units[layer], start + units[layer + 1]
            sum_units(pieces, bounds, units, p, sums, scratch, low, high)
            decide(sums, units, p, cells, row, layer)
            low, high = tile + tiles[layer], tile + tiles[layer + 1]
            write_units(pieces, bounds, cells.dead, cells.factor, plan, scratch, low, high)


def privatize(pieces: Pieces, p: int, cells: Cells, plan: Plan) -> None:
    """Clip all rows and write them with noise; fills `cells`."""
    frame, rows = pieces.frame, len(cells.clip)
    units, elements = frame.chunks, rows * frame.elements
    if 1 < threads_for(elements) > rows // _ROWS_PER_THREAD:
        decide_all(unit_sums(pieces, rows, p), units, p, cells)
        write(pieces, plan, cells.factor, cells.dead)
        return
    sums = np.zeros((2, rows, int(units[-1])))

    def work(begin: int, end: int) -> None:
        scratch = np.empty(SCRATCH, np.uint8)
        privatize_rows(
            pieces.table, frame.bounds, units, p, sums, cells, plan.own(), scratch.ctypes.data,
            begin, end,
        )  # fmt: skip

    spread(work, rows, elements=elements)
