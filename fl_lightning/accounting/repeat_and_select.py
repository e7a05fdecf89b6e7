"""What it costs to run a mechanism a random number of times and to show only the best run.

A candidate is a mechanism Q: it draws hyper-parameters, trains, and gives a model with a noised
score. K candidates run, K being drawn from a public law and kept secret; the one of the best score
is shown, and nothing else of any other. Let f be the generating function of K, m = E[K] = f'(1),
and q the probability that a candidate is no better than a given one (ties broken by fresh coins,
which all candidates are equally likely to win). The shown candidate has the density f'(q)·Q, so its
ratio for two neighbours is that of Q, times f'(q)/f'(q'). The better candidates are an event of Q,
hence 1 - q' <= T(1 - q), T(u) being the largest power of a test of false positive rate u that the
curve of Q allows. With r >= log of the largest f'(q)/f'(q'), every event S of what is shown has

    A(S) - e^ε·A'(S) <= ∫_S f'(q)·(Q - e^(ε - r)·Q') <= m·δ_Q(ε - r),    so ε_A(δ) <= r + ε_Q(δ/m).

- **Truncated negative binomial** (η > -1, 0 < γ < 1; geometric at η = 1, logarithmic at η = 0):
  f'(x) is proportional to (1 - (1 - γ)·x)^-(1 + η), so r = (1 + η)·log of the largest
  (γ + (1 - γ)·T(u)) / (γ + (1 - γ)·u).
- **Poisson** (mean μ): f'(x) = μ·e^(μ·(x - 1)), so r = μ·max(T(u) - u) = μ·δ_Q(0). It may run
  nothing, in which case nothing is shown, with the same probability for both neighbours.

Candidates of other hyper-parameters have other curves. The law of hyper-parameters is public, so a
mixture of candidates that each keep r and ε_Q(δ/m) keeps both.

This protects from those who see what is shown. Who sees other candidates, or how many there were,
is not covered: against them all candidates are composed.

Reference:
    Papernot and Steinke 2022, arXiv:2110.03620 (the laws of K, and bounds by Renyi divergences);
    Koskela, Redberg and Wang 2024, arXiv:2402.06701 (bounds by privacy profiles). The form here,
    with the whole trade-off curve in r, is derived above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fl_lightning.accounting.composition import compose_epsilon, joint_multiplier
from fl_lightning.accounting.risk import risk_of
from fl_lightning.values.event import NoiseEvent

LAWS = ("negative_binomial", "poisson")
LARGEST_MEAN = 10_000
_GRID = 4000
Power = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class TrialNumber:
    """The law of the number of candidates. Public; the number itself is secret.

    Args:
        law: "negative_binomial" (truncated: at least one) or "poisson".
        mean: expected number, above 1 (negative binomial) or 0, up to 10 000.
        shape: η of the negative binomial, above -1: 1 is geometric, 0 logarithmic. For the same
            mean, a smaller one costs less, and the number is more often small.

    Raises:
        ValueError: a value out of range.
    """

    law: str = "negative_binomial"
    mean: float = 20.0
    shape: float = 1.0

    def __post_init__(self) -> None:
        if self.law not in LAWS:
            raise ValueError(f"law={self.law!r} must be one of {', '.join(LAWS)}")
        least = 1 if self.law == "negative_binomial" else 0
        if not least < self.mean <= LARGEST_MEAN:
            raise ValueError(f"mean={self.mean} must be in ({least}, {LARGEST_MEAN}]")
        if not -1 < self.shape <= 100:
            raise ValueError(f"shape={self.shape} must be in (-1, 100]")

    @cached_property
    def gamma(self) -> float:
        """γ of the negative binomial, at which its mean is `mean` (rounded to a larger one)."""
        low, high = -745.0, 0.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (low, middle) if _mean(middle, self.shape) <= self.mean else (middle, high)
        return math.exp(low)

    def probabilities(self, rest: float = 1e-12) -> np.ndarray:
        """P[K = 0], P[K = 1], ... up to where at most `rest` is left."""
        chance, left, found = self._first()
        number = len(found) - 1
        while left > rest and (chance > rest / 1e6 or number < self.mean):
            found.append(chance)
            left -= chance
            number += 1
            chance *= self._next(number)
        return np.array(found)

    def draw(self, uniform: float) -> int:
        """The number by inversion.

        Args:
            uniform: in [0, 1), uniformly random and secret.
        """
        chance, left, found = self._first()
        number, below = len(found) - 1, 1 - left
        while below <= uniform and (chance > 1e-30 or number < self.mean):
            number += 1
            below += chance
            chance *= self._next(number)
        return number

    def _first(self) -> tuple[float, float, list[float]]:
        """P[K = 1], the probability above what is given, and what is given: P[K = 0]."""
        if self.law == "poisson":
            none = math.exp(-self.mean)
            return self.mean * none, 1 - none, [none]
        loss = -math.log(self.gamma)
        first = 1 / loss if self.shape == 0 else self.shape / math.expm1(self.shape * loss)
        return -math.expm1(-loss) * first, 1.0, [0.0]

    def _next(self, number: int) -> float:
        """P[K = number + 1] / P[K = number]."""
        if self.law == "poisson":
            return self.mean / (number + 1)
        return (1 - self.gamma) * (number + self.shape) / (number + 1)


def _mean(log_gamma: float, shape: float) -> float:
    """Expected number of a truncated negative binomial."""
    odds = math.expm1(-log_gamma)  # (1 - γ) / γ
    if log_gamma == 0:
        return 1.0
    if shape == 0:
        return odds / -log_gamma
    return shape * odds / -math.expm1(shape * log_gamma)


def selection_loss(number: TrialNumber, power: Power, advantage: float) -> float:
    """r: by how much the choice itself raises ε.

    Args:
        number: law of the number of candidates.
        power: of a candidate, false positive rates → largest true positive rates, both [n].
        advantage: largest difference of the two.

    Returns:
        An upper bound; of the negative binomial over a grid that loses about 0.003 times 1 + η.
    """
    if number.law == "poisson":
        return number.mean * advantage
    gamma = number.gamma
    rates = np.concatenate([[0.0], np.geomspace(1e-4 * gamma, 1.0, _GRID)])
    # Between two rates the power is at most that of the larger one.
    powers = power(rates[1:])
    odds = (gamma + (1 - gamma) * powers) / (gamma + (1 - gamma) * rates[:-1])
    return (1 + number.shape) * math.log(float(odds.max()))


def selection_cost(
    number: TrialNumber,
    counts: Mapping[NoiseEvent, int],
    delta: float,
    inflation: float = 0.0,
    tails: float = 0.0,
) -> tuple[float, float]:
    """What the best of a random number of candidates costs, that all have the same events.

    Args:
        number: law of their number.
        counts: events of one candidate, its score among them.
        delta: of what is shown, in (0, 1).
        inflation, tails: what inexact noise adds to ε and δ of one candidate.

    Returns:
        (r, ε_Q(δ/m)): their sum is ε of what is shown at `delta`.
    """
    part = delta / max(1.0, number.mean)
    if not part > tails:
        return math.inf, math.inf
    key = tuple((event, count) for event, count in counts.items() if count)
    if not inflation and key and all(_closed(event) for event, _ in key):
        power, advantage = _of_gaussian(1 / joint_multiplier(key), tails)
    else:
        risk = risk_of(counts, part, inflation, tails)
        power, advantage = risk.power, risk.advantage()
    loss = selection_loss(number, power, advantage)
    return loss, compose_epsilon(counts, part - tails) + inflation


def _closed(event: NoiseEvent) -> bool:
    return event.mechanism == "gaussian" and event.sampling_rate == 1 and event.noise_multiplier > 0


def _of_gaussian(move: float, tails: float) -> tuple[Power, float]:
    """Power and advantage of a Gaussian that moves by `move` deviations (Dong et al. 2019)."""
    from scipy import special

    def power(rates: np.ndarray) -> np.ndarray:
        return np.minimum(special.ndtr(special.ndtri(rates) + move) + tails + 1e-15, 1.0)

    return power, min(1.0, float(2 * special.ndtr(move / 2) - 1) + tails)


@dataclass(frozen=True)
class CandidateBudget:
    """What each candidate of a search may spend. Public.

    Args:
        epsilon, delta: of one candidate.
        loss: r that the choice may add; `loss` + `epsilon` is the ε of the search.
    """

    epsilon: float
    delta: float
    loss: float


def candidate_budget(number: TrialNumber, epsilon: float, delta: float) -> CandidateBudget:
    """Divide the ε of a search between its candidates and the choice.

    The division is the one at which a Gaussian without sampling spends both parts. A candidate of
    another curve that would lose more than `loss` must get a smaller ε.

    Args:
        number: law of the number of candidates.
        epsilon, delta: of the whole search, above 0.

    Raises:
        ValueError: a value out of range.
    """
    if not (epsilon > 0 and math.isfinite(epsilon) and 0 < delta < 1):
        raise ValueError(f"epsilon={epsilon} and delta={delta} must be above 0 and finite")

    def cost(log_z: float) -> tuple[float, float]:
        return selection_cost(number, {NoiseEvent("gaussian", math.exp(log_z)): 1}, delta)

    low, high = math.log(1e-2), math.log(1e5)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(cost(middle)) <= epsilon else (middle, high)
    loss, _ = cost(high)
    loss = min(loss * (1 + 1e-6), epsilon)
    return CandidateBudget(epsilon - loss, delta / max(1.0, number.mean), loss)
