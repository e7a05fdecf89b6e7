"""What right guesses of canaries' coins prove, at a level of confidence.

A canary is in or out by a fair coin, and an attacker guesses the coins. Three bounds, from what is
assumed most to least:

- independent canaries, each with noise of its own: their number of right guesses is at most
  binomial (`least_accuracy`), whatever the rounds let one client's releases depend on: what the
  attacker may hope for, given all releases so far, is a product over clients in expectation;
- one mechanism with a trade-off curve for each canary (`can_be`): nothing is assumed of how
  the canaries' guesses depend on one another;
- one mechanism with a single pair (ε, δ) for each canary (`pair_p_value`).

Reference:
    Clopper and Pearson 1934; Mahloujifar, Melis, Chaudhuri 2024 (arXiv:2410.22235) for curves;
    Steinke, Nasr, Jagielski 2023 (arXiv:2305.08846, theorem 5.2) for a pair.
"""

from __future__ import annotations

import math

import numpy as np

from fl_lightning.accounting.risk import Risk


def accuracy_limits(right: int, guesses: int, confidence: float) -> tuple[float, float]:
    """Limits of a binomial probability, each of which holds with the given confidence.

    Args:
        right: right guesses, 0 to `guesses`.
        guesses: independent guesses, at least 1.
        confidence: of each limit by itself, in (0, 1).
    """
    from scipy import stats

    low = stats.beta.ppf(1 - confidence, right, guesses - right + 1) if right else 0.0
    high = stats.beta.ppf(confidence, right + 1, guesses - right) if right < guesses else 1.0
    return float(low), float(high)


def can_be(risk: Risk, right: int, guesses: int, canaries: int, confidence: float) -> bool:
    """Whether a mechanism with this trade-off curve may lead to so many right guesses.

    With p_j the probability of j right guesses and any i, one canary's coin alone changes "guess k
    is right and the others are at least i - 1" into "guess k is wrong and ...", so the curve f
    bounds Σ_{j≥i} j·p_j/m by 1 - f(Σ_{j≥i-1} (g - j)·p_j/m): the mean over all m canaries, by
    concavity. From the tail at `right` downwards each bound asks for a least tail below it; if one
    of them is more than 1, no such mechanism exists. The least tails grow with those above them, so
    taking each as small as it may be is the best case for the mechanism.

    Args:
        risk: the curve that each canary's coin is claimed to keep.
        right: right guesses.
        guesses: guesses made, a number that was fixed before the releases.
        canaries: canaries with a coin, m, at least `guesses`.
        confidence: with which a False holds.
    """
    tail, above = 1 - confidence, 0.0
    for i in range(right, 0, -1):
        reached = (i * tail + above) / canaries
        above += tail
        needed = canaries * float(risk.false_positives(reached)) + above
        tail = max(tail, needed / (guesses - i + 1))
        if tail > 1:
            return False
    return True


def pair_p_value(epsilon: float, delta: float, right: int, guesses: int, canaries: int) -> float:
    """Largest probability of so many right guesses under (epsilon, delta), nothing else assumed.

    Args:
        epsilon, delta: the pair.
        right, guesses, canaries: as in `can_be`.
    """
    from scipy import stats

    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(right - 1, guesses, chance))
    below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, chance))
    most = float(np.max(below / np.arange(1, right + 1), initial=0.0))
    return min(1.0, tail + 2 * canaries * delta * most)


def shown_by_pair(
    delta: float, right: int, guesses: int, canaries: int, confidence: float
) -> float:
    """The largest ε that `pair_p_value` excludes at this δ; 0 where none is."""
    low, high = 0.0, 64.0

    def excluded(epsilon: float) -> bool:
        return pair_p_value(epsilon, delta, right, guesses, canaries) < 1 - confidence

    if not excluded(low):
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if excluded(middle) else (low, middle)
    return low
