"""The public rules of local training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains; see `FederatedModule` for the meaning of each rule.

    Its repr is part of what noise is bound to: other fields give other noise.
    """

    lr: float
    momentum: float
    sampling_rate: float | None
    batch_size: int | None
    local_steps: int | None
    local_epochs: int
    seed: int

    @property
    def noised_steps(self) -> int:
        """Local steps a round under Poisson sampling: an epoch is 1/q steps."""
        if self.local_steps is not None:
            return self.local_steps
        assert self.sampling_rate is not None
        return self.local_epochs * max(1, round(1 / self.sampling_rate))
