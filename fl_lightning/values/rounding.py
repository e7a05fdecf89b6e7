"""Upper bounds for people: digits are dropped upwards, so that what is read is a bound too."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal


def round_up(value: float, digits: int = 4) -> str:
    """A number with at most so many significant digits, never less than it; infinity as `inf`."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    exact = Decimal(repr(float(value)))
    unit = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    return f"{float(exact.quantize(unit, ROUND_CEILING)):.{digits}g}"


def round_up_to(value: float, places: int = 2) -> str:
    """A number with so many decimal places, never less than it."""
    if not math.isfinite(value):
        return f"{value:g}"
    return str(Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-places), ROUND_CEILING))
