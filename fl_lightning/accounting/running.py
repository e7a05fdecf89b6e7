"""Every client's epsilon while a run goes on: what its ledger says, kept up line by line.

The ledger's own accountant answers for any mixture of events, from all lines, in a tenth of a
second and more for each different account. Here a line is added to what was before, and a client's
epsilon takes microseconds (Gaussians without sampling, in closed form) or a millisecond for each
different number of steps (`step_curve`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fl_lightning.accounting.composition import compose_epsilon
from fl_lightning.accounting.correlated import moves, whole_run
from fl_lightning.accounting.exactness import SamplerCost
from fl_lightning.accounting.gaussian import gaussian_epsilon
from fl_lightning.accounting.sum_costs import (
    client_multipliers,
    extra_of,
    num_clients,
    of_client,
)
from fl_lightning.values.event import NoiseEvent
from fl_lightning.values.release import ALL_CLIENTS, Release

if TYPE_CHECKING:
    from fl_lightning.accounting.step_curve import StepCurve

# More different events than this, and each is bounded by RDP until the run ends.
_MOST_CURVES = 32

Floats = npt.NDArray[np.float64]
Extra = Callable[[NoiseEvent, float], SamplerCost]


class RunningEpsilon:
    """What the lines so far cost each client. Public.

    Args:
        header: facts of the run, as its ledger has them.

    Guarantees:
        `epsilon` is never below what the ledger comes to. It equals that, to nine digits, where
        noise is Gaussian and without sampling, and after all planned steps; before them it is up to
        1 % above. Where a client's multiplier changes within a run with sampling, or with Laplace
        noise, each of its steps counts as the one with least noise.
    """

    def __init__(self, header: Mapping[str, Any]) -> None:
        self._header = header
        everyone = num_clients(header)
        self._delta = np.array([_number(header["delta"], k) for k in range(everyone)])
        self._event: NoiseEvent | None = None
        self._steps = np.zeros(everyone, dtype=np.int64)
        self._least = np.full(everyone, np.inf)  # multiplier of the step with least noise
        self._precision = np.zeros(everyone)  # sum of 1 / multiplier² over the steps
        self._on_top, self._tails = np.zeros(everyone), np.zeros(everyone)
        self._gaussians: dict[tuple[float, float], float] = {}
        self._curves: dict[tuple[float, float], StepCurve] = {}
        self._held_out = _Evaluations(header) if header.get("evaluation") else None
        self._whole = _WholeRun(header) if header.get("coefficients") is not None else None

    @property
    def exact(self) -> bool:
        """Whether `epsilon` is the ledger's at every moment."""
        return self._event is None or _closed(self._event)

    def add(self, release: Release) -> None:
        """Count a line that stands in the ledger."""
        if release.evaluation:
            assert self._held_out is not None
            self._held_out.add(release)
            return
        self._event = release.event if self._event is None else self._event
        if self._whole is not None:
            self._whole.add(release)
            return
        if release.client != ALL_CLIENTS:
            self._add_one(release)
            return
        ids = release.members(len(self._steps))
        multipliers = client_multipliers(self._header, release)
        self._steps[ids] += release.steps
        np.minimum.at(self._least, ids, multipliers)
        with np.errstate(divide="ignore"):
            self._precision[ids] += release.steps / multipliers**2
        on_top, tails = self._beyond(release, ids, multipliers)
        self._on_top[ids] += on_top
        self._tails[ids] += tails

    def _add_one(self, release: Release) -> None:
        """Count a line of one client: there may be a million of them."""
        client, z = release.client, release.noise_multiplier
        self._steps[client] += release.steps
        self._least[client] = min(self._least[client], z)
        self._precision[client] += release.steps / z**2 if z else math.inf
        self._on_top[client] += release.epsilon_inflation
        self._tails[client] += release.tail_delta

    def _beyond(
        self, release: Release, ids: npt.NDArray[np.int64], multipliers: Floats
    ) -> tuple[Any, Any]:
        """What a line costs beyond its event: (epsilon, delta), of each client or of all."""
        if not release.is_sum:
            return release.epsilon_inflation, release.tail_delta
        extra = _extra(self._header, release)
        costs = {}
        pairs = list(zip(multipliers.tolist(), self._delta[ids].tolist(), strict=True))
        for pair in set(pairs):
            one = extra(replace(release.event, noise_multiplier=pair[0]), _zero(pair[1]))
            costs[pair] = release.steps * one.epsilon, release.steps * one.delta
        on_top, tails = np.array([costs[pair] for pair in pairs]).T
        return on_top, tails

    def epsilon(self) -> Floats:
        """Epsilon of every client so far, [K]; 0 without releases, inf without noise."""
        held = self._held_out
        if held is None or held.event is None:
            return self._of_updates()
        alone = held.epsilon(self._delta)
        if self._event is None or held.apart:
            return np.maximum(self._of_updates(), alone)
        if _closed(self._event):
            return self._of_updates(held.precision(), held.tails) + held.on_top
        rows = np.stack(
            [self._least, self._steps, held.least, held.times, self._tails + held.tails]
        )
        rows = np.concatenate([rows, self._delta[None]]).T
        different, back = np.unique(rows, axis=0, return_inverse=True)
        both = [_of_both(self._event, held.event, *row) for row in different.tolist()]
        return np.array(both)[back.ravel()] + self._on_top + held.on_top

    def _of_updates(self, precision: Floats | float = 0.0, tails: Floats | float = 0.0) -> Floats:
        """Of updates alone, or with what other Gaussians without sampling add."""
        if self._event is None:
            return np.zeros(len(self._steps))
        if self._whole is not None:
            return self._whole.epsilon(self._event, self._delta)
        found = np.zeros(len(self._steps))
        if _closed(self._event):
            there = np.flatnonzero(self._precision + precision)
            with np.errstate(divide="ignore"):
                multipliers = 1 / np.sqrt((self._precision + precision)[there])
            left = self._delta - self._tails - tails
            found[there] = self._of_gaussians(multipliers, left[there])
        else:
            there = np.flatnonzero(self._steps)
            found[there] = self._by_steps(self._event, there)
        return found + self._on_top

    def _of_gaussians(self, multipliers: Floats, delta: Floats) -> Floats:
        """`gaussian_epsilon`, of what the last call did not have: a round changes few accounts."""
        pairs = list(zip(multipliers.tolist(), delta.tolist(), strict=True))
        known = self._gaussians
        fresh = [pair for pair in set(pairs) if pair not in known]
        if fresh:
            values = gaussian_epsilon(*np.array(fresh).T).tolist()
            known = known | dict(zip(fresh, values, strict=True))
        self._gaussians = {pair: known[pair] for pair in pairs}
        return np.array([known[pair] for pair in pairs])

    def _by_steps(self, event: NoiseEvent, there: npt.NDArray[np.int64]) -> Floats:
        """Of steps with sampling, or with Laplace noise, of each client that took some."""
        rows = np.stack([self._least, self._delta, self._steps, self._delta - self._tails], 1)
        different, back = np.unique(rows[there], axis=0, return_inverse=True)
        few = len(np.unique(different[:, :2], axis=0)) <= _MOST_CURVES
        found = [
            self._of_steps(replace(event, noise_multiplier=z), delta, int(steps), left, few)
            for z, delta, steps, left in different.tolist()
        ]
        return np.array(found)[back.ravel()]

    def _of_steps(
        self, event: NoiseEvent, delta: float, steps: int, left: float, by_curve: bool
    ) -> float:
        if not left >= 0 or event.noise_multiplier == 0:
            return math.inf
        if not by_curve:
            return compose_epsilon({event: steps}, left, accountant="rdp")
        key = event.noise_multiplier, delta
        if key not in self._curves:
            from fl_lightning.accounting.step_curve import StepCurve  # loads scipy

            planned = max(self._header.get("planned_steps") or [0])
            self._curves[key] = StepCurve(event, max(planned, steps), delta)
        return self._curves[key].epsilon(steps, left)


