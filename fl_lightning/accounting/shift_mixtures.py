"""Privacy loss of noise that is moved by a random shift of known law: what a group does to a sum.

A step adds noise of scale 1 to a sum. With the group's data the sum is moved by s_j with
probability w_j, as secret coins have it; without the data it is not moved. The pair of
distributions P = sum_j w_j noise(s_j) and Q = noise(0) in one dimension dominates every such step
in as many dimensions as there are, in both directions. Proof: the likelihood ratio of the step is
sum_j w_j L_j under Q. Every L_j is below the ratio of the one-dimensional noise in convex order
(that is the domination for a single shift: Gaussians of shorter shifts, Laplace noise of one
coordinate with the whole L1 shift). A sum with given marginals is largest in convex order where its
terms rise together, and the one-dimensional ratios all rise with x. Both hockey-stick divergences
are expectations under Q of convex functions of that sum.

With `exchange`, the data is replaced and both neighbours have it: P = (1 - c) noise(0) + c
noise(s), Q = (1 - c) noise(0) + c noise(-s), where s is drawn by w and seen by everybody.

Reference:
    Ganesh 2024 (arXiv 2401.10294) for groups and Gaussians, Doroshenko et al. 2022
    (arXiv 2207.04380) for the pessimistic discretisation; the proof for both noises is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy import special

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

# Probability left out at each end of a step's loss, all steps together, relative to delta.
_CUT = 1e-6
_MOST_POINTS = 60_000


@dataclass(frozen=True)
class ShiftMixture:
    """One step that a group moves by a random shift. Public.

    Args:
        mechanism: "gaussian" or "laplace".
        shifts: s_j >= 0 in noise scales, rising.
        weights: their probabilities, > 0; they sum to 1.
        exchange: None, or the probability c of the shift where data is replaced (Gaussian).
    """

    mechanism: str
    shifts: tuple[float, ...]
    weights: tuple[float, ...]
    exchange: float | None = None

    def pure_epsilon(self) -> float:
        """The step's epsilon at delta 0; inf for a Gaussian that moves."""
        if self.mechanism == "gaussian":
            return math.inf if self.shifts[-1] > 0 else 0.0
        logs = [math.log(w) + s for w, s in zip(self.weights, self.shifts, strict=True)]
        most = max(logs)
        return most + math.log(math.fsum(math.exp(x - most) for x in logs))


