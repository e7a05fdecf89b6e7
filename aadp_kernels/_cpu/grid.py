"""Integer noise on the grid in numba: exactly the specification's integers, a tile at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from aadp_kernels._cpu._jit import jit, jit_inline, leading_zeros, wide_vectors
from aadp_kernels._cpu.rng import LANES, WORDS, Generator, fill_words
from aadp_kernels._cpu.transform import log
from aadp_kernels.addresses import DOMAINS, LAYER_BITS
from aadp_kernels.contract import Noise
from aadp_kernels.grid import ATTEMPTS, MAX_OCTAVES, TAIL_DOMAINS
from aadp_kernels.grid_law import DIGIT_BITS, OCTAVE_BITS, thresholds

_LN2 = math.log(2)
_LAST_DIGIT = (1 << DIGIT_BITS) - 1
_TO_TAIL = (DOMAINS["grid_laplace_tail"] - DOMAINS["grid_laplace"]) << LAYER_BITS
_U64 = np.uint64


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Thresholds uint64 [3, 1025], and how many of them are at most v 2^54: int64 [3, 1024].

    No more than two thresholds have the same first ten bits; the last two are no thresholds.
    """
    tables = np.full((3, (1 << DIGIT_BITS) + 1), np.iinfo(np.uint64).max, dtype=np.uint64)
    tables[:, :-2] = np.array(thresholds(), dtype=np.uint64)
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
    def build(cls, noise: Noise, layers: Sequence[int]) -> Source:
        """For some layers of some clients."""
        gaussian = noise.mechanism == "gaussian"
        words = np.array(layers, np.int64) + (DOMAINS[f"grid_{noise.mechanism}"] << LAYER_BITS)
        return cls(
            *Generator.build(noise.rng, noise.key_words, int(noise.step)), gaussian,
            WORDS // (16 if gaussian else 8), noise.clients.numpy(), words, *_tables(),
        )  # fmt: skip

    def own(self) -> Source:
        """For one thread: the state changes in use."""
        return self._replace(state=self.state.copy())


@jit
def draw_tile(own, source, row, layer, tile):
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
