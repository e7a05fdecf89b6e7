"""Gaussian and Laplace noise and coins in numba, with the bits of `_torch.noise`.

The transforms do the operations of `_torch.noise` in the same order, each with its own rounding as
IEEE 754 fixes it. Only a few tiles of words and noise are held in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu._jit import jit, spread
from aadp_kernels._cpu.rng import LANES, WORDS, Generator, fill_counters
from aadp_kernels._torch.noise import DOMAINS, LAYER_BITS, Segment

# Tiles a pass: few enough for the second-level cache, many enough to hide Python's calls.
_TILES = 32

_LN2 = math.log(2)
_ANGLE = math.pi / 4 * 2.0**-31
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD
_ATANH = tuple(2 / (2 * k + 1) for k in range(12))
_SIN = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(9))
_COS = tuple((-1.0) ** k / math.factorial(2 * k) for k in range(9))

STORE, SCALE, SUBTRACT = 0, 1, 2


@jit
def _log(x):
    bits = np.float64(x).view(np.int64)
    exponent = (bits - _SQRT_HALF_BITS) >> 52
    m = np.int64(bits - (exponent << 52)).view(np.float64)
    s = (m - 1.0) / (m + 1.0)
    y = s * s
    r = y * _ATANH[11] + _ATANH[10]
    r = r * y + _ATANH[9]
    r = r * y + _ATANH[8]
    r = r * y + _ATANH[7]
    r = r * y + _ATANH[6]
    r = r * y + _ATANH[5]
    r = r * y + _ATANH[4]
    r = r * y + _ATANH[3]
    r = r * y + _ATANH[2]
    r = r * y + _ATANH[1]
    r = r * y + _ATANH[0]
    return np.float64(np.int32(exponent)) * _LN2 + s * r


@jit
def _horner(y, c):
    r = y * c[8] + c[7]
    r = r * y + c[6]
    r = r * y + c[5]
    r = r * y + c[4]
    r = r * y + c[3]
    r = r * y + c[2]
    r = r * y + c[1]
    return r * y + c[0]


@jit
def _interleave(rows, noise, at, per_block):
    """The 8 rows of lanes of a tile in the order of the elements."""
    n = LANES
    if per_block == 8:
        for j in range(n):
            for i in range(8):
                noise[at + 8 * j + i] = rows[i * n + j]
    else:
        for quad in range(4):
            for j in range(n):
                noise[at + 2 * (quad * n + j)] = rows[2 * quad * n + j]
                noise[at + 2 * (quad * n + j) + 1] = rows[(2 * quad + 1) * n + j]


@jit
def gaussian_tiles(words, noise, per_block, tiles):
    """Box-Muller: signed int32 [1024 tiles] -> float64 [512 tiles]."""
    n = LANES
    rows = np.empty(8 * n, np.float64)
    for tile in range(tiles):
        for quad in range(4):
            w, z = tile * WORDS + 4 * n * quad, 2 * n * quad
            for j in range(n):
                u = np.float64(words[w + j]) + 2.0**31
                u += (np.float64(words[w + n + j]) + (2.0**31 + 1)) * 2.0**-32
                rows[z + j] = math.sqrt(_log(u * 2.0**-32) * -2.0)
            for j in range(n):
                low = words[w + 3 * n + j]
                phi = np.float64(words[w + 2 * n + j]) + 0.5
                phi = (phi + np.float64(np.int32(low & np.int32(-4))) * 2.0**-32) * _ANGLE
                y = phi * phi
                sine = _horner(y, _SIN) * phi * rows[z + j]
                cosine = _horner(y, _COS) * rows[z + j]
                cosine *= np.float64(np.int32(np.int32(1) - (low & np.int32(2))))
                swap = (low & np.int32(1)) != 0
                rows[z + j] = sine if swap else cosine
                rows[z + n + j] = cosine if swap else sine
        _interleave(rows, noise, tile * 8 * n, per_block)


@jit
def laplace_tiles(words, noise, per_block, tiles):
    """A sign bit and 63 bits of uniform an element: signed int32 [1024 tiles] -> [512 tiles]."""
    n = LANES
    rows = np.empty(8 * n, np.float64)
    for tile in range(tiles):
        for pair in range(8):
            w, z = tile * WORDS + 2 * n * pair, n * pair
            for j in range(n):
                low = words[w + n + j]
                u = np.float64(words[w + j]) + 2.0**31
                u += (np.float64(np.int32(low >> np.int32(1))) + (2.0**30 + 1)) * 2.0**-31
                sign = np.float64(np.int32((low & np.int32(1)) * np.int32(2) - np.int32(1)))
                rows[z + j] = _log(u * 2.0**-32) * sign
        _interleave(rows, noise, tile * 8 * n, per_block)


@jit
def add_noise(
    out, value, reference, factor, scale, mode, noise, per_block, start, per_row, begin, blocks
):
    """Write the elements of the blocks begin .. begin + blocks - 1 of the rows of `out` [K, n].

    STORE: out = noise * scale; SCALE: out = value * factor + noise * scale; SUBTRACT: the same with
    value - reference. A factor of NaN gives zeros, a scale of zero keeps every bit of the value.
    """
    n = out.shape[1]
    row, column, t = begin // per_row, begin % per_row, 0
    while t < blocks:
        run = min(blocks - t, per_row - column)
        e = (start // per_block + column) * per_block - start
        z = t * per_block - e
        low, high = max(0, e), min(n, e + run * per_block)
        weight, size = factor[row], scale[row]
        if mode == STORE:
            for i in range(low, high):
                out[row, i] = noise[z + i] * size
        elif np.isnan(weight):
            for i in range(low, high):
                out[row, i] = 0.0 + noise[z + i] * size if size > 0 else 0.0
        elif mode == SCALE:
            for i in range(low, high):
                x = np.float64(value[row, i]) * weight
                out[row, i] = x + noise[z + i] * size if size > 0 else x
        else:
            for i in range(low, high):
                x = (np.float64(value[row, i]) - np.float64(reference[i])) * weight
                out[row, i] = x + noise[z + i] * size if size > 0 else x
        t += run
        column = 0
        row += 1


@jit
def flip_coins(out, limit, always, words, per_block, per_row, begin, blocks):
    """The coins of the blocks begin .. begin + blocks - 1 of the rows of `out`, bool [K, n]."""
    n = out.shape[1]
    row, column = begin // per_row, begin % per_row
    for t in range(blocks):
        w = (t // LANES) * 2 * per_block * LANES + t % LANES
        e = column * per_block
        for i in range(min(per_block, n - e)):
            high = np.uint64(words[w + 2 * i * LANES]) & np.uint64(0x7FFFFFFF)
            bits = (high << np.uint64(32)) | np.uint64(words[w + (2 * i + 1) * LANES])
            out[row, e + i] = always[row] or bits < limit[row]
        column += 1
        if column == per_row:
            column = 0
            row += 1


def write_noise(
    out: Tensor,
    *,
    scale: np.ndarray,
    rng: str,
    key_words: Sequence[int],
    mechanism: str,
    step: int,
    clients: np.ndarray,
    layer: int,
    start: int,
    value: Tensor | None = None,
    reference: Tensor | None = None,
    factor: np.ndarray | None = None,
) -> None:
    """Fill `out` [K, n] with scale * noise, plus factor * (value - reference) where there is one.

    All tensors are contiguous and of one dtype, float32 or float64; `value` is [K, n], `reference`
    [n]; `scale`, `factor` float64 [K]; `start` is the address of column 0. A layer in which no
    scale is positive draws nothing.
    """
    if out.numel() == 0:
        return
    array = out.numpy()
    mode = STORE if value is None else SCALE if reference is None else SUBTRACT
    values = array if value is None else value.numpy()
    references = array[0, :0] if reference is None else reference.numpy()
    factors = scale if factor is None else factor
    generator = Generator(rng, key_words)
    per_block, lanes = generator.per_block, generator.lanes
    first = start // per_block
    per_row = -(-(start + out.shape[1]) // per_block) - first
    silent = value is not None and not (scale > 0).any()
    transform = gaussian_tiles if mechanism == "gaussian" else laplace_tiles
    word = layer + (DOMAINS[mechanism] << LAYER_BITS)

    def work(begin: int, end: int) -> None:
        most = min(_TILES, -(-(end - begin) // lanes))
        counters = np.empty(4 * most * lanes, np.uint32)
        words = np.empty(most * WORDS, np.uint32)
        noise = np.zeros(most * WORDS // 2)
        for at in range(begin, end, most * lanes):
            blocks = min(most * lanes, end - at)
            tiles = -(-blocks // lanes)
            if not silent:
                fill_counters(counters, lanes, clients, step, word, first, per_row, at, blocks)
                generator.generate(words, counters, tiles)
                transform(words.view(np.int32), noise, per_block, tiles)
            add_noise(
                array, values, references, factors, scale, mode, noise, per_block, start, per_row,
                at, blocks,
            )  # fmt: skip

    spread(work, len(clients) * per_row, align=lanes, elements=out.numel())


def scaled_noise(
    rng: str,
    key_words: Sequence[int],
    segment: Segment,
    clients: Tensor,
    *,
    step: int,
    mechanism: str,
    form: str,
    scale: float | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`_torch.noise.scaled_noise`: noise of a scale in `dtype`, [K, count]."""
    if isinstance(scale, Tensor) or dtype not in (torch.float32, torch.float64):
        (noise,) = standard_noise(
            rng, key_words, [segment], clients, step=step, mechanism=mechanism, form=form
        )
        return (noise * scale).to(dtype)
    layer, offset, count = segment
    out = torch.empty((len(clients), count), dtype=dtype)
    write_noise(
        out, scale=np.full(len(clients), scale), rng=rng, key_words=key_words, mechanism=mechanism,
        step=step, clients=np.ascontiguousarray(clients.numpy()), layer=layer, start=offset,
    )  # fmt: skip
    return out


