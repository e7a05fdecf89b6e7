"""Epsilon after each number of equal steps, by privacy loss distributions; for displays.

One step's loss is put on a grid that suits all planned steps, pessimistically, and transformed
once. A power of the transform is the loss of that many steps, so each number of steps costs one
inverse transform: under a millisecond, where the ledger's accountant, which makes a grid for each
number, takes a tenth of a second and more. The grid is about ten times coarser, so a value is
slightly larger (0.2 %), never smaller.

Reference:
    Koskela et al. 2020 (arXiv 1906.03049), Doroshenko et al. 2022 (arXiv 2207.04380, algorithm 1).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import fft, signal, special

from fl_lightning.accounting.composition import (
    LARGEST_PLD_EPSILON,
    SMALLEST_PLD_DELTA,
    compose_epsilon,
)
from fl_lightning.accounting.shift_mixtures import ShiftMixture, step_profiles
from fl_lightning.values.event import NoiseEvent

# Probability left to each end of the composed loss; it is paid from delta.
_TAIL = 1e-14
_MOST_CELLS = 1 << 21

Floats = npt.NDArray[np.float64]


class StepCurve:
    """Epsilon of equal steps, whatever their number.

    Args:
        event: the step; with noise.
        planned: how many steps the grid is made for, >= 1; more are counted by RDP.
        delta: the delta that epsilon will be asked at, or one near it.

    Guarantees:
        `epsilon` is never below that of the ledger's accountant, and equals it where the steps are
        Gaussian and not sampled, and where they are those that were planned.
    """

    def __init__(self, event: NoiseEvent, planned: int, delta: float) -> None:
        self.event, self.planned = event, planned
        self._losses: list[_Loss] | None = None
        self._delta = delta
        self._known: dict[tuple[int, float], float] = {}

    def epsilon(self, steps: int, delta: float) -> float:
        """Upper bound of epsilon after `steps` >= 0 steps at `delta`."""
        known = self._known.get((steps, delta))
        if known is None:
            known = self._known[steps, delta] = self._compute(steps, delta)
        return known

    def _compute(self, steps: int, delta: float) -> float:
        counts = {self.event: steps}
        closed = self.event.mechanism == "gaussian" and self.event.sampling_rate == 1
        if closed or steps in (0, self.planned):
            return compose_epsilon(counts, delta)
        bound = compose_epsilon(counts, delta, accountant="rdp")
        if steps > self.planned or delta < SMALLEST_PLD_DELTA:
            return bound
        if self._losses is None:
            self._losses = _losses(self.event, self.planned, self._delta)
        found = max((loss.epsilon(steps, delta) for loss in self._losses), default=math.inf)
        # No run is more private for having more steps.
        return min(bound, found, compose_epsilon({self.event: self.planned}, delta))


class _Loss:
    """The loss of one step in one direction, ready to be composed at most `planned` times."""

    def __init__(self, start: int, deltas: Floats, interval: float, planned: int) -> None:
        self.interval, self.beyond = interval, float(deltas[-1])
        masses = _connected_dots(deltas, interval)
        losses = (start + np.arange(len(masses))) * interval
        low, high = _window(losses, masses, planned)
        self.first = math.floor(low / interval)
        self.cells = fft.next_fast_len(math.ceil(high / interval) - self.first + 1, real=True)
        # Losses are counted from 0 by the transform; `epsilon` moves them to the window.
        self.start = start
        self.transform = None
        if self.cells <= _MOST_CELLS and len(masses) <= self.cells:
            self.transform = fft.rfft(masses, self.cells)

    def epsilon(self, steps: int, delta: float) -> float:
        """Where delta of `steps` steps is `delta`; inf where the grid cannot say."""
        if self.transform is None:
            return math.inf
        masses = np.maximum(fft.irfft(self.transform**steps, self.cells), 0.0)
        masses = np.roll(masses, steps * self.start - self.first)
        lost = -math.expm1(steps * math.log1p(-self.beyond)) + 3 * _TAIL
        # above[k]: probability of more than loss k; scaled[k]: the same with exp(loss k - loss).
        above = np.append(np.cumsum(masses[:0:-1])[::-1], 0.0)
        shrink = math.exp(-self.interval)
        scaled = signal.lfilter([0.0, shrink], [1.0, -shrink], masses[::-1])[::-1]
        enough = np.flatnonzero(lost + above - scaled <= delta)
        if not len(enough):
            return math.inf
        k = int(enough[0])
        at = (self.first + k) * self.interval
        if k == 0:
            return max(at, 0.0)
        # Between two points of the grid delta is above - exp(epsilon - loss) scaled.
        k -= 1
        least = (lost + above[k] - delta) / scaled[k]
        return float(max(min(at, at - self.interval + math.log(max(least, 1.0))), 0.0))


def _losses(event: NoiseEvent, planned: int, delta: float) -> list[_Loss]:
    guess = compose_epsilon({event: planned}, delta, accountant="rdp")
    if not 0 < guess <= LARGEST_PLD_EPSILON:
        return []
    fine = max(1e-2, min(1.0, 1e4 / planned)) ** 0.5
    interval = 1e-3 * 2.0 ** round(math.log2(max(guess, 1e-2) * fine))
    profiles = step_profiles(_as_shift(event), interval, 1e-6 * delta / planned)
    with np.errstate(all="ignore"):
        return [_Loss(start, deltas, interval, planned) for start, deltas in profiles]


def _as_shift(event: NoiseEvent) -> ShiftMixture:
    q, shift = event.sampling_rate, 1 / event.noise_multiplier
    if event.sampled_replacement:
        return ShiftMixture("gaussian", (shift / 2,), (1.0,), exchange=q)
    if q == 1:
        return ShiftMixture(event.mechanism, (shift,), (1.0,))
    return ShiftMixture(event.mechanism, (0.0, shift), (1 - q, q))


def _connected_dots(deltas: Floats, interval: float) -> Floats:
    """Masses on the grid whose deltas there are the given ones; what is beyond it is left out."""
    if len(deltas) == 1:
        return 1 - deltas
    steps, grow = np.diff(deltas), math.expm1(interval)
    inner = (steps[1:] - math.exp(interval) * steps[:-1]) / grow
    first = (1 - deltas[0]) + steps[0] / grow
    last = steps[-1] / math.expm1(-interval)
    return np.maximum(np.concatenate([[first], inner, [last]]), 0.0)


def _window(losses: Floats, masses: Floats, planned: int) -> tuple[float, float]:
    """Losses between which all but `_TAIL` lies at each end, after any number of planned steps.

    By Chernoff's bound. A moment of at least 1 is largest after all steps, one below 1 is bounded
    by 1.
    """
    with np.errstate(divide="ignore"):
        logs = np.log(masses)
    # A loss of size 1 / order matters; orders around the one that is best for all steps.
    spread = math.sqrt(max(float(masses @ losses**2), 1e-300) * planned)
    orders = np.geomspace(0.1, 60, 60) / spread
    ends = []
    for sign in (1.0, -1.0):
        moments = special.logsumexp(logs + sign * orders[:, None] * losses, axis=1)
        bounds = (planned * np.maximum(moments, 0.0) - math.log(_TAIL)) / orders
        ends.append(sign * float(bounds.min()))
    high = max(ends[0], 0.0, float(losses[-1]))
    return min(ends[1], 0.0, float(losses[0])), high
