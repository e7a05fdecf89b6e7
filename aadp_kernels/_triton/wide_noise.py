"""The wide form as Triton device functions: the float64 operations of the specification, in order.

Compile it without fused multiply-adds.
"""

# Triton's constexpr arguments, ranges and launch options have no types that fit.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

import math

import triton
import triton.language as tl

from aadp_kernels._triton.word_rows import join2, signed
from aadp_kernels.addresses import ATANH, COSINE, SINE, SQRT_HALF_BITS

_LN2 = tl.constexpr(math.log(2))
_SQRT_HALF_BITS = tl.constexpr(SQRT_HALF_BITS)
_ATANH, _SIN, _COS = tl.constexpr(ATANH), tl.constexpr(SINE), tl.constexpr(COSINE)
_ANGLE = tl.constexpr(math.pi / 4 * 2.0**-31)


@triton.jit
def _horner(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    """Polynomial with ascending coefficients, rounded operation by operation."""
    result = x * COEFFICIENTS[DEGREE] + COEFFICIENTS[DEGREE - 1]
    for i in tl.static_range(2, DEGREE + 1):
        result = result * x + COEFFICIENTS[DEGREE - i]
    return result


@triton.jit
def log(x):
    """The specification's natural logarithm of positive normal float64."""
    bits = x.to(tl.int64, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 52
    m = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    s = s * _horner(s * s, _ATANH, 11)
    return exponent.to(tl.int32).to(tl.float64) * _LN2 + s


@triton.jit
def _uniform_log(high, low, LOW_BITS: tl.constexpr):
    """ln((n + 1) / 2^(32 + LOW_BITS)), n of the words with flipped top bits."""
    u = high.to(tl.float64) + 2.0**31
    tail = low.to(tl.float64) + (2.0 ** (LOW_BITS - 1) + 1)
    u += tail * 2.0**-LOW_BITS
    return log(u * 2.0**-32)


@triton.jit
def wide_pair(a, b, c, d, GAUSSIAN: tl.constexpr):
    """Two elements from four words: float64 [..., 2] with the last two dimensions merged."""
    a, b, c, d = signed(a), signed(b), signed(c), signed(d)
    if GAUSSIAN:
        radius = tl.sqrt(_uniform_log(a, b, 32) * -2.0)
        phi = c.to(tl.float64) + 0.5
        phi += (d & -4).to(tl.float64) * 2.0**-32
        phi *= _ANGLE
        y = phi * phi
        sine = _horner(y, _SIN, 8) * phi * radius
        cosine = _horner(y, _COS, 8) * radius
        cosine *= (1 - (d & 2)).to(tl.float64)
        swap = (d & 1) != 0
        return join2(tl.where(swap, sine, cosine), tl.where(swap, cosine, sine))
    else:
        first = _uniform_log(a, b >> 1, 31) * ((b & 1) * 2 - 1).to(tl.float64)
        second = _uniform_log(c, d >> 1, 31) * ((d & 1) * 2 - 1).to(tl.float64)
        return join2(first, second)