def standard_noise(
    rng: str,
    key_words: Sequence[int],
    segments: Sequence[Segment],
    clients: Tensor,
    *,
    step: int,
    mechanism: str,
    form: str = "wide",
) -> list[Tensor]:
    """`_torch.noise.standard_noise`: float64 [K, count] for every (layer, offset, count)."""
    return [
        scaled_noise(
            rng, key_words, segment, clients, step=step, mechanism=mechanism, form=form,
            scale=1.0, dtype=torch.float64,
        )
        for segment in segments
    ]  # fmt: skip


def coins(
    rng: str,
    key_words: Sequence[int],
    n: int,
    clients: Tensor,
    *,
    step: int,
    rates: Sequence[float],
) -> Tensor:
    """`_torch.noise.coins`: independent Bernoulli coins, bool [K, n]."""
    out = torch.empty((len(clients), n), dtype=torch.bool)
    if out.numel() == 0:
        return out
    array, ids = out.numpy(), np.ascontiguousarray(clients.numpy())
    whole = 1 << 63
    limits = [min(round(Fraction(rate) * whole), whole - 1) for rate in rates]
    limit, always = np.array(limits, dtype=np.uint64), np.array([rate >= 1 for rate in rates])
    generator = Generator(rng, key_words)
    per_block, lanes = generator.per_block, generator.lanes
    per_row = -(-n // per_block)
    word = DOMAINS["coins"] << LAYER_BITS

    def work(begin: int, end: int) -> None:
        most = min(_TILES, -(-(end - begin) // lanes))
        counters = np.empty(4 * most * lanes, np.uint32)
        words = np.empty(most * WORDS, np.uint32)
        for at in range(begin, end, most * lanes):
            blocks = min(most * lanes, end - at)
            fill_counters(counters, lanes, ids, step, word, 0, per_row, at, blocks)
            generator.generate(words, counters, -(-blocks // lanes))
            flip_coins(array, limit, always, words, per_block, per_row, at, blocks)

    spread(work, len(clients) * per_row, align=lanes, elements=out.numel())
    return out
