"""Noise multipliers and what each client may still release."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fl_lightning.accounting.correlated import CorrelatedPlan, least_multiplier
from fl_lightning.accounting.evaluation import EvaluationPlan
from fl_lightning.accounting.exactness import (
    Beside,
    SamplerCost,
    affordable_charged,
    calibrate_charged,
    charged_epsilon,
    inexact_noise,
    noise_streams,
)
from fl_lightning.accounting.running import RunningEpsilon
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
        evaluations: private evaluations of the run; None: there are none.

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
        evaluations: EvaluationPlan | None = None,
    ) -> None:
        self.config = config
        self.plan = plan
        self.evaluations = evaluations
        self._rounds: set[int] = set()  # released, of a plan
        self.running: RunningEpsilon | None = None
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
        self.evaluation_multiplier = torch.zeros(k, dtype=torch.float64)
        self.evaluated = np.zeros(k, dtype=np.int64)
        self.evaluation_lines = 0

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
            beside = None
            if self.evaluations is not None:
                event = noise_event(self.config, 1.0, 1.0)
                z = self.evaluations.multiplier(event, target, delta)
                self.evaluation_multiplier[members] = z
                beside = self.evaluations.beside(event, z, delta)
            if self.plan is not None:
                self.multiplier[members] = least_multiplier(
                    noise_event(self.config, 1.0, 1.0), self.plan, members, epsilon=target,
                    delta=delta, cost=functools.partial(self.sampler_cost_at, delta=delta),
                )  # fmt: skip
                self.affordable[members] = self.planned_steps[members]
            elif given is None:
                self.multiplier[members] = self._least_noise(max(steps, 1), target, delta, beside)
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

    def _least_noise(self, steps: int, target: float, delta: float, beside: Beside | None) -> float:
        """The multiplier for a target; says so where much less than the target will be spent."""
        multiplier = calibrate_charged(
            noise_event(self.config, 1.0, self.sampling_rate),
            steps,
            target,
            delta,
            lambda event: self.sampler_cost_at(event, delta),
            beside=beside,
        )
        event = noise_event(self.config, multiplier, self.sampling_rate)
        spent = charged_epsilon(event, steps, delta, self.sampler_cost_at(event, delta), beside)
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

    def follow(self, header: Mapping[str, Any]) -> None:
        """Keep up every client's ε from here on, by the facts of the ledger that lines go to."""
        self.running = RunningEpsilon(header)

    def spend(self, release: Release) -> None:
        """Count a release that stands in the ledger."""
        one = release.client != ALL_CLIENTS
        whose = release.client if one else release.members(len(self.spent))
        (self.evaluated if release.evaluation else self.spent)[whose] += release.steps
        self.evaluation_lines += release.evaluation
        if self.plan is not None:
            self._rounds.add(release.round)
        if self.running is not None:
            self.running.add(release)

    def can_pay(self, release: Release) -> bool:
        """Whether a release keeps everyone whom it is charged to within their ε.

        Of rounds that share noise, whether it is the first of a planned round.
        """
        if self.plan is not None and not self._is_new(release.round):
            return False
        whose = release.members(len(self.spent))
        if release.evaluation:
            return bool(self.can_evaluate_each(whose).all())
        return bool(self.can_pay_each(whose, release.steps).all())

    def can_evaluate_each(self, clients: np.ndarray) -> np.ndarray:
        """Whether one more evaluation is within what was planned for each client, bool [k]."""
        times = 0 if self.evaluations is None else self.evaluations.times
        return self.evaluated[clients] + 1 <= times

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
        """Upper bound of ε so far of every client [K]; see `RunningEpsilon`.

        Raises:
            RuntimeError: no ledger is followed.
        """
        if self.running is None:
            raise RuntimeError("epsilon_spent: the budget follows no ledger yet; see `follow`")
        return self.running.epsilon()

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint must keep: the multiplier is calibrated once and never again."""
        state: dict[str, object] = {
            "multiplier": self.multiplier.clone(),
            "affordable": torch.from_numpy(self.affordable.copy()),
        }
        if self.plan is not None:
            state["coefficients"] = list(self.plan.coefficients)
        if self.evaluations is not None:
            state["evaluation_multiplier"] = self.evaluation_multiplier.clone()
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
        if self.evaluations is not None:
            known = state["evaluation_multiplier"]
            assert isinstance(known, torch.Tensor)
            self.evaluation_multiplier = known.clone()
        affordable = torch.as_tensor(state["affordable"], dtype=torch.int64)
        self.affordable = affordable.clone().numpy()
