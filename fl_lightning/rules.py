"""The public rules of a run: what is promised, who takes part, how clients train, what weighs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fl_lightning.local.rules import LocalTraining
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.server.aggregate import WEIGHTINGS
from fl_lightning.server.faults import Faults

EXECUTIONS = ("auto", "vmap", "loop")


@dataclass(frozen=True)
class Rules:
    """Everything about a run that its author chose, apart from the network and the records.

    Args:
        privacy: what is promised to whom.
        clients_per_round, sampling_rate, batch_size, local_steps, local_epochs, client_lr,
            client_momentum, client_proximal, personal_steps, personal_lr, weighting, denoise,
            planned_rounds, execution, memory_budget, seed: as in `FederatedModule`.
        personal: names of the parameters of personal layers.
        faults: how often clients fail or come late.

    Raises:
        ValueError: an argument out of range, or two that contradict each other.
    """

    privacy: PrivacyConfig
    clients_per_round: int | None = None
    sampling_rate: float | None = 0.1
    batch_size: int | None = None
    local_steps: int | None = 1
    local_epochs: int = 1
    client_lr: float = 0.1
    client_momentum: float = 0.0
    client_proximal: float = 0.0
    personal: tuple[str, ...] = ()
    personal_steps: int = 20
    personal_lr: float = 1.0
    weighting: str = "records"
    denoise: bool = False
    planned_rounds: int | None = None
    execution: str = "auto"
    memory_budget: float = 1.0
    seed: int = 0
    faults: Faults = field(default_factory=Faults)

    def __post_init__(self) -> None:
        _check_batches(self)
        _check_ranges(self)
        _check_personal(self)
        _check_denoise(self)

    @property
    def training(self) -> LocalTraining:
        """How a client trains."""
        return LocalTraining(
            lr=self.client_lr,
            momentum=self.client_momentum,
            sampling_rate=self.sampling_rate,
            batch_size=self.batch_size,
            local_steps=self.local_steps,
            local_epochs=self.local_epochs,
            seed=self.seed,
            proximal=self.client_proximal,
            personal=self.personal,
            personal_steps=self.personal_steps,
            personal_lr=self.personal_lr,
        )

    @property
    def steps_a_release(self) -> int:
        """Noised events in one release: local steps where records are protected, else one."""
        return self.training.noised_steps if self.privacy.unit == "record" else 1

    def cohort_size(self, num_clients: int) -> int:
        """Clients of a round, of a population of `num_clients`."""
        return self.clients_per_round or num_clients

    def cohort_rate(self, num_clients: int) -> float | None:
        """Poisson rate of a client in a round; None where the cohort is public."""
        size = self.cohort_size(num_clients)
        poisson = self.privacy.poisson_cohort and size < num_clients
        return size / num_clients if poisson else None

    def clients_at_once(self, largest_client: int, max_examples: int) -> int:
        """Clients that are trained together.

        Args:
            largest_client: records of the largest client.
            max_examples: records that are computed at once.
        """
        width = self.batch_size or math.ceil((self.sampling_rate or 1.0) * largest_client)
        return max(1, max_examples // width)


def planned_rounds(rules: Rules, max_epochs: int | None, resumed: dict[str, Any] | None) -> int:
    """Rounds that cohorts and noise are planned for; a private run keeps its plan."""
    kept = (resumed or {}).get("planned_rounds") if rules.privacy.private else None
    planned = kept or rules.planned_rounds or max_epochs
    assert planned is not None
    return planned


def _check_batches(rules: Rules) -> None:
    rate, batch_size = rules.sampling_rate, rules.batch_size
    if (rate is None) == (batch_size is None):
        raise ValueError(
            f"sampling_rate={rate} and batch_size={batch_size}: give one of the two and set the "
            "other to null"
        )
    if rules.privacy.unit == "record" and rate is None:
        raise ValueError(
            f"batch_size={batch_size} with setting='record+local': shuffled minibatches have no "
            "accounting here; use sampling_rate"
        )
    if rate is not None and not 0 < rate <= 1:
        raise ValueError(f"sampling_rate={rate} must be in (0, 1]")


def _check_ranges(rules: Rules) -> None:
    if not 0 <= rules.client_momentum < 1:
        raise ValueError(f"client_momentum={rules.client_momentum} must be in [0, 1)")
    if not 0 <= rules.client_proximal < float("inf"):
        raise ValueError(f"client_proximal={rules.client_proximal} must be at least 0 and finite")
    whole = ("batch_size", "local_steps", "personal_steps", "clients_per_round", "planned_rounds")
    for name in whole:
        value = getattr(rules, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if rules.local_epochs < 1:
        raise ValueError(f"local_epochs={rules.local_epochs} must be at least 1")
    for name in ("client_lr", "personal_lr", "memory_budget"):
        value = getattr(rules, name)
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} must be positive and finite")
    for name, choices in (("weighting", WEIGHTINGS), ("execution", EXECUTIONS)):
        value = getattr(rules, name)
        if value not in choices:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")
    if rules.seed < 0:
        raise ValueError(f"seed={rules.seed} must be at least 0")


def _check_personal(rules: Rules) -> None:
    """Whether what personal layers saw of the records is covered by what is promised."""
    if rules.personal and rules.privacy.unit == "record":
        raise ValueError(
            f"personal_layers with setting={rules.privacy.setting!r}: layers that are fitted to "
            "records without noise shape every gradient that leaves the client, and no bound for "
            "one record is known; use client+local, client+aggregator or client+secure_sum"
        )


def _check_denoise(rules: Rules) -> None:
    """Whether the noise of a release is known to the server."""
    if not rules.denoise:
        return
    privacy = rules.privacy
    if not privacy.private or privacy.summed:
        raise ValueError(
            f"denoise=True with setting={privacy.setting!r}: there is no noise of each client to "
            "take away; use record+local or client+local"
        )
    if privacy.unit == "record" and rules.local_steps != 1:
        raise ValueError(
            f"denoise=True with local_steps={rules.local_steps}: later steps start from noisy "
            "ones, so that the noise of a release is known for local_steps=1 alone"
        )
