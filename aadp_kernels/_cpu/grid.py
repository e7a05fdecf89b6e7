"""Integer noise on the grid in numba: exactly the integers of `_torch.grid`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu._jit import jit, jit_inline, leading_zeros, wide_vectors
from aadp_kernels._cpu._threads import spread
from aadp_kernels._cpu.clip import DEAD, FACTOR, Cells, decide_all
from aadp_kernels._cpu.passes import (
    load_difference,
    store,
    unit_sums,
)
from aadp_kernels._cpu.pieces import FIRST, SIZE, Pieces
from aadp_kernels._cpu.rng import LANES, WORDS, Generator, fill_words
from aadp_kernels._cpu.transform import log
from aadp_kernels._torch import grid as _torch
from aadp_kernels._torch.grid import (
    ATTEMPTS,
    DIGIT_BITS,
    LIMIT,
    MAX_OCTAVES,
    OCTAVE_BITS,
    TAIL_DOMAINS,
)
from aadp_kernels._torch.noise import DOMAINS, LAYER_BITS, Segment
from aadp_kernels._torch.privatize import ClipStats, Noise, Precision, by_rows
from aadp_kernels.layout import Layout

_LN2, _MAX_WEIGHT, _FLOAT_LIMIT = _torch._LN2, _torch._MAX_WEIGHT, float(LIMIT)
_LAST_DIGIT = (1 << DIGIT_BITS) - 1
_TO_TAIL = (DOMAINS["grid_laplace_tail"] - DOMAINS["grid_laplace"]) << LAYER_BITS
_U64 = np.uint64


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Thresholds uint64 [3, 1025], and how many of them are at most v 2^54: int64 [3, 1024].

    No more than two thresholds have the same first ten bits; the last two are no thresholds.
    """
    tables = np.full((3, (1 << DIGIT_BITS) + 1), np.iinfo(np.uint64).max, dtype=np.uint64)
    tables[:, :-2] = np.array(_torch.thresholds(), dtype=np.uint64)
    begins = np.arange(1 << DIGIT_BITS, dtype=np.uint64) << np.uint64(64 - DIGIT_BITS)
    guides = [np.searchsorted(table[:-2], begins, side="right") for table in tables]
    return tables, np.array(guides, dtype=np.int64)


