"""One line of the ledger: what a client released and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fl_lightning import _chain
from fl_lightning.privacy.accounting import NoiseEvent

ALL_CLIENTS = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One release of one client: public facts of the mechanism, never data.

    Args:
        client, round, attempt: whose, when, and the how-manyth try (0 is the first). Client
            `ALL_CLIENTS` stands for every client of the population: one sum that each of them
            could have been in, at the same cost.
        first_step: index of the first noised step in the client's stream.
        steps: noised events inside this release (local steps, or 1 a participation), >= 1.
        mechanism, noise_multiplier, sampling_rate, adjacency: as in `NoiseEvent`; the multiplier is
            the total z or lambda, votes included. 0 means that nothing was noised.
        vote_noise_scale: noise scale of the votes, None without votes.
        num_layers: layers released together.
        clip_norm, shares: last step's C_l and pi_l.
        binding: hex digest of everything that the noise stream is bound to.
        digest: hex digest of the released bytes.
        quantum: coarsest grid of the released values, None where not quantised.
        epsilon_inflation: what the release costs beyond its events, added to epsilon.
        tail_delta: delta paid for cut tails and the like, added to delta.
        guarantee: False where epsilon is nominal (`abstract`).

    Raises:
        ValueError: a value outside its range.
    """

    client: int
    round: int
    attempt: int = 0
    first_step: int = 0
    steps: int
    mechanism: str
    noise_multiplier: float
    sampling_rate: float
    adjacency: str
    vote_noise_scale: float | None = None
    num_layers: int
    clip_norm: tuple[float, ...]
    shares: tuple[float, ...]
    binding: str
    digest: str
    quantum: float | None = None
    epsilon_inflation: float = 0.0
    tail_delta: float = 0.0
    guarantee: bool = True

    def __post_init__(self) -> None:
        for name in ("client", "round", "attempt", "first_step", "steps", "num_layers"):
            value, least = getattr(self, name), 1 if name in ("steps", "num_layers") else 0
            least = ALL_CLIENTS if name == "client" else least
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
        for name in ("clip_norm", "shares"):
            values = tuple(float(v) for v in getattr(self, name))
            if len(values) != self.num_layers or any(math.isnan(v) or v < 0 for v in values):
                raise ValueError(
                    f"{name} must be {self.num_layers} numbers >= 0 (num_layers), got {values}"
                )
            object.__setattr__(self, name, values)
        for name in ("epsilon_inflation", "tail_delta"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("binding", "digest"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a hex string, got {getattr(self, name)!r}")
        self.event  # noqa: B018 - the event's own checks

    @property
    def event(self) -> NoiseEvent:
        """One step of this release as the accountant sees it."""
        return NoiseEvent(self.mechanism, self.noise_multiplier, self.sampling_rate, self.adjacency)


_FIELDS = tuple(f.name for f in fields(Release))


def release_entry(release: Release) -> dict[str, Any]:
    """A release as a ledger line holds it."""
    values = {name: _chain.plain(getattr(release, name)) for name in _FIELDS}
    return {"kind": "release", **values}


def parse_release(entry: Mapping[str, Any]) -> Release:
    """The release of a ledger line; raises where a field is missing or out of range."""
    known = {name: entry[name] for name in _FIELDS}
    for name in ("clip_norm", "shares"):
        known[name] = tuple(float(v) for v in known[name])
    for name in ("epsilon_inflation", "tail_delta", "noise_multiplier", "sampling_rate"):
        known[name] = float(known[name])
    for name in ("vote_noise_scale", "quantum"):
        known[name] = None if known[name] is None else float(known[name])
    return Release(**known)
