"""Clip factors in numba, and updates of many clients in one walk over memory.

A row's layer is summed, decided and written before the next is touched, so that it is still in the
cache when it is written. Few large rows are summed on all threads first and then written.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numba import carray  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from aadp_kernels._cpu._jit import jit, pointer
from aadp_kernels._cpu._parallel import parallel, region_for
from aadp_kernels._cpu.noise_plan import NoiseKind, NoisePlan
from aadp_kernels._cpu.rng import STATE_WORDS
from aadp_kernels._cpu.sum_and_write import (
    NOISE_COST,
    SCRATCH,
    sum_part,
    sum_units,
    write_part,
    write_units,
)
from aadp_kernels._cpu.tensor_table import LayerCuts, cuts_of
from aadp_kernels.contract import ClipStats, Precision
from aadp_kernels.layout import Layout
from aadp_kernels.threads import run_on_threads

_ROWS_PER_THREAD = 4
_TINY = float(np.finfo(np.float64).tiny)

# Planes of the tables of a `Decisions`.
NORM1, VOTES, FACTOR = range(3)
CLIPPED, DEAD = range(2)


class Decisions(NamedTuple):
    """What is decided for every row and layer.

    Attributes:
        elements: int64 [L], sizes of the layers.
        eps, smallest: float64 [1, L] or [K, L], precision of the outputs.
        clip, votes_at: float64 [K, L], as given; NaN does not vote, nor do tables of no rows.
        numbers: float64 [3, K, L] out: L1 norm; vote, 1[norm1 <= votes_at] - 1/2 and zero for what
            is not finite; certified clip factor.
        flags: int64 [2, K, L] out: 1 where the norm passed the clip norm; where it is not finite.
    """

    elements: np.ndarray
    eps: np.ndarray
    smallest: np.ndarray
    clip: np.ndarray
    votes_at: np.ndarray
    numbers: np.ndarray
    flags: np.ndarray

    @classmethod
    def build(
        cls, layout: Layout, dtypes: Precision, clip: Tensor, votes_at: Tensor | None
    ) -> Decisions:
        """Nothing decided yet; `clip` and `votes_at` are [K, L], `dtypes` that or [1, L]."""
        eps, smallest, limit = (each.contiguous().numpy() for each in (*dtypes, clip))
        levels = np.empty((0, 0)) if votes_at is None else votes_at.contiguous().numpy()
        numbers, flags = np.empty((3, *clip.shape)), np.empty((2, *clip.shape), np.int64)
        return cls(cuts_of(layout).ends, eps, smallest, limit, levels, numbers, flags)

    def stats(self) -> ClipStats:
        """The statistics as tensors that share the memory."""
        return ClipStats(*map(torch.from_numpy, (*self.numbers[:FACTOR], *self.flags)))


@jit
def decide(sums, units, p, decisions, row, layer):
    """`certified.clip_factors` and `ballots` of one row's layer, operation by operation."""
    norm1, norm = 0.0, 0.0
    for unit in range(units[layer], units[layer + 1]):
        norm1 += sums[0, row, unit]
        if p == 2:
            norm += sums[1, row, unit]
    norm = math.sqrt(norm) if p == 2 else norm1
    finite = math.isfinite(norm) and math.isfinite(norm1)
    clip, count = decisions.clip[row, layer], decisions.elements[layer]
    of = row if len(decisions.eps) > 1 else 0
    eps, smallest = decisions.eps[of, layer], decisions.smallest[of, layer]
    bound = norm * (1 + (count + 16) * 2.0**-52)
    clipped = bound > clip and finite
    factor = 1.0
    if clipped:
        factor = max(clip - count * smallest * eps, 0.0) / (bound * (1 + eps))
    decisions.numbers[FACTOR, row, layer] = factor if finite and factor >= _TINY else 0.0
    decisions.flags[CLIPPED, row, layer], decisions.flags[DEAD, row, layer] = clipped, not finite
    votes_at, vote = np.nan, 0.0
    if len(decisions.votes_at) > 0:
        votes_at = decisions.votes_at[row, layer]
    if finite and not math.isnan(votes_at):
        vote = 0.5 if norm1 <= votes_at else -0.5
    decisions.numbers[NORM1, row, layer], decisions.numbers[VOTES, row, layer] = norm1, vote


@jit
def decide_all(sums, units, p, decisions):
    """`decide` for every cell."""
    for row in range(len(decisions.clip)):
        for layer in range(len(units) - 1):
            decide(sums, units, p, decisions, row, layer)


