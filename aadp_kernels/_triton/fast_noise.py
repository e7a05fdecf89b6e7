"""The fast form as Triton device functions: float32, with the hardware's approximations."""

# Triton's constexpr arguments, ranges and launch options have no types that fit.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

import math

import triton
import triton.language as tl

from aadp_kernels._triton.rng import chacha
from aadp_kernels._triton.word_rows import join2, join4, philox_rows, signed
from aadp_kernels.addresses import DOMAINS, LAYER_BITS

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)

_LN2 = tl.constexpr(math.log(2))
_TURN = tl.constexpr(math.pi * 2.0**-31)
_DOMAIN = tl.constexpr(1 << LAYER_BITS)
_GAUSSIAN = tl.constexpr(DOMAINS["fast_gaussian"])
_LAPLACE = tl.constexpr(DOMAINS["fast_laplace"])
_TAIL = tl.constexpr(DOMAINS["fast_laplace_tail"] - DOMAINS["fast_laplace"])


@triton.jit
def _log2_approx(x):
    if INTERPRET:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _sqrt_approx(x):
    if INTERPRET:
        return tl.sqrt(x)
    else:
        return tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _sin_approx(x):
    if INTERPRET:
        return tl.sin(x)
    else:
        return tl.inline_asm_elementwise(
            "sin.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _cos_approx(x):
    if INTERPRET:
        return tl.cos(x)
    else:
        return tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _radius_words(a, b, c, d, GAUSSIAN: tl.constexpr):
    """The words of four elements that make a magnitude: all of them, or one a pair."""
    if GAUSSIAN:
        return join2(a, c)
    else:
        return join4(a, b, c, d)


@triton.jit
def _least(a, b, c, d, GAUSSIAN: tl.constexpr):
    """The least word of a magnitude, uint32 of the shape of `a`."""
    least = tl.minimum(a, c)
    if not GAUSSIAN:
        least = tl.minimum(least, tl.minimum(b, d))
    return least


@triton.jit
def _minimum(x):
    """The least element of a vector or matrix, without a change of its layout."""
    if len(x.shape) == 2:
        x = tl.min(x, axis=1)
    return tl.min(x, axis=0)


@triton.jit
def _uniform(words, GAUSSIAN: tl.constexpr):
    """(n + 1/2) / 2^bits in float32, n the word (32 bits) or the word without its sign (31)."""
    if GAUSSIAN:
        return words.to(tl.float32) * 2.0**-32 + 2.0**-33
    else:
        return (words >> 1).to(tl.float32) * 2.0**-31 + 2.0**-32


@triton.jit
def _tail_uniform(words, tail, GAUSSIAN: tl.constexpr):
    """`_uniform` where n >= 2^12; where n is smaller, `tail` gives the digits after it."""
    uniform = _uniform(words, GAUSSIAN)
    fraction = tail.to(tl.float32) * 2.0**-32 + 2.0**-33
    if GAUSSIAN:
        return tl.where(words < 4096, (words.to(tl.float32) + fraction) * 2.0**-32, uniform)
    else:
        n = (words >> 1).to(tl.float32)
        return tl.where(words < 8192, (n + fraction) * 2.0**-31, uniform)


@triton.jit
def _fast_values(words, angles, uniform, GAUSSIAN: tl.constexpr):
    """Noise [rows, width] from its words and uniforms."""
    log = _log2_approx(uniform)
    if GAUSSIAN:
        # The approximation of log2 may round up past zero at one: no square root of a negative.
        radius = _sqrt_approx(tl.maximum(log * (-2 * _LN2), 0.0))
        angle = signed(angles).to(tl.float32) * _TURN + _TURN * 0.5
        pairs = tl.join(radius * _cos_approx(angle), radius * _sin_approx(angle))
        return tl.reshape(pairs, [pairs.shape[0], 2 * pairs.shape[1]])
    else:
        flipped = log.to(tl.uint32, bitcast=True) ^ (words << 31)
        return flipped.to(tl.float32, bitcast=True) * -_LN2


@triton.jit
def fast_philox(
    start, step, client, layer, key, ROUNDS: tl.constexpr, GAUSSIAN: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, ONLY: tl.constexpr,
):  # fmt: skip
    domain: tl.constexpr = _GAUSSIAN if GAUSSIAN else _LAPLACE
    limit: tl.constexpr = 4096 if GAUSSIAN else 8192
    word = layer + domain * _DOMAIN
    a, b, c, d = philox_rows(start, step, client, word, key, ROUNDS, ROWS, BLOCKS, ONLY)
    words = _radius_words(a, b, c, d, GAUSSIAN)
    angles = join2(b, d)
    # One tile in hundreds needs tail words: the branch is for the whole tile.
    if _minimum(_least(a, b, c, d, GAUSSIAN)) < limit:
        word += _TAIL * _DOMAIN
        a, b, c, d = philox_rows(start, step, client, word, key, ROUNDS, ROWS, BLOCKS, ONLY)
        uniform = _tail_uniform(words, _radius_words(a, b, c, d, GAUSSIAN), GAUSSIAN)
    else:
        uniform = _uniform(words, GAUSSIAN)
    return _fast_values(words, angles, uniform, GAUSSIAN)


@triton.jit
def fast_chacha(block, step, client, layer, key, ROUNDS: tl.constexpr, GAUSSIAN: tl.constexpr):
    domain: tl.constexpr = _GAUSSIAN if GAUSSIAN else _LAPLACE
    limit: tl.constexpr = 4096 if GAUSSIAN else 8192
    word = layer + domain * _DOMAIN
    w = chacha(block, step, client, word, key, ROUNDS)
    words0 = _radius_words(*w[0:4], GAUSSIAN)
    words1 = _radius_words(*w[4:8], GAUSSIAN)
    words2 = _radius_words(*w[8:12], GAUSSIAN)
    words3 = _radius_words(*w[12:16], GAUSSIAN)
    least = tl.minimum(
        tl.minimum(_least(*w[0:4], GAUSSIAN), _least(*w[4:8], GAUSSIAN)),
        tl.minimum(_least(*w[8:12], GAUSSIAN), _least(*w[12:16], GAUSSIAN)),
    )
    if _minimum(least) < limit:
        t = chacha(block, step, client, word + _TAIL * _DOMAIN, key, ROUNDS)
        uniform0 = _tail_uniform(words0, _radius_words(*t[0:4], GAUSSIAN), GAUSSIAN)
        uniform1 = _tail_uniform(words1, _radius_words(*t[4:8], GAUSSIAN), GAUSSIAN)
        uniform2 = _tail_uniform(words2, _radius_words(*t[8:12], GAUSSIAN), GAUSSIAN)
        uniform3 = _tail_uniform(words3, _radius_words(*t[12:16], GAUSSIAN), GAUSSIAN)
    else:
        # Not before the branch: in it, the uniforms would hold registers beside all words.
        uniform0, uniform1 = _uniform(words0, GAUSSIAN), _uniform(words1, GAUSSIAN)
        uniform2, uniform3 = _uniform(words2, GAUSSIAN), _uniform(words3, GAUSSIAN)
    return (
        _fast_values(words0, join2(w[1], w[3]), uniform0, GAUSSIAN),
        _fast_values(words1, join2(w[5], w[7]), uniform1, GAUSSIAN),
        _fast_values(words2, join2(w[9], w[11]), uniform2, GAUSSIAN),
        _fast_values(words3, join2(w[13], w[15]), uniform3, GAUSSIAN),
    )
