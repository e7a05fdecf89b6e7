"""Noise multipliers and what each client may still release."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import numpy as np
import torch

from fl_lightning.accounting.composition import epsilon_upper_curve, gaussian_upper
from fl_lightning.accounting.correlated import CorrelatedPlan, least_multiplier, moves
from fl_lightning.accounting.exactness import (
    SamplerCost,
    affordable_charged,
    calibrate_charged,
    charged_epsilon,
    inexact_noise,
    noise_streams,
)
from fl_lightning.privacy.config import PrivacyConfig, per_client
from fl_lightning.privacy.mechanism import noise_event
from fl_lightning.values.event import NoiseEvent
from fl_lightning.values.release import ALL_CLIENTS, Release

UNLIMITED = 2**62
_log = logging.getLogger("pytorch_lightning")


class Budget:
    """Per-client multipliers, affordable steps and steps spent.

    Args:
        config: the privacy configuration.
        planned_steps: noised steps that the schedule plans for each client, [K].
        sampling_rate: Poisson rate q of a record in a step; 1 for whole updates.
        dims: number of parameters of each layer.
        noise_parts: how many clients' parts make the whole noise; None: it is from one hand.
        plan: of a run whose rounds share noise, which is charged as a whole; None: they do not.

    Clients of equal ε, δ and rate share one multiplier, calibrated for the one of them with most
    planned steps: the schedule is balanced, so this wastes at most one participation.
    """

    def __init__(
        self,
        config: PrivacyConfig,
        planned_steps: Sequence[int],
        sampling_rate: float,
        dims: Sequence[int],
        noise_parts: int | None = None,
        plan: CorrelatedPlan | None = None,
    ) -> None:
        self.config = config
        self.plan = plan
        # Of a plan: who took part in each round, and whose ε is not computed again yet.
        self._rounds: dict[int, np.ndarray] = {}
        self._unread: list[np.ndarray] = []
        self.sampling_rate = sampling_rate
        self.noise_parts = noise_parts
        self.streams = noise_streams(dims, votes=config.resolved_thresholds == "quantile")
        k = len(planned_steps)
        self.planned_steps = np.asarray(planned_steps, dtype=np.int64)
        self.delta = np.array(per_client(config.delta, k))
        self.target = (
            np.full(k, np.inf)
            if config.epsilon is None
            else np.array(per_client(config.epsilon, k))
        )
        self.multiplier = torch.zeros(k, dtype=torch.float64)
        self.affordable = np.full(k, UNLIMITED)
        self.spent = np.zeros(k, dtype=np.int64)
        self._epsilon = np.zeros(k)
        self._curves: dict[tuple[float, float], np.ndarray] = {}

    def calibrate(self, steps_a_release: int) -> None:
        """Find every client's multiplier (seconds for each distinct ε and δ).

        Raises:
            ValueError: if a given noise_multiplier does not even allow one release.
        """
        given = self.config.noise_multiplier
        k = len(self.spent)
        if given is not None:
            self.multiplier = torch.tensor(per_client(given, k), dtype=torch.float64)
        groups: dict[tuple[float, float, float], list[int]] = {}
        for i in range(k):
            group = (self.target[i], self.delta[i], float(self.multiplier[i]))
            groups.setdefault(group, []).append(i)
        for (target, delta, multiplier), members in groups.items():
            if np.isinf(target):
                continue
            steps = int(self.planned_steps[members].max())
            if self.plan is not None:
                self.multiplier[members] = least_multiplier(
                    noise_event(self.config, 1.0, 1.0), self.plan, members, epsilon=target,
                    delta=delta, cost=functools.partial(self.sampler_cost_at, delta=delta),
                )  # fmt: skip
                self.affordable[members] = self.planned_steps[members]
            elif given is None:
                self.multiplier[members] = self._least_noise(max(steps, 1), target, delta)
                self.affordable[members] = steps
            else:
                event = noise_event(self.config, multiplier, self.sampling_rate)
                self.affordable[members] = affordable_charged(
                    event, target, delta, self.sampler_cost_at(event, delta)
                )
                if self.affordable[members[0]] < steps_a_release:
                    raise ValueError(
                        f"noise_multiplier={multiplier} with epsilon={target}: one release alone "
                        f"would spend more, so client {members[0]} could never take part"
                    )

    def _least_noise(self, steps: int, target: float, delta: float) -> float:
        """The multiplier for a target; says so where much less than the target will be spent."""
        multiplier = calibrate_charged(
            noise_event(self.config, 1.0, self.sampling_rate),
            steps,
            target,
            delta,
            lambda event: self.sampler_cost_at(event, delta),
        )
        event = noise_event(self.config, multiplier, self.sampling_rate)
        spent = charged_epsilon(event, steps, delta, self.sampler_cost_at(event, delta))
        if spent < 0.9 * target:
            _log.info(
                f"epsilon={target:g} in {steps} steps at sampling_rate={self.sampling_rate:g} "
                "would need less noise than can be drawn exactly enough: with the least that can "
                f"(noise_multiplier {multiplier:.4g}) ε ≤ {spent:.3g} is spent"
            )
        return multiplier

    def sampler_cost_at(self, event: NoiseEvent, delta: float) -> SamplerCost:
        """The cost of a noised step at a δ that its event, ideal noise, does not hold."""
        form = self.config.noise_form
        return inexact_noise(
            event, form, streams=self.streams, delta=delta, noise_parts=self.noise_parts
        )

    def extra(self, client: int) -> SamplerCost:
        """The cost of each noised step of a client that its event, ideal noise, does not hold."""
        event = noise_event(self.config, float(self.multiplier[client]), self.sampling_rate)
        return self.sampler_cost_at(event, float(self.delta[client]))

    def spend(self, release: Release) -> None:
        """Count a release that stands in the ledger."""
        one = release.client != ALL_CLIENTS
        whose = release.client if one else release.members(len(self.spent))
        self.spent[whose] += release.steps
        if self.plan is not None:
            self._rounds[release.round] = release.members(len(self.spent))
            self._unread.append(self._rounds[release.round])

    def can_pay(self, release: Release) -> bool:
        """Whether a release keeps everyone whom it is charged to within their ε.

        Of rounds that share noise, whether it is the first of a planned round.
        """
        if self.plan is not None and not self._is_new(release.round):
            return False
        whose = release.members(len(self.spent))
        return bool(self.can_pay_each(whose, release.steps).all())

    def can_pay_each(self, clients: np.ndarray, steps: int) -> np.ndarray:
        """Whether `steps` more noised steps keep each of some clients within its ε, bool [k]."""
        return self.spent[clients] + steps <= self.affordable[clients]

    def _is_new(self, round: int) -> bool:
        assert self.plan is not None
        return round not in self._rounds and round < self.plan.horizon

    def nobody_can_pay(self, steps: int) -> bool:
        """Whether no client can take part in another round."""
        return bool((self.spent + steps > self.affordable).all())

    def epsilon_spent(self) -> np.ndarray:
        """Upper bound of ε so far of every client [K]: RDP, never above the calibrated target."""
        if self.plan is not None:
            return self._epsilon_of_plan(self.plan)
        result = np.full(len(self.spent), np.inf)
        multipliers = self.multiplier.numpy()
        for z, delta in self._promises(multipliers):
            members = (multipliers == z) & (self.delta == delta)
            spent = self.spent[members]
            result[members] = 0.0 if z == 0 and not spent.any() else self._curve(z, delta, spent)
        within = (self.spent <= self.affordable) & (multipliers > 0)
        return np.where(within, np.minimum(result, self.target), result)

    def _epsilon_of_plan(self, plan: CorrelatedPlan) -> np.ndarray:
        """ε of every client, [K], as if it had weight 1 in each round that it took part in."""
        ids = np.unique(np.concatenate([np.empty(0, np.int64), *self._unread]))
        self._unread = []
        known = {r: who[np.isin(who, ids)] for r, who in self._rounds.items()}
        if not len(ids):
            return np.minimum(self._epsilon, self.target)
        found = moves(
            plan.coefficients,
            plan.horizon,
            count=len(ids),
            clients=np.searchsorted(ids, np.concatenate(list(known.values()))),
            rounds=np.repeat(list(known), [len(who) for who in known.values()]),
        )
        multipliers = self.multiplier.numpy()[ids]
        for z, delta in self._promises(self.multiplier.numpy()):
            mine = (multipliers == z) & (self.delta[ids] == delta)
            if not mine.any():
                continue
            event = noise_event(self.config, z / float(found.largest[mine].max()), 1.0)
            extra = self.sampler_cost_at(event, delta)
            left = delta - plan.horizon * extra.delta
            epsilon = gaussian_upper(z / found.whole[mine], left) if left > 0 else np.inf
            self._epsilon[ids[mine]] = epsilon + plan.horizon * extra.epsilon
        return np.minimum(self._epsilon, self.target)

    def _promises(self, multipliers: np.ndarray) -> list[tuple[float, float]]:
        """Different pairs of multiplier and δ."""
        z, delta = multipliers, self.delta
        if not len(z) or ((z == z[0]).all() and (delta == delta[0]).all()):
            return [(float(z[0]), float(delta[0]))] if len(z) else []
        pairs = np.unique(np.stack([z, delta], 1), axis=0).tolist()
        return [(first, second) for first, second in pairs]

    def _curve(self, multiplier: float, delta: float, spent: np.ndarray) -> np.ndarray:
        if multiplier == 0:
            return np.where(spent > 0, np.inf, 0.0)
        known = self._curves.get((multiplier, delta))
        if known is None or len(known) <= spent.max():
            most = int(spent.max())
            length = max(int(self.planned_steps.max()), 1)
            length = length if most <= length else 2 * most
            event = noise_event(self.config, multiplier, self.sampling_rate)
            extra = self.sampler_cost_at(event, delta)
            left = delta - length * extra.delta
            known = np.full(length + 1, np.inf)
            if left >= 0:
                known = epsilon_upper_curve(event, length, left)
            known = known + extra.epsilon * np.arange(length + 1)
            known[0] = 0.0
            self._curves[multiplier, delta] = known
        return known[spent]

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint must keep: the multiplier is calibrated once and never again."""
        state: dict[str, object] = {
            "multiplier": self.multiplier.clone(),
            "affordable": torch.from_numpy(self.affordable.copy()),
        }
        if self.plan is not None:
            state["coefficients"] = list(self.plan.coefficients)
        return state

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore `state_dict`; steps spent come from the ledger, which wins."""
        multiplier = state["multiplier"]
        assert isinstance(multiplier, torch.Tensor)
        if len(multiplier) != len(self.spent):
            raise ValueError(
                f"checkpoint: it is of a run with {len(multiplier)} clients, this one has "
                f"{len(self.spent)}"
            )
        self.multiplier = multiplier.clone()
        affordable = torch.as_tensor(state["affordable"], dtype=torch.int64)
        self.affordable = affordable.clone().numpy()