class _Evaluations:
    """Private evaluations so far: a client's all have its own noise multiplier."""

    def __init__(self, header: Mapping[str, Any]) -> None:
        everyone = num_clients(header)
        self._header = header
        self.apart = bool(header["evaluation"]["apart"])
        self.event: NoiseEvent | None = None
        self.times = np.zeros(everyone)
        self.least = np.full(everyone, np.inf)
        self.on_top, self.tails = np.zeros(everyone), np.zeros(everyone)

    def add(self, release: Release) -> None:
        self.event = release.event
        ids = release.members(len(self.times))
        self.times[ids] += 1
        self.least[ids] = np.minimum(self.least[ids], client_multipliers(self._header, release))
        self.on_top[ids] += release.epsilon_inflation
        self.tails[ids] += release.tail_delta

    def precision(self) -> Floats:
        """Sum of 1 / multiplier² over the evaluations of each client."""
        with np.errstate(divide="ignore"):
            return self.times / self.least**2

    def epsilon(self, delta: Floats) -> Floats:
        """Of evaluations alone, [K]."""
        assert self.event is not None
        rows = np.stack([self.least, self.times, delta - self.tails], 1)
        different, back = np.unique(rows, axis=0, return_inverse=True)
        found = [
            compose_epsilon({replace(self.event, noise_multiplier=z): int(n)}, left)
            if n and left >= 0
            else (math.inf if n else 0.0)
            for z, n, left in different.tolist()
        ]
        return np.array(found)[back.ravel()] + self.on_top


