"""ChaCha and Philox4x32 in numba: the words of `_torch.rng`, tile by tile.

A tile is 4 quads x 4 words x 64 lanes of words. It holds 64 ChaCha blocks, quad q of a block being
its words 4q to 4q + 3, or 256 Philox blocks, block 64 q + j in lane j of quad q. Fixed lanes let
LLVM use vector instructions. Counters are [4, blocks] a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu._jit import jit
from aadp_kernels._torch.rng import words_per_block

# Frozen into the cached kernels of noise.py and privatize.py: a change here must change them too.
LANES = 64
WORDS = 16 * LANES

_U32 = np.uint32
_U64 = np.uint64
_C0, _C1, _C2, _C3 = (np.uint32(c) for c in (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574))
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)


@jit
def fill_counters(counters, lanes, clients, step, layer, first, per_row, begin, blocks):
    """Counters of the blocks begin .. begin + blocks - 1 of rows that have `per_row` blocks each.

    Block b of row k counts (first + b, step, clients[k], layer).
    """
    row, column, t = begin // per_row, begin % per_row, 0
    while t < blocks:
        run = min(min(blocks - t, per_row - column), lanes - t % lanes)
        base = t // lanes * 4 * lanes + t % lanes
        client = _U32(clients[row])
        for j in range(run):
            counters[base + j] = _U32(first + column + j)
            counters[base + lanes + j] = _U32(step)
            counters[base + 2 * lanes + j] = client
            counters[base + 3 * lanes + j] = _U32(layer)
        t += run
        column += run
        if column == per_row:
            column = 0
            row += 1


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
def chacha_tiles(words, counters, key, rounds, tiles):
    """`tiles` tiles of ChaCha blocks: words uint32 [1024 tiles], counters uint32 [256 tiles]."""
    n = LANES
    for tile in range(tiles):
        w, count = tile * WORDS, tile * 4 * LANES
        for j in range(n):
            words[w + j] = _C0
            words[w + n + j] = _C1
            words[w + 2 * n + j] = _C2
            words[w + 3 * n + j] = _C3
        for i in range(8):
            for j in range(n):
                words[w + (4 + i) * n + j] = key[i]
        for j in range(4 * n):
            words[w + 12 * n + j] = counters[count + j]
        for _ in range(rounds // 2):
            for t in range(w, w + n):
                x0, x1, x2, x3 = words[t], words[t + n], words[t + 2 * n], words[t + 3 * n]
                x4, x5 = words[t + 4 * n], words[t + 5 * n]
                x6, x7 = words[t + 6 * n], words[t + 7 * n]
                x8, x9 = words[t + 8 * n], words[t + 9 * n]
                x10, x11 = words[t + 10 * n], words[t + 11 * n]
                x12, x13 = words[t + 12 * n], words[t + 13 * n]
                x14, x15 = words[t + 14 * n], words[t + 15 * n]
                x0, x4, x8, x12 = _quarter(x0, x4, x8, x12)
                x1, x5, x9, x13 = _quarter(x1, x5, x9, x13)
                x2, x6, x10, x14 = _quarter(x2, x6, x10, x14)
                x3, x7, x11, x15 = _quarter(x3, x7, x11, x15)
                x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
                x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
                x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
                x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
                words[t], words[t + n], words[t + 2 * n], words[t + 3 * n] = x0, x1, x2, x3
                words[t + 4 * n], words[t + 5 * n] = x4, x5
                words[t + 6 * n], words[t + 7 * n] = x6, x7
                words[t + 8 * n], words[t + 9 * n] = x8, x9
                words[t + 10 * n], words[t + 11 * n] = x10, x11
                words[t + 12 * n], words[t + 13 * n] = x12, x13
                words[t + 14 * n], words[t + 15 * n] = x14, x15
        for j in range(n):
            words[w + j] += _C0
            words[w + n + j] += _C1
            words[w + 2 * n + j] += _C2
            words[w + 3 * n + j] += _C3
        for i in range(8):
            for j in range(n):
                words[w + (4 + i) * n + j] += key[i]
        for j in range(4 * n):
            words[w + 12 * n + j] += counters[count + j]


@jit
def _philox_round(x0, x1, x2, x3, k0, k1):
    p0 = _M0 * _U64(x0)
    p1 = _M1 * _U64(x2)
    y0 = _U32(_U32(p1 >> _U64(32)) ^ x1 ^ k0)
    y2 = _U32(_U32(p0 >> _U64(32)) ^ x3 ^ k1)
    return y0, _U32(p1), y2, _U32(p0)


@jit
def philox_tiles(words, counters, key, rounds, tiles):
    """`tiles` tiles of Philox blocks: words and counters uint32 [1024 tiles]."""
    n = LANES
    k = np.empty((10, 2), np.uint32)
    for r in range(10):
        k[r, 0] = key[0] + _U32(r) * _W0
        k[r, 1] = key[1] + _U32(r) * _W1
    for quad in range(4 * tiles):
        w = quad * 4 * n
        count = (quad // 4) * 16 * n + (quad % 4) * n
        for j in range(n):
            words[w + j] = counters[count + j]
            words[w + n + j] = counters[count + 4 * n + j]
            words[w + 2 * n + j] = counters[count + 8 * n + j]
            words[w + 3 * n + j] = counters[count + 12 * n + j]
        for r in range(0, rounds - 1, 2):
            a0, a1, b0, b1 = k[r, 0], k[r, 1], k[r + 1, 0], k[r + 1, 1]
            for t in range(w, w + n):
                x0, x1, x2, x3 = words[t], words[t + n], words[t + 2 * n], words[t + 3 * n]
                x0, x1, x2, x3 = _philox_round(x0, x1, x2, x3, a0, a1)
                x0, x1, x2, x3 = _philox_round(x0, x1, x2, x3, b0, b1)
                words[t], words[t + n], words[t + 2 * n], words[t + 3 * n] = x0, x1, x2, x3
        if rounds % 2:
            a0, a1 = k[rounds - 1, 0], k[rounds - 1, 1]
            for t in range(w, w + n):
                x0, x1, x2, x3 = words[t], words[t + n], words[t + 2 * n], words[t + 3 * n]
                x0, x1, x2, x3 = _philox_round(x0, x1, x2, x3, a0, a1)
                words[t], words[t + n], words[t + 2 * n], words[t + 3 * n] = x0, x1, x2, x3


class Generator:
    """A named generator with its key, for whole tiles of blocks.

    Attributes:
        per_block: Elements (pairs of words) of one block.
        lanes: Blocks of one tile.
    """

    def __init__(self, rng: str, key: Sequence[int]) -> None:
        secure = rng.startswith("chacha")
        self.per_block = words_per_block(rng) // 2
        self.lanes = WORDS // words_per_block(rng)
        self._rounds = int(rng.removeprefix("chacha" if secure else "philox"))
        self._tiles = chacha_tiles if secure else philox_tiles
        self._key = np.array(key, dtype=np.uint32)

    def generate(self, words: np.ndarray, counters: np.ndarray, tiles: int) -> None:
        """Fill the first `tiles` tiles of `words`."""
        self._tiles(words, counters, self._key, self._rounds, tiles)


def random_words(rng: str, key: Sequence[int], counters: Tensor) -> Tensor:
    """`_torch.rng.random_words`: int32 counters [4, n] -> int32 [words_per_block(rng), n]."""
    generator = Generator(rng, key)
    n, lanes = counters.shape[1], generator.lanes
    tiles = -(-n // lanes)
    padded = np.zeros((4, tiles * lanes), dtype=np.uint32)
    padded[:, :n] = counters.contiguous().numpy().view(np.uint32)
    packed = np.ascontiguousarray(padded.reshape(4, tiles, lanes).transpose(1, 0, 2)).reshape(-1)
    words = np.empty(tiles * WORDS, dtype=np.uint32)
    generator.generate(words, packed, tiles)
    width = 2 * generator.per_block
    if width == 16:
        blocks = words.reshape(tiles, 16, LANES).transpose(1, 0, 2)
    else:
        blocks = words.reshape(4 * tiles, 4, LANES).transpose(1, 0, 2)
    return torch.from_numpy(blocks.reshape(width, -1)[:, :n].astype(np.uint32).view(np.int32))
