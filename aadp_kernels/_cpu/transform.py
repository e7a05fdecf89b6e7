"""Words to noise of scale one, a tile of 512 elements at a time.

The wide form does the specification's operations in the same order, each with its own rounding, so
that the bits are the same. The fast form is float32 with polynomials of its own.
"""

from __future__ import annotations

import math

import numpy as np

from aadp_kernels._cpu._jit import jit, jit_contract, jit_inline, wide_vectors
from aadp_kernels._cpu.rng import LANES, fill_words
from aadp_kernels.addresses import (
    ATANH,
    COSINE,
    FAST_REFINED_BELOW,
    LAYER_BITS,
    SINE,
    SQRT_HALF_BITS,
)

TILE = 512

_N = LANES
_CHACHA_BLOCKS = 32
_U32 = np.uint32
_I32 = np.int32
_F32 = np.float32

_LN2 = math.log(2)
_ANGLE = math.pi / 4 * 2.0**-31


@jit_inline
def log(x):
    bits = np.float64(x).view(np.int64)
    exponent = (bits - SQRT_HALF_BITS) >> 52
    m = np.int64(bits - (exponent << 52)).view(np.float64)
    s = (m - 1.0) / (m + 1.0)
    y = s * s
    r = y * ATANH[11] + ATANH[10]
    r = r * y + ATANH[9]
    r = r * y + ATANH[8]
    r = r * y + ATANH[7]
    r = r * y + ATANH[6]
    r = r * y + ATANH[5]
    r = r * y + ATANH[4]
    r = r * y + ATANH[3]
    r = r * y + ATANH[2]
    r = r * y + ATANH[1]
    r = r * y + ATANH[0]
    return np.float64(np.int32(exponent)) * _LN2 + s * r


@jit_inline
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
def _wide_laplace(words, rows):
    """A sign bit and 63 bits of uniform an element."""
    wide_vectors()
    n = _N
    for row in range(8):
        w, z = 2 * row * n, row * n
        for t in range(n):
            low = words[w + n + t]
            u = np.float64(words[w + t]) + 2.0**31
            u += (np.float64(np.int32(low >> np.int32(1))) + (2.0**30 + 1)) * 2.0**-31
            sign = np.float64(np.int32((low & np.int32(1)) * np.int32(2) - np.int32(1)))
            rows[z + t] = log(u * 2.0**-32) * sign


@jit
def _wide_gaussian(words, rows):
    """Box-Muller; the angle is uniform on an arc of 90 degrees, two more bits choose the arc."""
    wide_vectors()
    n = _N
    for pair in range(4):
        w, z = 4 * n * pair, 2 * n * pair
        for t in range(n):
            u = np.float64(words[w + t]) + 2.0**31
            u += (np.float64(words[w + n + t]) + (2.0**31 + 1)) * 2.0**-32
            rows[z + t] = math.sqrt(log(u * 2.0**-32) * -2.0)
        for t in range(n):
            low = words[w + 3 * n + t]
            phi = np.float64(words[w + 2 * n + t]) + 0.5
            phi = (phi + np.float64(np.int32(low & np.int32(-4))) * 2.0**-32) * _ANGLE
            y = phi * phi
            sine = _horner(y, SINE) * phi * rows[z + t]
            cosine = _horner(y, COSINE) * rows[z + t]
            cosine *= np.float64(np.int32(np.int32(1) - (low & np.int32(2))))
            swap = (low & np.int32(1)) != 0
            rows[z + t] = sine if swap else cosine
            rows[z + n + t] = cosine if swap else sine


@jit_inline
def wide_tile(noise, words, rows, state, rounds, blocks, tile, gaussian):
    """Elements 512 tile .. 512 tile + 511 of the stream, float64; `rows` is scratch [256]."""
    n = _N
    for half in range(2):
        state[0] = _U32((2 * tile + half) * blocks)
        fill_words(words, state, rounds, blocks)
        if gaussian:
            _wide_gaussian(words.view(np.int32), rows)
        else:
            _wide_laplace(words.view(np.int32), rows)
        at = half * TILE // 2
        if blocks == _CHACHA_BLOCKS:
            for t in range(n):
                for i in range(8):
                    noise[at + 8 * t + i] = rows[i * n + t]
        else:
            for r in range(4):
                for t in range(n):
                    noise[at + 2 * (r * n + t)] = rows[2 * r * n + t]
                    noise[at + 2 * (r * n + t) + 1] = rows[(2 * r + 1) * n + t]


# log(1 + t) = t + t^2 q(t) on [sqrt(1/2) - 1, sqrt(2) - 1], relative error 2^-22.
_Q0, _Q1, _Q2, _Q3, _Q4, _Q5, _Q6 = (
    np.float32(c)
    for c in (-0.5000036358833313, 0.33335059881210327, -0.24969908595085144, 0.19900165498256683,
              -0.17250831425189972, 0.16222575306892395, -0.10106883943080902)
)  # fmt: skip
_S1, _S2, _S3 = (np.float32(c) for c in (-1 / 6, 1 / 120, -1 / 5040))
_K1, _K2, _K3, _K4 = (np.float32(c) for c in (-1 / 2, 1 / 24, -1 / 720, 1 / 40320))
_F_LN2, _F_ONE, _F_HALF, _F_MINUS_TWO = (np.float32(c) for c in (_LN2, 1, 0.5, -2))
_F_UNIT = np.float32(-(2.0**-32))
_F_QUARTER, _F_EIGHTH = np.float32(math.pi / 2 * 2.0**-30), np.float32(math.pi / 4 * 2.0**-30)
_F_SQRT_HALF_BITS = np.int32(0x3F3504F3)


