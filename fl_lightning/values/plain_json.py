"""Values as strict JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def plain(value: Any) -> Any:
    """Strict JSON: infinities as strings, tuples as lists, arrays and tensors by `tolist`."""
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            raise ValueError("a ledger value must not be NaN, got nan")
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Sequence):
        return [plain(v) for v in value]
    raise ValueError(f"a ledger value must be JSON-like, got {type(value).__name__}: {value!r}")
