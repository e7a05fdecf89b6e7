"""How well scores tell members from others, with intervals.

References:
    DeLong et al. 1988 (the variance of an area under a curve); Clopper and Pearson 1934 (exact
    intervals of a share).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)
LEVEL = 0.95
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def area(members: npt.ArrayLike, others: npt.ArrayLike) -> Estimate:
    """Probability that a member scores higher than another record; ties count half (the AUC).

    Args:
        members: scores [m], at least 2.
        others: scores [n], at least 2.

    Returns:
        The area with DeLong's interval, cut to [0, 1]. Records are taken to be independent.

    Raises:
        ValueError: too few scores, or one that is not a number.
    """
    yes, no = _checked(members, others)
    ranks = _middle_ranks(np.concatenate([yes, no]))
    m, n = len(yes), len(no)
    # Share of the others below each member, and of the members above each other record.
    below = (ranks[:m] - _middle_ranks(yes)) / n
    above = 1 - (ranks[m:] - _middle_ranks(no)) / m
    value = float(below.mean())
    error = math.sqrt(below.var(ddof=1) / m + above.var(ddof=1) / n)
    half = _normal_quantile() * error
    return Estimate(value, max(0.0, value - half), min(1.0, value + half))


def power(members: npt.ArrayLike, others: npt.ArrayLike, rate: float) -> Estimate:
    """Share of members that a threshold finds which accuses at most `rate` of the others.

    The threshold is chosen on the others themselves; the interval is Clopper and Pearson's for that
    threshold. With fewer than 1/rate others it accuses none of them.

    Raises:
        ValueError: a rate outside [0, 1), too few scores, or one that is not a number.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate={rate} must be in [0, 1)")
    yes, no = _checked(members, others)
    allowed = math.floor(rate * len(no) + 1e-9)
    threshold = np.sort(no)[::-1][allowed]
    return share(int((yes > threshold).sum()), len(yes))


def share(count: int, of: int) -> Estimate:
    """A share with its exact interval.

    Raises:
        ValueError: `count` is not between 0 and `of`, or `of` is 0.
    """
    from scipy import stats

    if not 0 <= count <= of or not of:
        raise ValueError(f"count={count} must be from 0 to of={of}, which must be positive")
    tail = (1 - LEVEL) / 2
    low = 0.0 if not count else float(stats.beta.ppf(tail, count, of - count + 1))
    high = 1.0 if count == of else float(stats.beta.ppf(1 - tail, count + 1, of - count))
    return Estimate(count / of, low, high)


def mean(values: npt.ArrayLike) -> Estimate:
    """A mean with Student's interval; without width for a single value.

    Raises:
        ValueError: there is no value.
    """
    from scipy import stats

    found = np.asarray(values, dtype=np.float64)
    if not found.size:
        raise ValueError("values=[] has no mean")
    middle = float(found.mean())
    if found.size == 1:
        return Estimate(middle, middle, middle)
    half = float(stats.t.ppf((1 + LEVEL) / 2, found.size - 1) * found.std(ddof=1))
    half /= math.sqrt(found.size)
    return Estimate(middle, middle - half, middle + half)


def curve(members: npt.ArrayLike, others: npt.ArrayLike) -> tuple[Array, Array]:
    """False and true positive rates of every threshold, both ascending from 0 to 1."""
    yes, no = _checked(members, others)
    thresholds = np.unique(np.concatenate([yes, no]))[::-1]
    true = np.searchsorted(np.sort(-yes), -thresholds, side="right") / len(yes)
    false = np.searchsorted(np.sort(-no), -thresholds, side="right") / len(no)
    return np.concatenate([[0.0], false]), np.concatenate([[0.0], true])


def _checked(members: npt.ArrayLike, others: npt.ArrayLike) -> tuple[Array, Array]:
    found = []
    for name, values in (("members", members), ("others", others)):
        scores = np.asarray(values, dtype=np.float64).ravel()
        if len(scores) < 2:
            raise ValueError(f"{name}: {len(scores)} scores are too few, 2 are needed")
        if np.isnan(scores).any():
            raise ValueError(f"{name}: a score is not a number")
        found.append(scores)
    return found[0], found[1]


def _middle_ranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of theirs."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[index]


def _normal_quantile() -> float:
    from scipy import stats

    return float(stats.norm.ppf((1 + LEVEL) / 2))
