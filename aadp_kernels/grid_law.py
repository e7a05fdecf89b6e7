"""The law of the grid form: its tables, and what their rounding costs. See `aadp_kernels.grid`."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from functools import cache
from itertools import pairwise

from aadp_kernels import _validate
from aadp_kernels.addresses import CUTOFFS
from aadp_kernels.sampler_limits import MECHANISMS

OCTAVE_BITS = 30
DIGIT_BITS = 10
_ACCEPTANCE_ERROR = 2.0**-45


@cache
def thresholds() -> tuple[tuple[int, ...], ...]:
    """c_1 .. c_1023 of each digit: 2^64 P(digit < v), to the nearest integer.

    Digit j of three has P(digit = v) proportional to 2^(-v / 2^(10 (j + 1))). It is the number of
    thresholds that are at most a 64-bit number.
    """
    tables = []
    with localcontext() as context:
        context.prec = 60
        for j in range(3):
            ratio = Decimal(2) ** (-1 / Decimal(2 ** (DIGIT_BITS * (j + 1))))
            whole = 1 - Decimal(2) ** (-1 / Decimal(2 ** (DIGIT_BITS * j)))
            power, table = Decimal(1), []
            for _ in range(1, 1 << DIGIT_BITS):
                power *= ratio
                table.append(int(((1 - power) / whole * 2**64).to_integral_value()))
            tables.append(tuple(table))
    return tuple(tables)


@cache
def _table_error() -> float:
    """Largest |ln(P drawn / P)| of the three digits together, by enumeration, rounded up."""
    total = Decimal(0)
    with localcontext() as context:
        context.prec = 60
        for j, table in enumerate(thresholds()):
            edges = [0, *table, 1 << 64]
            ratio = Decimal(2) ** (-1 / Decimal(2 ** (10 * (j + 1))))
            exact = (1 - ratio) / (1 - Decimal(2) ** (-1 / Decimal(2 ** (10 * j))))
            worst = Decimal(0)
            for low, high in pairwise(edges):
                worst = max(worst, abs((Decimal(high - low) / (exact * 2**64)).ln()))
                exact *= ratio
            total += worst
    return float(total) * (1 + 1e-9)


def inexactness(mechanism: str, elements: int) -> tuple[float, float]:
    """What the grid form costs beyond the continuous mechanism of the same scale.

    Args:
        mechanism: "gaussian" or "laplace".
        elements: Elements of all layers (and votes) of a release that draw noise.

    Returns:
        (epsilon inflation, tail delta) of one release; those of composed releases add up.

    Raises:
        ValueError: An unknown mechanism or a negative number of elements.

    Guarantees:
        Let eta bound |ln(probability drawn / probability charged)| of an element. A release that
        is (epsilon, delta) DP with continuous noise is (epsilon + 2 elements eta, delta') DP.
        Laplace: eta is 1.9e-16 (tables), delta' = exp(elements eta) delta. Gaussian: eta is 2.9e-14
        for noise of at most c = tail_cutoff("gaussian", "grid") = 10 scales: tables, the rounding
        of the acceptance test (2^-45: at most 111 units of 2^-53 in the exponent x, 84 in -ln U, 2
        in U) and the discrete law. The tail delta is the mass beyond c; delta' =
        exp(elements eta) (delta + (1 + e^epsilon) tail delta) covers it, or the bound for a cutoff
        c in the place of the factor.

    Edge cases:
        No elements cost nothing. The tail delta of Laplace noise is 0.
    """
    _validate.one_of("mechanism", mechanism, MECHANISMS)
    if elements < 0:
        raise ValueError(f"elements must not be negative, got {elements}")
    if mechanism == "laplace":
        return 2 * elements * _table_error(), 0.0
    cutoff = CUTOFFS["gaussian", "grid"]
    discrete = (cutoff**2 + 1) / (24 * 4.0**OCTAVE_BITS)
    eta = _table_error() + _ACCEPTANCE_ERROR + discrete
    return 2 * elements * eta, elements * math.erfc(cutoff / math.sqrt(2)) * (1 + 1e-6)
