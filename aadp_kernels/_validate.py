"""ValueErrors that name the argument and its value. Only public quantities are checked."""

from __future__ import annotations

import math
from collections.abc import Sequence


def one_of(name: str, value: object, known: Sequence[object]) -> None:
    """Raise unless `value` is one of the known ones."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")


def integer_below(name: str, value: int, limit: int) -> int:
    """The integer `value` in [0, limit), or an error."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if not 0 <= value.__index__() < limit:
        raise ValueError(f"{name} must be in [0, {limit}), got {value!r}")
    return value.__index__()


def finite_nonnegative(name: str, value: float) -> float:
    """The finite number `value` >= 0, or an error."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    return float(value)
