"""What tests of noise that rounds share need."""

from __future__ import annotations

import numpy as np

BANDED = {
    "setting": "client+aggregator",
    "cohort_sampling": "fixed",
    "correlation": "banded",
    "delta": 0.1,
    "clip_norm": 1.0,
}


def dense(coefficients: tuple[float, ...], horizon: int) -> np.ndarray:
    """D of a whole run."""
    back = np.subtract.outer(np.arange(horizon), np.arange(horizon))
    d = np.zeros((horizon, horizon))
    for j, value in enumerate(coefficients):
        d[back == j] = value
    return d