def _of_both(event: NoiseEvent, evaluation: NoiseEvent, *row: float) -> float:
    """Updates and evaluations of a client together, by RDP."""
    least, steps, own, times, tails, delta = row
    counts = {}
    if steps:
        counts[replace(event, noise_multiplier=least)] = int(steps)
    if times:
        counts[replace(evaluation, noise_multiplier=own)] = int(times)
    left = delta - tails
    return compose_epsilon(counts, left, accountant="rdp") if left >= 0 else math.inf


class _WholeRun:
    """Rounds that share noise: each client is charged with all planned rounds at once."""

    def __init__(self, header: Mapping[str, Any]) -> None:
        self._header = header
        self._rounds: list[tuple[int, npt.NDArray[np.int64], Floats]] = []
        self._read = 0
        self._votes = False
        self._found = np.zeros(num_clients(header))

    def add(self, release: Release) -> None:
        with np.errstate(divide="ignore"):
            sizes = 1 / client_multipliers(self._header, release)
        self._rounds.append((release.round, release.members(len(self._found)), sizes))
        self._votes |= release.vote_noise_scale is not None

    def epsilon(self, event: NoiseEvent, delta: Floats) -> Floats:
        """As far as rounds are known that were not when it was asked for last."""
        fresh = [ids for _, ids, _ in self._rounds[self._read :]]
        self._read = len(self._rounds)
        if not fresh:
            return self._found.copy()
        ids = np.unique(np.concatenate(fresh))
        mine = [(t, np.isin(who, ids), who, sizes) for t, who, sizes in self._rounds]
        moved = moves(
            self._header["coefficients"],
            int(self._header["horizon"]),
            count=len(ids),
            clients=np.searchsorted(ids, np.concatenate([who[m] for _, m, who, _ in mine])),
            rounds=np.repeat([t for t, *_ in mine], [int(m.sum()) for _, m, *_ in mine]),
            sizes=np.concatenate([sizes[m] for _, m, _, sizes in mine]),
        )
        extra = extra_of(self._header, votes=self._votes)
        costs: dict[tuple[float, float], SamplerCost] = {}
        horizon = int(self._header["horizon"])
        pairs = list(zip(moved.largest.tolist(), delta[ids].tolist(), strict=True))
        for largest, own in set(pairs):
            costs[largest, own] = whole_run(
                event, 1.0, largest, horizon, lambda event, own=own: extra(event, _zero(own))
            )[1]
        tails = np.array([costs[pair].delta for pair in pairs])
        found = gaussian_epsilon(1 / moved.whole, delta[ids] - tails)
        self._found[ids] = found + np.array([costs[pair].epsilon for pair in pairs])
        return self._found.copy()


def _closed(event: NoiseEvent) -> bool:
    return event.mechanism == "gaussian" and event.sampling_rate == 1


def _extra(header: Mapping[str, Any], release: Release) -> Extra:
    return extra_of(header, votes=release.vote_noise_scale is not None)


def _number(value: Any, client: int) -> float:
    found = of_client(value, client)
    return math.nan if found is None else found


def _zero(delta: float) -> float:
    return 0.0 if math.isnan(delta) else delta
