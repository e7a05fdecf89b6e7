"""Many pairs (epsilon, delta) that a run keeps: together they say more than one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple

import numpy as np

from fl_lightning.accounting.composition import (
    LARGEST_PLD_EPSILON,
    LARGEST_PLD_STEPS,
    compose_epsilon,
    composed_pld,
    joint_multiplier,
)
from fl_lightning.values.event import NoiseEvent


def compose_pairs(counts: Mapping[NoiseEvent, int], delta: float) -> list[tuple[float, float]]:
    """Pairs (epsilon, delta) that all events together keep, from epsilon 0 to far out.

    Args:
        counts: how often each event happened; all of one adjacency.
        delta: the pair of interest, in [0, 1); the others lie around it.

    Returns:
        Pairs with epsilon >= 0, each an upper bound: of the Gaussian in closed form, else of the
        pessimistic PLD, or of RDP where `compose_epsilon` falls back to it.
    """
    key = tuple(sorted(((e, int(c)) for e, c in counts.items() if c), key=lambda x: astuple(x[0])))
    most = compose_epsilon(counts, delta)
    if not key or not math.isfinite(most):
        return [(most, 0.0 if not key else 1.0)]
    rdp = compose_epsilon(counts, max(delta, 1e-12), accountant="rdp")
    epsilons = np.concatenate([[0.0], np.geomspace(1e-3, max(2 * rdp, 1e-2), 400)])
    if all(e.mechanism == "gaussian" and e.sampling_rate == 1 for e, _ in key):
        deltas = _gaussian_deltas(1 / joint_multiplier(key), epsilons)
    elif sum(c for _, c in key) > LARGEST_PLD_STEPS or not 0 < rdp <= LARGEST_PLD_EPSILON:
        some = np.geomspace(1e-12, 0.5, 60)
        return [(compose_epsilon(counts, float(d), accountant="rdp"), float(d)) for d in some]
    else:
        with np.errstate(all="ignore"):
            deltas = np.asarray(composed_pld(key, rdp).get_delta(epsilons.tolist()))
    pure = compose_epsilon(counts, 0.0)
    pairs = [(float(e), min(1.0, float(d))) for e, d in zip(epsilons, deltas, strict=True)]
    return [*pairs, (most, delta), *([(pure, 0.0)] if math.isfinite(pure) else [])]


def _gaussian_deltas(mu: float, epsilons: np.ndarray) -> np.ndarray:
    """Delta of two unit Gaussians mu apart at each epsilon, raised by more than its rounding."""
    from scipy import special

    low = special.ndtr(mu / 2 - epsilons / mu)
    high = np.exp(epsilons + special.log_ndtr(-mu / 2 - epsilons / mu))
    return np.maximum(low - high, 0.0) + 1e-15
