"""What private evaluations cost: noised numbers of right answers on records that clients hold out.

An evaluation is one number a client, or one for all of them in a sum: how many of its held-out
records a public model gets right. One record moves its client's number by at most 1, and whoever
exchanges a whole client moves its share of right answers, a number in [0, 1], by at most 1. So an
evaluation is one unsampled Gaussian or Laplace mechanism whose noise multiplier is the scale of its
noise, under both adjacencies.

- **A record is the unit.** Held-out records are no training records; which is which was decided by
  their places alone. Under both adjacencies a neighbour differs in the record of one place. It is a
  training record or a held-out one, and is charged for the releases that read such records: not for
  the others, which are functions of releases and of the other records (parallel composition,
  McSherry 2009). A client's epsilon is the larger of the two.
- **A client is the unit.** Both kinds of record are its own. Evaluations and updates are composed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fl_lightning.accounting.exactness import SamplerCost, calibrate_charged, inexact_noise
from fl_lightning.values.event import NoiseEvent


def is_due(round: int, rounds: int, every: int) -> bool:
    """Whether a round of `rounds` planned ones ends with an evaluation; the last one always does.

    Args:
        round: from 0.
        rounds: planned.
        every: rounds between evaluations; 0: none.
    """
    return every > 0 and ((round + 1) % every == 0 or round + 1 == rounds)


def evaluation_cost(event: NoiseEvent, form: str, delta: float) -> SamplerCost:
    """What one evaluation costs beyond its event: it is a single noised number.

    Args:
        event: of the evaluation.
        form: of the noise.
        delta: the client's δ.
    """
    return inexact_noise(event, form, streams=(1,), delta=delta)


@dataclass(frozen=True)
class EvaluationPlan:
    """Evaluations of a run, planned before its first round. Public.

    Args:
        every: rounds between them.
        rounds: planned.
        share: part of a client's ε that they may cost, where a client is the unit.
        apart: whether a record is the unit, and evaluations read others than updates.
        form: of the noise.
        records: held-out records of each client, int64 [K]; one without any takes no part.
    """

    every: int
    rounds: int
    share: float
    apart: bool
    form: str
    records: np.ndarray

    @property
    def times(self) -> int:
        """How many there are."""
        return sum(is_due(round, self.rounds, self.every) for round in range(self.rounds))

    def multiplier(self, event: NoiseEvent, epsilon: float, delta: float) -> float:
        """The noise multiplier with which all of them cost a client at most its part of ε.

        Args:
            event: of any multiplier; unsampled.
            epsilon, delta: of the client for the whole run.
        """
        part = epsilon if self.apart else self.share * epsilon
        return calibrate_charged(
            event, self.times, part, delta, lambda e: evaluation_cost(e, self.form, delta)
        )

    def beside(
        self, event: NoiseEvent, multiplier: float, delta: float
    ) -> tuple[NoiseEvent, int, SamplerCost] | None:
        """What a client's updates are composed with; None where its records are apart."""
        if self.apart:
            return None
        own = replace(event, noise_multiplier=multiplier)
        return own, self.times, evaluation_cost(own, self.form, delta)
