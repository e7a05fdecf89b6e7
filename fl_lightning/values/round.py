"""The values that pass between the parts of a round."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fl_lightning.values.event import NoiseEvent

Params = dict[str, Tensor]


@dataclass(frozen=True)
class LayerPolicy:
    """How each layer of each client is clipped and noised; a function of releases only.

    Attributes:
        clip_norm: C_l, float64 [clients, L].
        shares: π_l, float64 [clients, L], rows sum to 1.
        contribution: s_l, float64 [clients, L], rows sum to 1.
        noise_scale: standard deviation or b of a layer's noise, float64 [clients, L].
        votes_at: L1 norm that records vote on, [clients, L], or None without votes.
        vote_noise_scale: noise scale of the votes, [clients], or None without votes.
    """

    clip_norm: Tensor
    shares: Tensor
    contribution: Tensor
    noise_scale: Tensor
    votes_at: Tensor | None = None
    vote_noise_scale: Tensor | None = None

    def select(self, rows: Tensor) -> LayerPolicy:
        """The rows of some clients only."""
        picked = {name: value[rows] for name, value in vars(self).items() if value is not None}
        return LayerPolicy(**picked)


@dataclass(frozen=True)
class PrivateUpdate:
    """What a group of clients may upload, with everything that its noise must be charged for.

    Attributes:
        clients: ids [k].
        update: released model changes, each [clients, ...].
        events: one accounting event a client; none without privacy.
        steps: noised events in this release.
        policy: policy of the last noised step; None without privacy.
        sim_only: private statistics that only a simulation may look at.
    """

    clients: Tensor
    update: Params
    events: list[NoiseEvent]
    steps: int
    policy: LayerPolicy | None
    sim_only: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def nothing(cls, params: Params, policy: LayerPolicy | None, num_layers: int) -> PrivateUpdate:
        """The release of nobody: no rows.

        Args:
            params: the global model, for names and shapes.
            policy: without rows, or None without privacy.
            num_layers: L.
        """
        return cls(
            clients=torch.empty(0, dtype=torch.int64),
            update={name: value.new_empty(0, *value.shape) for name, value in params.items()},
            events=[],
            steps=1,
            policy=policy,
            sim_only={
                "clipped_fraction": torch.empty(0, num_layers),
                "nonfinite": torch.empty(0),
            },
        )

    def select(self, keep: list[int]) -> PrivateUpdate:
        """The rows of some clients only."""
        rows = torch.tensor(keep, dtype=torch.int64)
        return PrivateUpdate(
            clients=self.clients[rows],
            update={name: value[rows] for name, value in self.update.items()},
            events=[self.events[i] for i in keep] if self.events else [],
            steps=self.steps,
            policy=None if self.policy is None else self.policy.select(rows),
            sim_only={name: value[rows] for name, value in self.sim_only.items()},
        )


@dataclass(frozen=True)
class RoundResult:
    """What one round showed, for metrics and pictures.

    Attributes:
        round: round number, from 0.
        cohort: client ids that took part, [m].
        clip_norm, shares, contribution, noise_scale: policy of the last step, [m, L].
        clipped_fraction: sim_only, fraction of units whose layer was clipped, [m, L].
        nonfinite: sim_only, number of units or layers zeroed as non-finite; None where clients
            keep it to themselves.
        participants: clients of the round as far as that is public.
        epsilon_spent: upper bound of ε of every client of the population so far, [K].
        seconds: wall-clock time of the round.
    """

    round: int
    cohort: np.ndarray
    clip_norm: np.ndarray
    shares: np.ndarray
    contribution: np.ndarray
    noise_scale: np.ndarray
    clipped_fraction: np.ndarray
    nonfinite: int | None
    participants: int
    epsilon_spent: np.ndarray
    seconds: float

    @classmethod
    def of(
        cls,
        round: int,
        released: list[PrivateUpdate],
        *,
        participants: int,
        epsilon_spent: np.ndarray,
        seconds: float,
    ) -> RoundResult:
        """Put together what the groups of a cohort released; no columns without privacy."""
        policies = [(u.policy, u.sim_only) for u in released if u.policy is not None]

        def column(name: str) -> np.ndarray:
            rows = [getattr(policy, name).numpy() for policy, _ in policies]
            return np.concatenate(rows) if rows else np.zeros((0, 0))

        clipped = [
            seen["clipped_fraction"].numpy() if seen else np.full(policy.clip_norm.shape, np.nan)
            for policy, seen in policies
        ]
        nonfinite = [float(u.sim_only["nonfinite"].sum()) for u in released if u.sim_only]
        return cls(
            round=round,
            cohort=np.concatenate([np.empty(0, np.int64), *(u.clients.numpy() for u in released)]),
            clip_norm=column("clip_norm"),
            shares=column("shares"),
            contribution=column("contribution"),
            noise_scale=column("noise_scale"),
            clipped_fraction=np.concatenate(clipped) if clipped else np.zeros((0, 0)),
            nonfinite=int(sum(nonfinite)) if nonfinite or not released else None,
            participants=participants,
            epsilon_spent=epsilon_spent,
            seconds=seconds,
        )
