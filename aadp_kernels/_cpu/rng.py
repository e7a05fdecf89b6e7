"""ChaCha and Philox4x32 in numba: the words of `addresses`, a tile of 512 at a time.

A tile is words[r, c, t], 4 x 4 x 32. It holds 32 ChaCha blocks, word 4r + c of block t, or 128
Philox blocks, word c of block 32r + t. Either way word c of lane t belongs to element
128r + 4t + c of the fast form. 32 lanes let LLVM use vector instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from aadp_kernels._cpu._jit import jit, jit_inline, wide_vectors
from aadp_kernels.addresses import (
    CHACHA_CONSTANTS,
    PHILOX_MULTIPLIERS,
    PHILOX_WEYL,
    rounds_of,
    words_per_block,
)

LANES = 32
WORDS = 16 * LANES
STATE_WORDS = 24

_N = LANES
_U32 = np.uint32
_U64 = np.uint64
_LOW = np.uint64(0xFFFFFFFF)
_M0, _M1 = (np.uint64(m) for m in PHILOX_MULTIPLIERS)


@jit
def _quarter(a, b, c, d):
    a = _U32(a + b)
    d = _U32(d ^ a)
    d = _U32((d << _U32(16)) | (d >> _U32(16)))
    c = _U32(c + d)
    b = _U32(b ^ c)
    b = _U32((b << _U32(12)) | (b >> _U32(20)))
    a = _U32(a + b)
    d = _U32(d ^ a)
    d = _U32((d << _U32(8)) | (d >> _U32(24)))
    c = _U32(c + d)
    b = _U32(b ^ c)
    b = _U32((b << _U32(7)) | (b >> _U32(25)))
    return a, b, c, d


@jit
def _chacha(words, state, rounds):
    """32 ChaCha blocks; state: counter, constants, key."""
    wide_vectors()
    n = _N
    s0, s1, s2, s3, s4, s5 = state[4], state[5], state[6], state[7], state[8], state[9]
    s6, s7, s8, s9, s10, s11 = state[10], state[11], state[12], state[13], state[14], state[15]
    s12, s13, s14, s15 = state[0], state[1], state[2], state[3]
    for t in range(n):
        words[t], words[n + t], words[2 * n + t], words[3 * n + t] = s0, s1, s2, s3
        words[4 * n + t], words[5 * n + t], words[6 * n + t], words[7 * n + t] = s4, s5, s6, s7
        words[8 * n + t], words[9 * n + t], words[10 * n + t], words[11 * n + t] = s8, s9, s10, s11
        words[12 * n + t], words[13 * n + t] = _U32(s12 + _U32(t)), s13
        words[14 * n + t], words[15 * n + t] = s14, s15
    for _ in range(rounds // 4):
        for t in range(n):
            x0, x1, x2, x3 = words[t], words[n + t], words[2 * n + t], words[3 * n + t]
            x4, x5, x6, x7 = words[4 * n + t], words[5 * n + t], words[6 * n + t], words[7 * n + t]
            x8, x9 = words[8 * n + t], words[9 * n + t]
            x10, x11 = words[10 * n + t], words[11 * n + t]
            x12, x13 = words[12 * n + t], words[13 * n + t]
            x14, x15 = words[14 * n + t], words[15 * n + t]
            x0, x4, x8, x12 = _quarter(x0, x4, x8, x12)
            x1, x5, x9, x13 = _quarter(x1, x5, x9, x13)
            x2, x6, x10, x14 = _quarter(x2, x6, x10, x14)
            x3, x7, x11, x15 = _quarter(x3, x7, x11, x15)
            x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
            x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
            x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
            x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
            x0, x4, x8, x12 = _quarter(x0, x4, x8, x12)
            x1, x5, x9, x13 = _quarter(x1, x5, x9, x13)
            x2, x6, x10, x14 = _quarter(x2, x6, x10, x14)
            x3, x7, x11, x15 = _quarter(x3, x7, x11, x15)
            x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
            x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
            x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
            x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
            words[t], words[n + t], words[2 * n + t], words[3 * n + t] = x0, x1, x2, x3
            words[4 * n + t], words[5 * n + t], words[6 * n + t], words[7 * n + t] = x4, x5, x6, x7
            words[8 * n + t], words[9 * n + t] = x8, x9
            words[10 * n + t], words[11 * n + t] = x10, x11
            words[12 * n + t], words[13 * n + t] = x12, x13
            words[14 * n + t], words[15 * n + t] = x14, x15
    for t in range(n):
        words[t] += s0
        words[n + t] += s1
        words[2 * n + t] += s2
        words[3 * n + t] += s3
        words[4 * n + t] += s4
        words[5 * n + t] += s5
        words[6 * n + t] += s6
        words[7 * n + t] += s7
        words[8 * n + t] += s8
        words[9 * n + t] += s9
        words[10 * n + t] += s10
        words[11 * n + t] += s11
        words[12 * n + t] += _U32(s12 + _U32(t))
        words[13 * n + t] += s13
        words[14 * n + t] += s14
        words[15 * n + t] += s15


@jit
def _philox_round(x0, x1, x2, x3, k0, k1):
    """The words are the low halves; what stands above them is dropped by the next product."""
    p0 = _M0 * (x0 & _LOW)
    p1 = _M1 * (x2 & _LOW)
    return (p1 >> _U64(32)) ^ x1 ^ _U64(k0), p1, (p0 >> _U64(32)) ^ x3 ^ _U64(k1), p0


@jit
def _philox(words, state):
    """128 Philox blocks; state: counter, the keys of the rounds."""
    wide_vectors()
    n = _N
    k = state
    for r in range(4):
        w = 4 * n * r
        for t in range(n):
            x0, x1, x2, x3 = _U64(_U32(k[0] + _U32(n * r + t))), _U64(k[1]), _U64(k[2]), _U64(k[3])
            x0, x1, x2, x3 = _philox_round(x0, x1, x2, x3, k[4], k[5])
            x0, x1, x2, x3 = _philox_round(x0, x1, x2, x3, k[6], k[7])
            x0, x1, x2, x3 = _philox_round(x0, x1, x2, x3, k[8], k[9])
            x0, x1, x2, x3 = _philox_round(x0, x1, x2, x3, k[10], k[11])
            x0, x1, x2, x3 = _philox_round(x0, x1, x2, x3, k[12], k[13])
            x0, x1, x2, x3 = _philox_round(x0, x1, x2, x3, k[14], k[15])
            x0, x1, x2, x3 = _philox_round(x0, x1, x2, x3, k[16], k[17])
            x0, x1, x2, x3 = _philox_round(x0, x1, x2, x3, k[18], k[19])
            x0, x1, x2, x3 = _philox_round(x0, x1, x2, x3, k[20], k[21])
            x0, x1, x2, x3 = _philox_round(x0, x1, x2, x3, k[22], k[23])
            words[w + t], words[w + n + t] = _U32(x0), _U32(x1)
            words[w + 2 * n + t], words[w + 3 * n + t] = _U32(x2), _U32(x3)


@jit_inline
def fill_words(words, state, rounds, blocks):
    """The tile of uint32 [512] whose first block has the counter state[:4]."""
    if blocks == _N:
        _chacha(words, state, rounds)
    else:
        _philox(words, state)


class Generator(NamedTuple):
    """A named generator with its key, as the kernels take it.

    Attributes:
        state: uint32 [24]; 0 to 3 are the counter, the rest is secret.
        rounds: Rounds of the generator.
        blocks: Blocks of a tile, 32 for ChaCha and 128 for Philox.
    """

    state: np.ndarray
    rounds: int
    blocks: int

    @classmethod
    def build(cls, rng: str, key: Sequence[int], step: int = 0) -> Generator:
        """The generator `rng` with the counter (0, step, 0, 0)."""
        return cls(np.array(first_words(rng, key, step), np.uint32), *rounds_and_blocks(rng))


@cache
def rounds_and_blocks(rng: str) -> tuple[int, int]:
    """Rounds of a generator, and its blocks of a tile."""
    return rounds_of(rng), WORDS // words_per_block(rng)


def first_words(rng: str, key: Sequence[int], step: int) -> list[int]:
    """The 24 words of a state of `Generator` with the counter (0, step, 0, 0)."""
    words = [0, step, 0, 0]
    if rng.startswith("chacha"):
        words += *CHACHA_CONSTANTS, *key
    else:
        a, b = key
        for r in range(10):
            words += (a + r * PHILOX_WEYL[0]) & 0xFFFFFFFF, (b + r * PHILOX_WEYL[1]) & 0xFFFFFFFF
    return words + [0] * (STATE_WORDS - len(words))
