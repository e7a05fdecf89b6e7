"""What a proof means for somebody who wants to find out whether one unit was there.

Pairs (epsilon, delta) that a run keeps bound every test between "the unit's contribution was there"
and "it was not", whatever else its author knows. Each pair bounds the power of a test of a given
false positive rate; the least of all bounds holds.

Reference:
    Wasserman and Zhou 2010, arXiv:0811.2501, and Kairouz et al. 2015, arXiv:1311.0776 (the region
    of a pair); Dong et al. 2019, arXiv:1905.02383, prop. 2.12 (many pairs are a trade-off curve).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fl_lightning.accounting.pairs import compose_pairs
from fl_lightning.values.event import NoiseEvent

FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)
PRIORS = (0.01, 0.1, 0.5)


@dataclass(frozen=True)
class Risk:
    """Upper bounds for every attack, of one client. Public.

    Args:
        epsilons, deltas: the pairs that bound them, float64 [n].
    """

    epsilons: npt.NDArray[np.float64]
    deltas: npt.NDArray[np.float64]

    @classmethod
    def of_pairs(cls, pairs: Sequence[tuple[float, float]]) -> Risk:
        """Bounds that follow from a list of pairs (epsilon >= 0, delta)."""
        table = np.array(pairs, dtype=np.float64)
        return cls(table[:, 0], table[:, 1])

    def power(self, false_positive_rate: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Largest true positive rate of a test with each false positive rate, the rates' shape."""
        rate = np.asarray(false_positive_rate, dtype=np.float64)[..., None]
        with np.errstate(over="ignore", invalid="ignore"):
            by_unit = np.where(rate > 0, np.exp(self.epsilons) * rate, 0.0) + self.deltas
            by_none = 1 - np.exp(-self.epsilons) * (1 - self.deltas - rate)
        return np.minimum(np.minimum(by_unit, by_none).min(-1), 1.0)

    def false_positives(self, true_positive_rate: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Least false positive rate of a test with each true positive rate: `power` inverted."""
        rate = np.asarray(true_positive_rate, dtype=np.float64)[..., None]
        by_unit = (rate - self.deltas) * np.exp(-self.epsilons)
        with np.errstate(over="ignore", invalid="ignore"):
            by_none = 1 - self.deltas - np.where(rate < 1, np.exp(self.epsilons) * (1 - rate), 0.0)
        return np.maximum(np.maximum(by_unit, by_none).max(-1), 0.0)

    def advantage(self) -> float:
        """Largest (true positive rate - false positive rate)."""
        return self._excess(0.0)

    def right_guesses(self, prior: float) -> float:
        """Largest probability to guess right who was there, if it was so with a prior probability.

        Without any release it is max(prior, 1 - prior).
        """
        odds = abs(math.log(prior) - math.log1p(-prior))
        return max(prior, 1 - prior) + min(prior, 1 - prior) * self._excess(odds)

    def _excess(self, log_odds: float) -> float:
        """Largest TPR - e^log_odds FPR of a test, for log_odds >= 0."""
        with np.errstate(over="ignore"):
            shrink = (1 + math.exp(log_odds)) / (1 + np.exp(self.epsilons))
        return float(np.maximum(self.deltas, 1 - shrink * (1 - self.deltas)).min())


def risk_of(
    counts: Mapping[NoiseEvent, int], delta: float, inflation: float = 0.0, tails: float = 0.0
) -> Risk:
    """Bounds on attacks that follow from a client's account.

    Args:
        counts: how often each event happened.
        delta: the client's delta, tails included.
        inflation, tails: what inexact noise adds to every epsilon and every delta.
    """
    left = delta - tails
    if not left >= 0:
        return Risk.of_pairs([(math.inf, 1.0)])
    pairs = compose_pairs(counts, left)
    return Risk.of_pairs([(e + inflation, min(1.0, d + tails)) for e, d in pairs])
