"""The public rules of local training."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains. `FederatedModule` explains each rule."""

    lr: float
    momentum: float
    sampling_rate: float | None
    batch_size: int | None
    local_steps: int | None
    local_epochs: int
    seed: int
    proximal: float = field(default=0.0, repr=False)
    personal: tuple[str, ...] = field(default=(), repr=False)  # names of parameters
    personal_steps: int = field(default=20, repr=False)
    personal_lr: float = field(default=1.0, repr=False)

    @property
    def noised_steps(self) -> int:
        """Local steps a round under Poisson sampling: an epoch is 1/q steps."""
        if self.local_steps is not None:
            return self.local_steps
        assert self.sampling_rate is not None
        return self.local_epochs * max(1, round(1 / self.sampling_rate))


def named_rules(training: LocalTraining) -> str:
    """Every rule that noise is bound to; later ones only where they are used, so that it stays."""
    later = f", proximal={training.proximal!r}" if training.proximal else ""
    if training.personal:
        fit = (training.personal, training.personal_steps, training.personal_lr)
        later += f", personal={fit!r}"
    return f"{training!r}{later}"