@jit_inline
def _number(words, blocks, need, e, i):
    """64 bits of the words i and i + 1 of the e-th element of a tile, the first word high."""
    if blocks == LANES:
        w = (need * e % 16 + i) * LANES + need * e // 16
    else:
        block = (need * e + i) // 4
        w = (block // LANES * 4 + i % 4) * LANES + block % LANES
    return (_U64(words[w]) << _U64(32)) | _U64(words[w + LANES])


@jit_inline
def _digit(number, table, guide):
    """How many thresholds are at most the number."""
    first = guide[np.int64(number >> _U64(64 - DIGIT_BITS))]
    more = np.int64(table[first] <= number) + np.int64(table[first + 1] <= number)
    return min(first + more, _LAST_DIGIT)


@jit
def _numbers(numbers, words, blocks, need, i):
    """`_number` of all elements of a tile."""
    wide_vectors()
    if blocks == LANES:
        per_block = 16 // need
        for part in range(per_block):
            w = (need * part + i) * LANES
            for t in range(LANES):
                low = _U64(words[w + LANES + t])
                numbers[per_block * t + part] = (_U64(words[w + t]) << _U64(32)) | low
    else:
        for e in range(len(numbers)):
            numbers[e] = _number(words, blocks, need, e, i)


@jit
def _proposals(magnitudes, signs, numbers, words, blocks, need, tables, guides):
    """H T + R and sign bits of all elements of a tile; returns the largest H."""
    wide_vectors()
    _numbers(numbers, words, blocks, need, 0)
    most = 0
    for e in range(len(numbers)):
        octaves = min(63, leading_zeros(numbers[e] << _U64(1)))
        most = max(most, octaves)
        magnitudes[e], signs[e] = octaves, numbers[e] >> _U64(63)
    for j in range(3):
        _numbers(numbers, words, blocks, need, 2 * j + 2)
        table, guide = tables[j], guides[j]
        for e in range(len(numbers)):
            magnitudes[e] = (magnitudes[e] << DIGIT_BITS) + _digit(numbers[e], table, guide)
    return most


@jit
def _accepted(good, numbers, magnitudes, words, blocks):
    """Whether -ln U > (g - ln 2)^2 / 2 for g = magnitude / T, of all elements of a tile."""
    wide_vectors()
    _numbers(numbers, words, blocks, 16, 10)
    for e in range(len(numbers)):
        x = np.float64(magnitudes[e]) * 2.0**-OCTAVE_BITS - _LN2
        x = x * x * 0.5
        fraction = np.int64(numbers[e] >> _U64(11))
        mantissa = (np.float64(fraction) + 0.5) * 2.0**-54 + 0.5
        zeros = np.float64(leading_zeros(_number(words, blocks, 16, e, 8)))
        good[e] = zeros * _LN2 - log(mantissa) > x


@jit
def _more_octaves(words, state, rounds, blocks, e):
    """Octaves of an element whose first 63 bits are zero; `words` is scratch, `state` changes."""
    octaves = 63
    for _ in range(TAIL_DOMAINS):
        fill_words(words, state, rounds, blocks)
        for i in range(0, 8, 2):
            zeros = leading_zeros(_number(words, blocks, 8, e, i))
            octaves += zeros
            if zeros < 64:
                return octaves
        state[3] += np.uint32(1 << LAYER_BITS)
    return octaves


class Scratch(NamedTuple):
    """Memory of one thread: words uint32 [512], the rest one entry an element of a tile."""

    words: np.ndarray
    spare: np.ndarray
    numbers: np.ndarray
    magnitudes: np.ndarray
    signs: np.ndarray
    good: np.ndarray
    done: np.ndarray
    values: np.ndarray

    @classmethod
    def build(cls, per_tile: int) -> Scratch:
        words = (np.empty(WORDS, np.uint32) for _ in range(2))
        kinds = (np.uint64, np.int64, np.uint64, np.bool_, np.bool_, np.int64)
        return cls(*words, *(np.empty(per_tile, kind) for kind in kinds))


@jit
def _laplace_tile(own, state, rounds, blocks, tables, guides):
    """The tile at `state` into own.values."""
    wide_vectors()
    fill_words(own.words, state, rounds, blocks)
    values, magnitudes, signs = own.values, own.magnitudes, own.signs
    most = _proposals(magnitudes, signs, own.numbers, own.words, blocks, 8, tables, guides)
    if most == 63:
        domain = state[3]
        for e in range(len(values)):
            if magnitudes[e] >> OCTAVE_BITS == 63:
                state[3] = np.uint32(domain + np.uint32(_TO_TAIL))
                octaves = _more_octaves(own.spare, state, rounds, blocks, e)
                remainder = magnitudes[e] & ((1 << OCTAVE_BITS) - 1)
                remainder = 0 if octaves == MAX_OCTAVES else remainder
                magnitudes[e] = (octaves << OCTAVE_BITS) + remainder
        state[3] = domain
    for e in range(len(values)):
        flip = -np.int64(signs[e])  # -1 - m is m with every bit flipped
        values[e] = magnitudes[e] ^ flip


@jit
def _gaussian_tile(own, state, rounds, blocks, tables, guides):
    """The tile at `state` into own.values; zero for what no attempt gave."""
    domain, waiting = state[3], len(own.values)
    own.done[:] = False
    own.values[:] = 0
    for attempt in range(ATTEMPTS):
        if waiting == 0:
            break
        state[3] = np.uint32(domain + (attempt << LAYER_BITS))
        fill_words(own.words, state, rounds, blocks)
        magnitudes, signs = own.magnitudes, own.signs
        _proposals(magnitudes, signs, own.numbers, own.words, blocks, 16, tables, guides)
        _accepted(own.good, own.numbers, magnitudes, own.words, blocks)
        for e in range(len(own.values)):
            size, negative = magnitudes[e], signs[e] == 1
            if own.good[e] and not own.done[e] and not (negative and size == 0):
                own.values[e] = -size if negative else size
                own.done[e] = True
                waiting -= 1
    state[3] = domain


class Source(NamedTuple):
    """Where integers come from.

    Attributes:
        state, rounds, blocks: `Generator`; state 0, 2 and 3 are set for each tile.
        gaussian: Discrete Gaussian, or the floor of a Laplace variable.
        per_tile: Elements of 512 words.
        clients: int64 [K] ids.
        layer_words: int64 [L], the word of the address that names layer and domain.
        tables, guides: `_tables`.
    """

    state: np.ndarray
    rounds: int
    blocks: int
    gaussian: bool
    per_tile: int
    clients: np.ndarray
    layer_words: np.ndarray
    tables: np.ndarray
    guides: np.ndarray

    @classmethod
    def build(
        cls, rng: str, key: Sequence[int], step: int, mechanism: str, clients: Tensor,
        layers: Sequence[int],
    ) -> Source:  # fmt: skip
        """For some layers of some clients."""
        gaussian = mechanism == "gaussian"
        words = np.array(layers, np.int64) + (DOMAINS[f"grid_{mechanism}"] << LAYER_BITS)
        return cls(
            *Generator.build(rng, key, step), gaussian, WORDS // (16 if gaussian else 8),
            clients.numpy(), words, *_tables(),
        )  # fmt: skip

    def own(self) -> Source:
        """For one thread: the state changes in use."""
        return self._replace(state=self.state.copy())


@jit
def _draw(own, source, row, layer, tile):
    """Integers of a tile into own.values."""
    state = source.state
    state[0] = np.uint32(tile * source.blocks)
    state[2] = np.uint32(source.clients[row])
    state[3] = np.uint32(source.layer_words[layer])
    rounds, blocks, tables, guides = source.rounds, source.blocks, source.tables, source.guides
    if source.gaussian:
        _gaussian_tile(own, state, rounds, blocks, tables, guides)
    else:
        _laplace_tile(own, state, rounds, blocks, tables, guides)


@jit
def integer_units(out, start, source, own, begin, end):
    """Tiles of the rows of `out`, int64 [K, n] of one layer, whose column 0 is element `start`."""
    per_tile = len(own.values)
    first = start // per_tile
    per_row = -(-(start + out.shape[1]) // per_tile) - first
    for unit in range(begin, end):
        row, tile = unit // per_row, first + unit % per_row
        low = tile * per_tile - start
        _draw(own, source, row, 0, tile)
        for e in range(max(0, -low), min(per_tile, out.shape[1] - low)):
            out[row, low + e] = own.values[e]


def integer_noise(
    rng: str,
    key_words: Sequence[int],
    segments: Sequence[Segment],
    clients: Tensor,
    *,
    step: int | Tensor,
    mechanism: str,
) -> list[Tensor]:
    """`_torch.grid.integer_noise`: int64 [K, count] for every (layer, offset, count)."""
    results = []
    for layer, start, count in segments:
        out = torch.zeros((len(clients), count), dtype=torch.int64)
        results.append(out)
        if out.numel() == 0:
            continue
        source = Source.build(rng, key_words, int(step), mechanism, clients, [layer])
        array = out.numpy()

        def work(begin: int, end: int, array=array, start=start, source=source) -> None:
            integer_units(array, start, source.own(), Scratch.build(source.per_tile), begin, end)

        per_row = -(-(start + count) // source.per_tile) - start // source.per_tile
        spread(work, len(clients) * per_row, elements=8 * out.numel())
    return results


@jit
def _release(x, count, weight, values, at, quantum, offset):
    """x = (trunc(x * weight) + values + offset) * quantum, integers within LIMIT."""
    for i in range(count):
        cut = np.int64(min(max(x[i] * weight, -_FLOAT_LIMIT), _FLOAT_LIMIT))
        noised = min(max(cut + values[at + i], -LIMIT), LIMIT)
        x[i] = (np.float64(noised) + offset) * quantum


@jit
def write_units(pieces, bounds, units, cells, quanta, offset, source, own, begin, end):
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
            _draw(own, source, row, layer, tile)
        for k in range(bounds[layer], bounds[layer + 1]):
            first, size = pieces[k, FIRST], pieces[k, SIZE]
            start, end_of = max(0, low - first), min(size, low + per_tile - first)
            count = end_of - start
            if count <= 0:
                continue
            if cells.flags[DEAD, row, layer]:
                x[:count] = 0.0
            else:
                load_difference(x, minus, pieces, k, row, start, count)
            if quantum > 0:
                weight = min(cells.numbers[FACTOR, row, layer] / quantum, _MAX_WEIGHT)
                _release(x, count, weight, own.values, first + start - low, quantum, offset)
            else:
                x[:count] *= cells.numbers[FACTOR, row, layer]
            store(x, pieces, k, row, start, count)
        column += 1
        if column == per_row:
            row, column, layer = row + 1, 0, 0


@by_rows
def privatize(
    pieces: Pieces, layout: Layout, dtypes: Precision, noise: Noise, *,
    clip: Tensor, scale: Tensor, p: int, votes_at: Tensor | None,
) -> ClipStats:  # fmt: skip
    """`_cpu.privatize.privatize` on the grid: exactly `_torch.privatize` but for the norms."""
    rows, elements = len(clip), len(clip) * sum(layout.dims)
    exact = torch.finfo(torch.float64)
    dtypes = Precision(
        torch.where(scale == 0, dtypes.eps, exact.eps),
        torch.where(scale == 0, dtypes.smallest_normal, exact.smallest_normal),
    )
    frame, cells = pieces.frame, Cells.build(layout, dtypes, clip, votes_at)
    decide_all(unit_sums(pieces, rows, p), frame.chunks, p, cells)
    source = Source.build(
        noise.rng, noise.key_words, int(noise.step), noise.mechanism, noise.clients,
        range(layout.num_layers),
    )  # fmt: skip
    units = np.zeros(layout.num_layers + 1, np.int64)
    np.cumsum(-(-frame.ends // source.per_tile), out=units[1:])
    quanta = _torch.quantum(scale, noise.mechanism).contiguous().numpy()
    offset = _torch.OFFSETS[noise.mechanism]

    def work(begin: int, end: int) -> None:
        write_units(
            pieces.table, frame.bounds, units, cells, quanta, offset, source.own(),
            Scratch.build(source.per_tile), begin, end,
        )  # fmt: skip

    spread(work, rows * int(units[-1]), elements=8 * elements)
    return cells.stats()


class GridNoise(Noise):
    """Noise of a release whose integers are drawn here."""

    __slots__ = ()

    def integers(self, segments: Sequence[Segment]) -> list[Tensor]:
        """Noise in quanta of the segments."""
        return integer_noise(
            self.rng, self.key_words, segments, self.clients, step=self.step,
            mechanism=self.mechanism,
        )  # fmt: skip


def scaled_noise(
    rng: str,
    key_words: Sequence[int],
    segment: Segment,
    clients: Tensor,
    *,
    step: int | Tensor,
    mechanism: str,
    form: str,
    scale: float | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`_torch.grid.scaled_noise`: noise of a scale in `dtype`, or quanta with int64: [K, count]."""
    (noise,) = integer_noise(rng, key_words, [segment], clients, step=step, mechanism=mechanism)
    if dtype == torch.int64:
        return noise
    size = _torch.quantum(torch.as_tensor(scale, dtype=torch.float64), mechanism)
    return ((noise.to(torch.float64) + _torch.OFFSETS[mechanism]) * size).to(dtype)