class ReleaseCall(NamedTuple):
    """A release as compiled code takes it: few arrays, since each costs time to hand over.

    Attributes:
        packed: int64, `TensorTable.entries` row after row, then the words of
            `noise_plan.words_of`, then the bits of its coefficients.
        tensors: number of rows of `TensorTable.entries`.
        cuts: where walks over the layers are cut.
        kind: what noise is written.
        eps, smallest: float64 [1, L] or [K, L], precision of the outputs.
        p: norm of the clipping.
        clip, scale, clients: addresses of float64 [K, L] (twice) and int64 [K].
        votes_at: address of float64 [K, L], or 0.
        numbers, flags: float64 [3, K, L] and int64 [2, K, L] out, as in `Decisions`.
    """

    packed: np.ndarray
    tensors: int
    cuts: LayerCuts
    kind: NoiseKind
    eps: np.ndarray
    smallest: np.ndarray
    p: int
    clip: int
    scale: int
    clients: int
    votes_at: int
    numbers: np.ndarray
    flags: np.ndarray


@jit
def _opened(call):
    """The tensors, decisions and noise of a call."""
    shape, width = call.numbers.shape[1:], 8 * call.tensors
    bands = (len(call.packed) - width) // (STATE_WORDS + 1)
    words = call.packed[width : width + bands * STATE_WORDS].astype(np.uint32)
    table = call.packed[:width].reshape((call.tensors, 8))
    votes_at = carray(
        pointer(call.votes_at, np.float64), (shape[0] if call.votes_at else 0, shape[1])
    )
    decisions = Decisions(
        call.cuts.ends, call.eps, call.smallest, carray(pointer(call.clip, np.float64), shape),
        votes_at, call.numbers, call.flags,
    )  # fmt: skip
    plan = NoisePlan(
        carray(pointer(call.scale, np.float64), shape),
        carray(pointer(call.clients, np.int64), (shape[0],)),
        words.reshape((bands, STATE_WORDS)), call.packed[width + len(words) :].view(np.float64),
        call.kind,
    )  # fmt: skip
    return table, decisions, plan


@jit
def _privatize_rows(call, sums, begin, end):
    """Sum, decide and write the layers of rows begin .. end - 1, one after another."""
    cuts, (table, decisions, plan) = call.cuts, _opened(call)
    dead, factor = decisions.flags[DEAD], decisions.numbers[FACTOR]
    scratch = np.empty(SCRATCH, np.uint8)
    units, tiles, layers = cuts.chunks, cuts.tiles, len(cuts.ends)
    for row in range(begin, end):
        start, tile = row * units[layers], row * tiles[layers]
        for layer in range(layers):
            low, high = start + units[layer], start + units[layer + 1]
            sum_units(table, cuts.bounds, units, call.p, sums, scratch, low, high)
            decide(sums, units, call.p, decisions, row, layer)
            low, high = tile + tiles[layer], tile + tiles[layer + 1]
            write_units(table, cuts, dead, factor, plan, scratch, low, high)


@jit
def _sums_of(call):
    return np.zeros((2, call.numbers.shape[1], call.cuts.chunks[-1]))


@jit
def _sum_some(call, sums, begin, end):
    """Sums of some units of all rows."""
    sum_part(_opened(call)[0], call.cuts.bounds, call.cuts.chunks, call.p, sums, begin, end)


@jit
def _decide(call, sums):
    decide_all(sums, call.cuts.chunks, call.p, _opened(call)[1])


@jit
def _write_some(call, begin, end):
    """Write some tiles of all rows."""
    table, decisions, plan = _opened(call)
    write_part(table, call.cuts, decisions.flags[DEAD], decisions.numbers[FACTOR], plan, begin, end)


@jit
def _privatize(call, beside, threads, region):
    """Sum, decide and write: rows beside each other, or one after another on all threads."""
    rows, sums = call.numbers.shape[1], _sums_of(call)
    if threads == 1:
        # Not 0, for which numba would compile the part once more, as for a number of its own.
        _privatize_rows(call, sums, np.int64(0), rows)
    elif beside:
        parallel(_privatize_rows, (call, sums), rows, threads, region)
    else:
        parallel(_sum_some, (call, sums), sums[0].size, threads, region)
        _decide(call, sums)
        parallel(_write_some, (call,), rows * call.cuts.tiles[-1], threads, region)


def privatize(call: ReleaseCall) -> None:
    """Clip all rows and write them with noise; fills `numbers` and `flags`."""
    rows = call.numbers.shape[1]
    elements = NOISE_COST * rows * call.cuts.elements
    threads, region = region_for(elements)
    beside = rows // _ROWS_PER_THREAD >= threads
    if threads == 1 or region:
        _privatize(call, beside, threads, region)
        return
    # The same on threads that are not OpenMP's.
    sums = _sums_of(call)
    if beside:
        run_on_threads(partial(_privatize_rows, call, sums), rows, elements=elements)
        return
    run_on_threads(partial(_sum_some, call, sums), sums[0].size, elements=elements)
    _decide(call, sums)
    run_on_threads(partial(_write_some, call), rows * int(call.cuts.tiles[-1]), elements=elements)