@jit_inline
def _log1p32(t):
    q = _Q6 * t + _Q5
    q = q * t + _Q4
    q = q * t + _Q3
    q = q * t + _Q2
    q = q * t + _Q1
    q = q * t + _Q0
    return q * (t * t) + t


@jit_inline
def _laplace32(word):
    n = _I32(word >> _U32(1))
    bits = _F32(_F32(n) + _F_HALF).view(np.int32)
    exponent = _I32(_I32(bits - _F_SQRT_HALF_BITS) >> _I32(23))
    m = _I32(bits - _I32(exponent << _I32(23))).view(np.float32)
    magnitude = _F32(_I32(_I32(31) - exponent)) * _F_LN2 - _log1p32(m - _F_ONE)
    return _I32(_F32(magnitude).view(np.int32) ^ _I32(word << _U32(31))).view(np.float32)


@jit_inline
def _gaussian32(w0, w1):
    bits = _F32(_F32(w0) + _F_HALF).view(np.int32)
    exponent = _I32(_I32(bits - _F_SQRT_HALF_BITS) >> _I32(23))
    t = _I32(bits - _I32(exponent << _I32(23))).view(np.float32) - _F_ONE
    # Near 1 the distance to 1 counts, of which the square root would show every rounding.
    if exponent == _I32(32):
        t = (_F32(_U32(~w0)) + _F_HALF) * _F_UNIT
    log = _F32(_I32(exponent - _I32(32))) * _F_LN2 + _log1p32(t)
    radius = math.sqrt(log * _F_MINUS_TWO)
    z = _I32(w1)
    turn = _I32(_I32(z + _I32(1 << 29)) >> _I32(30))
    phi = _F32(_I32(z - _I32(turn << _I32(30)))) * _F_QUARTER + _F_EIGHTH
    y = phi * phi
    sine = (((_S3 * y + _S2) * y + _S1) * y * phi + phi) * radius
    cosine = ((((_K4 * y + _K3) * y + _K2) * y + _K1) * y + _F_ONE) * radius
    odd = (turn & _I32(1)) != 0
    a, b = (sine, cosine) if odd else (cosine, sine)
    flip_a = _I32(_I32(_I32(turn + _I32(1)) & _I32(2)) << _I32(30))
    flip_b = _I32(_I32(turn & _I32(2)) << _I32(30))
    a = _I32(_F32(a).view(np.int32) ^ flip_a).view(np.float32)
    b = _I32(_F32(b).view(np.int32) ^ flip_b).view(np.float32)
    return a, b


@jit
def _interleave(rows, noise):
    """Element 128 r + 4 t + c from rows[r, c, t]."""
    wide_vectors()
    n = _N
    for r in range(4):
        w = 4 * n * r
        for t in range(n):
            for c in range(4):
                noise[w + 4 * t + c] = rows[w + n * c + t]


@jit_contract
def _fast_laplace(words, rows):
    """Noise of each word in its place; returns the smallest word."""
    wide_vectors()
    lowest = _U32(0xFFFFFFFF)
    for i in range(TILE):
        lowest = min(lowest, words[i])
    for i in range(TILE):
        rows[i] = _laplace32(words[i])
    return lowest


@jit_contract
def _fast_gaussian(words, rows):
    """Noise of each pair of words in their places; returns the smallest word of a radius."""
    wide_vectors()
    n, lowest = _N, _U32(0xFFFFFFFF)
    for w in range(0, TILE, 2 * n):
        for i in range(w, w + n):
            lowest = min(lowest, words[i])
        for i in range(w, w + n):
            rows[i], rows[n + i] = _gaussian32(words[i], words[n + i])
    return lowest


@jit
def refine(noise, words, tails, gaussian):
    """Write anew the elements whose words are so small that the logarithm shows their steps."""
    n = _N
    for e in range(TILE):
        w = e // 128 * 4 * n + e % 4 * n + e % 128 // 4
        if gaussian:
            if e % 2 == 0 and words[w] < _U32(FAST_REFINED_BELOW):
                u = (words[w] + (tails[w] + 0.5) * 2.0**-32) * 2.0**-32
                radius = math.sqrt(-2.0 * math.log(u))
                angle = (np.int32(words[w + n]) + 0.5) * (math.pi * 2.0**-31)
                noise[e] = radius * math.cos(angle)
                noise[e + 1] = radius * math.sin(angle)
        elif (words[w] >> _U32(1)) < _U32(FAST_REFINED_BELOW):
            u = ((words[w] >> _U32(1)) + (tails[w] + 0.5) * 2.0**-32) * 2.0**-31
            noise[e] = math.log(u) if words[w] & _U32(1) else -math.log(u)


@jit_inline
def fast_tile(noise, words, tails, state, rounds, blocks, tile, gaussian):
    """Elements 512 tile .. 512 tile + 511 of the stream, float32."""
    state[0] = _U32(tile * blocks)
    fill_words(words, state, rounds, blocks)
    rows = tails.view(np.float32)
    if gaussian:
        rare = _fast_gaussian(words, rows) < _U32(FAST_REFINED_BELOW)
    else:
        rare = (_fast_laplace(words, rows) >> _U32(1)) < _U32(FAST_REFINED_BELOW)
    _interleave(rows, noise)
    if rare:
        state[3] += _U32(2 << LAYER_BITS)
        fill_words(tails, state, rounds, blocks)
        state[3] -= _U32(2 << LAYER_BITS)
        refine(noise, words, tails, gaussian)