@dataclass(frozen=True)
class _Pair:
    """Two distributions whose log ratio rises with x: a table of it, and their tails."""

    mechanism: str
    upper: tuple[np.ndarray, np.ndarray]
    lower: tuple[np.ndarray, np.ndarray]

    def loss(self, x: np.ndarray) -> np.ndarray:
        return self._log_density(x, *self.upper) - self._log_density(x, *self.lower)

    def _log_density(self, x: np.ndarray, shifts: np.ndarray, weights: np.ndarray) -> np.ndarray:
        far = x[:, None] - shifts
        terms = -(far**2) / 2 if self.mechanism == "gaussian" else -np.abs(far)
        terms += np.log(weights)
        most = terms.max(axis=1)
        return most + np.log(np.exp(terms - most[:, None]).sum(axis=1))

    def above(self, x: np.ndarray, which: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """Probability of more than x."""
        return _tail(self.mechanism, x[:, None] - which[0]) @ which[1]

    def below(self, x: np.ndarray, which: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return _tail(self.mechanism, which[0] - x[:, None]) @ which[1]


def _tail(mechanism: str, x: np.ndarray) -> np.ndarray:
    if mechanism == "gaussian":
        return special.ndtr(-x)
    return np.where(x > 0, np.exp(-np.abs(x)) / 2, 1 - np.exp(-np.abs(x)) / 2)


def _pairs(step: ShiftMixture) -> list[tuple[float, _Pair]]:
    """Pairs of distributions with the probability that each is the one in force."""
    shifts, weights = np.array(step.shifts), np.array(step.weights)
    still = (np.zeros(1), np.ones(1))
    if step.exchange is None:
        return [(1.0, _Pair(step.mechanism, (shifts, weights), still))]
    coins = np.array([1 - step.exchange, step.exchange])
    return [
        (w, _Pair("gaussian", (np.array([0.0, s]), coins), (np.array([0.0, -s]), coins)))
        for w, s in zip(step.weights, step.shifts, strict=True)
    ]


def _table(pair: _Pair) -> np.ndarray:
    """Points x that hold all but 1e-60 of both distributions and every kink."""
    reach = 16.5 if pair.mechanism == "gaussian" else 0.0
    centres = np.concatenate([pair.upper[0], pair.lower[0]])
    low, high = centres.min() - reach, centres.max() + reach
    count = int(min(max(2000, (high - low) * 100), _MOST_POINTS))
    return np.union1d(np.linspace(low, high, count), centres)


def _inverse(pair: _Pair, x: np.ndarray, loss: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where the loss passes each wanted value; beyond the table the ends of the line.

    The divergence is largest at the true point, so an error of 1e-6 here is one of 1e-12 there.
    """
    found = np.interp(wanted, loss, x)
    step = np.maximum(np.minimum(1e-4, x[-1] - found), 1e-9)
    at, beside = pair.loss(found), pair.loss(found + step)
    slope = (beside - at) / step
    polished = found - np.where(slope > 1e-9, (at - wanted) / np.maximum(slope, 1e-9), 0.0)
    found = np.where(np.abs(polished - found) < 1e-2, polished, found)
    found = np.where(wanted >= loss[-1], np.inf, found)
    return np.where(wanted < loss[0], -np.inf, found)


def _forward(pair: _Pair, x: np.ndarray, loss: np.ndarray, epsilons: np.ndarray) -> np.ndarray:
    """Hockey-stick divergence of the upper distribution from the lower one."""
    cut = _inverse(pair, x, loss, epsilons)
    with np.errstate(over="ignore", invalid="ignore"):
        lower = np.exp(epsilons) * pair.above(cut, pair.lower)
    return np.clip(pair.above(cut, pair.upper) - np.nan_to_num(lower, posinf=np.inf), 0, 1)


def _backward(pair: _Pair, x: np.ndarray, loss: np.ndarray, epsilons: np.ndarray) -> np.ndarray:
    """Hockey-stick divergence of the lower distribution from the upper one."""
    cut = _inverse(pair, x, loss, -epsilons)
    # Where the loss is flat up to its least value, no output is left for a larger epsilon.
    cut = np.where(-epsilons <= loss[0], -np.inf, cut)
    with np.errstate(over="ignore", invalid="ignore"):
        upper = np.exp(epsilons) * pair.below(cut, pair.upper)
    return np.clip(pair.below(cut, pair.lower) - np.nan_to_num(upper, posinf=np.inf), 0, 1)


def _ends(pair: _Pair, x: np.ndarray, loss: np.ndarray, cut: float) -> tuple[float, float]:
    """Losses between which all but `cut` of the upper distribution lies, and of the lower one."""
    high = np.flatnonzero(pair.above(x, pair.upper) > cut)
    low = np.flatnonzero(pair.below(x, pair.lower) > cut)
    top = min(high[-1] + 1, len(x) - 1) if len(high) else len(x) - 1
    return float(loss[max(low[0] - 1, 0)] if len(low) else loss[0]), float(loss[top])


def step_profiles(
    step: ShiftMixture, interval: float, cut: float
) -> list[tuple[int, npt.NDArray[np.float64]]]:
    """Deltas of one step at whole multiples of an interval, in each direction that differs.

    Args:
        step: what happens once.
        interval: between two epsilons, > 0.
        cut: probability that may lie beyond each end of them.

    Returns:
        (first multiple, deltas [n], falling) with the group's data against without it; then, unless
        data is exchanged, which is the same both ways, without against with.
    """
    tables = [(w, p, x, p.loss(x)) for w, p in _pairs(step) for x in [_table(p)]]
    ends = [_ends(pair, x, loss, cut) for _, pair, x, loss in tables]
    low, high = min(e[0] for e in ends), max(e[1] for e in ends)

    def profile(direction, first: float, last: float) -> tuple[int, npt.NDArray[np.float64]]:
        start, stop = math.floor(first / interval), math.ceil(last / interval)
        epsilons = np.arange(start, stop + 1) * interval
        deltas = np.sum([w * direction(p, x, loss, epsilons) for w, p, x, loss in tables], axis=0)
        return start, np.minimum.accumulate(deltas)

    remove = profile(_forward, low, high)
    return [remove] if step.exchange is not None else [remove, profile(_backward, -high, -low)]


def _step_distribution(step: ShiftMixture, interval: float, cut: float) -> PrivacyLossDistribution:
    from dp_accounting.pld import pld_pmf
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    return PrivacyLossDistribution(
        *(
            pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(
                interval, start, start + len(deltas) - 1, deltas
            ).to_dense_pmf()
            for start, deltas in step_profiles(step, interval, cut)
        )
    )


def _expected(step: ShiftMixture) -> tuple[float, float]:
    """Mean and variance of the loss of a step with the group's data."""
    mean = square = 0.0
    for weight, pair in _pairs(step):
        x = _table(pair)
        loss = pair.loss(x)
        mass = np.diff(-pair.above(x, pair.upper), prepend=-1.0, append=0.0)
        values = np.append(loss, loss[-1])
        mean += weight * float(mass @ values)
        square += weight * float(mass @ values**2)
    return mean, max(square - mean**2, 0.0)


@lru_cache(maxsize=256)
def _composed(steps: tuple[tuple[ShiftMixture, int], ...], delta: float) -> PrivacyLossDistribution:
    """Composed loss on a grid of about 4e-4 (many steps: 2e-5) of the expected epsilon."""
    moments = [(count, *_expected(step)) for step, count in steps]
    spread = math.sqrt(sum(count * variance for count, _, variance in moments))
    guess = sum(count * mean for count, mean, _ in moments) + 4 * spread
    total = sum(count for _, count in steps)
    fine = max(2e-3, min(1.0, 200 / total)) ** 0.5
    interval = 4e-4 * 2.0 ** round(math.log2(max(guess, 1e-2) * fine))
    result = None
    with np.errstate(all="ignore"):
        for step, count in steps:
            each = _step_distribution(step, interval, delta * _CUT / total).self_compose(count)
            result = each if result is None else result.compose(each)
    assert result is not None
    return result


def mixture_epsilon(counts: Mapping[ShiftMixture, int], delta: float) -> float:
    """Epsilon of all steps together at `delta`; never too low but for rounding.

    Args:
        counts: how often each step happened.
        delta: in [0, 1).
    """
    pure = sum(step.pure_epsilon() * count for step, count in counts.items())
    if delta == 0 or pure == 0:
        return pure
    return min(pure, float(_composed(_key(counts), delta).get_epsilon_for_delta(delta)))


def mixture_delta(counts: Mapping[ShiftMixture, int], epsilon: float, *, finest: float) -> float:
    """Delta of all steps together at `epsilon`; never too low but for rounding.

    Args:
        counts: how often each step happened.
        epsilon: >= 0.
        finest: delta of a call of `mixture_epsilon` whose distribution is used again.
    """
    pure = sum(step.pure_epsilon() * count for step, count in counts.items())
    if epsilon >= pure:
        return 0.0
    return float(_composed(_key(counts), finest).get_delta_for_epsilon(epsilon))


def _key(counts: Mapping[ShiftMixture, int]) -> tuple[tuple[ShiftMixture, int], ...]:
    return tuple((step, int(count)) for step, count in counts.items() if count)
