"""What the holder of records allows, whoever asks: a file of its own at the node."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from fl_lightning.deploy.secure_sum.policy import SumPolicy
from fl_lightning.local.rules import LocalTraining
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.release.agreement import Agreement

# Past releases that clip norms may look back on: memory, not privacy.
_LONGEST_HISTORY = 1000


class Refused(ValueError):
    """A request that is not granted. Its words follow from public facts alone."""


@dataclass(frozen=True)
class Policy:
    """The limits of a node; no request widens them.

    Args:
        epsilon: ε of one run, above 0. All runs together cost the holder at most runs · epsilon.
        delta: δ of one run, in [0, 1); below 1 / records where records are protected.
        runs: runs that may release anything, ever, at least 1.
        rounds: most rounds that a run may plan for, at least 1.
        local_steps: most local steps in one round, or passes where a run counts those, and most
            steps of a fit of personal layers; at least 1.
        networks: digests of what may be trained; `python -m fl_lightning.deploy digest` prints that
            of the node's own network.
        settings: what may be protected: one record of the holder (`record+local`), or all of its
            records together (`client+local`, or `client+secure_sum` with others' noise).
        generators: generators of noise that may be asked for.
        announce_records: whether the server learns how many records there are.
        answer_seconds: an answer leaves no earlier than so many seconds after its request, so that
            its time does not show how much there was to compute.
        simulation: whether a public seed may be asked for, which protects nobody: for trials.
        secure_sum: with whom the node takes part in secure sums; None: in none.

    Raises:
        ValueError: a value out of range.
    """

    epsilon: float
    delta: float
    runs: int = 1
    rounds: int = 100
    local_steps: int = 100
    networks: list[str] = field(default_factory=list)
    settings: list[Literal["record+local", "client+local", "client+secure_sum"]] = field(
        default_factory=lambda: ["record+local"]
    )
    generators: list[Literal["chacha20", "chacha8", "philox10"]] = field(
        default_factory=lambda: ["chacha20"]
    )
    announce_records: bool = True
    answer_seconds: float = 0.0
    simulation: bool = False
    secure_sum: SumPolicy | None = None

    def __post_init__(self) -> None:
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise ValueError(f"policy: epsilon={self.epsilon} must be positive and finite")
        if not 0 <= self.delta < 1:
            raise ValueError(f"policy: delta={self.delta} must be in [0, 1)")
        for name in ("runs", "rounds", "local_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"policy: {name}={getattr(self, name)} must be at least 1")
        if not (self.answer_seconds >= 0 and math.isfinite(self.answer_seconds)):
            raise ValueError(f"policy: answer_seconds={self.answer_seconds} must be at least 0")
        for digest in self.networks:
            if len(digest) != 64:
                raise ValueError(f"policy: networks has {digest!r}, not a digest of 64 digits")


def check_terms(
    policy: Policy, terms: Agreement, privacy: PrivacyConfig, training: LocalTraining
) -> None:
    """Whether a holder allows what a server proposes.

    Args:
        policy: of the holder.
        terms: as proposed.
        privacy, training: the rules in them.

    Raises:
        Refused: naming the term, its value and the limit.
    """
    steps = training.local_steps or training.local_epochs
    steps = training.noised_steps if privacy.unit == "record" else steps
    steps = max(steps, training.personal_steps) if training.personal else steps
    planned = terms.span if privacy.evaluate_every else terms.rounds
    limits: Sequence[tuple[str, object, bool, object]] = (
        ("network", terms.network, terms.network in policy.networks, "one of its networks"),
        ("setting", privacy.setting, privacy.setting in policy.settings, policy.settings),
        ("rng", privacy.rng, privacy.rng in policy.generators, policy.generators),
        ("rounds", terms.rounds, terms.rounds <= policy.rounds, f"at most {policy.rounds}"),
        ("rounds with evaluations", planned, planned <= policy.rounds, f"at most {policy.rounds}"),
        ("local steps", steps, steps <= policy.local_steps, f"at most {policy.local_steps}"),
        ("history", privacy.history, privacy.history <= _LONGEST_HISTORY, _LONGEST_HISTORY),
        ("seed", privacy.seed, privacy.seed is None or policy.simulation, "none: secret noise"),
    )
    for name, value, allowed, limit in limits:
        if not allowed:
            raise Refused(f"policy: {name} is {value!r}, the holder allows {limit}")
