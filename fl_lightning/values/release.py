"""One line of the ledger: what a client, or a cohort as one sum, released and what it cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fl_lightning.values.client_set import decode
from fl_lightning.values.event import NoiseEvent
from fl_lightning.values.plain_json import plain

ALL_CLIENTS = -1


@dataclass(frozen=True, kw_only=True)
class Release:
    """One release of one client, or of a cohort as one sum: public facts, never data.

    Args:
        client, round, attempt: whose, when, and the how-manyth try (0 is the first). Client
            `ALL_CLIENTS` stands for the clients that could have been in one sum.
        first_step: index of the first noised step in the client's stream; of a sum, the number of
            sums before it.
        steps: noised events inside this release (local steps, or 1 a participation), >= 1.
        mechanism, noise_multiplier, sampling_rate, adjacency: as in `NoiseEvent`; the multiplier is
            the total z or lambda, votes included. 0 means that nothing was noised.
        vote_noise_scale: noise scale of the votes, None without votes.
        num_layers: layers released together.
        clip_norm, shares: last step's C_l and pi_l.
        binding: hex digest of everything that the noise stream is bound to.
        digest: of the released bytes: "blake3:" and hex digits, or those of SHA-256 alone.
        quantum: coarsest grid of the released values, None where not quantised.
        epsilon_inflation: what the release costs beyond its events, added to epsilon; of a sum, the
            largest over its clients.
        tail_delta: delta paid for cut tails and the like, added to delta; of a sum, the largest.
        guarantee: False where epsilon is nominal (`abstract`).
        largest_weight: of a sum, the largest weight asked for by its clients: the others' are
            relative to it. `noise_multiplier` is then that of a client of weight 1, and each
            client's own follows from the header's weights (`sums.client_multipliers`). None: not a
            sum, or one of schema 0, which costs everybody the same.
        clients: of a sum, those who could have been in it (see `client_set`); None: everybody.
        spent: of a sum, the digest of the steps that every client had spent before it.
        combined: of a sum of a run whose rounds share noise, the earlier rounds whose noise was
            drawn again in it, latest first. None: its noise is its own.
        evaluation: whether it is a noised number of right answers on held-out records, and no
            update; `clients` then are those whose records were in it. It has steps of its own.

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
    largest_weight: float | None = None
    clients: str | None = None
    spent: str | None = None
    combined: tuple[int, ...] | None = None
    evaluation: bool = False

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
        if self.evaluation:
            self._check_evaluation()
        elif any(getattr(self, name) is not None for name in (*_OF_SUMS, _OF_CORRELATED)):
            self._check_sum()
            self._check_combined()

    def _check_evaluation(self) -> None:
        for name in ("largest_weight", "spent", _OF_CORRELATED, "vote_noise_scale"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} must be None in an evaluation, got {getattr(self, name)}")
        if self.clients is not None:
            if self.client != ALL_CLIENTS:
                raise ValueError(f"clients must be None in an evaluation of client {self.client}")
            decode(self.clients)

    def _check_sum(self) -> None:
        if self.client != ALL_CLIENTS:
            raise ValueError(f"client must be {ALL_CLIENTS} in a sum, got {self.client}")
        weight = self.largest_weight
        if weight is None or not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"largest_weight must be a number > 0 in a sum, got {weight!r}")
        if not isinstance(self.spent, str):
            raise ValueError(f"spent must be a hex string in a sum, got {self.spent!r}")
        if self.clients is not None:
            decode(self.clients)

    def _check_combined(self) -> None:
        later = [self.round, *(self.combined or ())]
        if not all(0 <= b < a for a, b in itertools.pairwise(later)):
            raise ValueError(f"combined must be rounds before {self.round}, got {later[1:]}")

    @property
    def is_sum(self) -> bool:
        """Whether this is a sum whose clients' own costs follow from the header."""
        return self.largest_weight is not None

    def members(self, num_clients: int) -> np.ndarray:
        """Ids of the clients that it is charged to, ascending, int64 [n].

        Args:
            num_clients: clients of the population.
        """
        if self.client != ALL_CLIENTS:
            return np.array([self.client])
        return self.members_of(self.clients, num_clients)

    @staticmethod
    def members_of(clients: str | None, num_clients: int) -> np.ndarray:
        """`members` of a sum with `clients`."""
        return np.arange(num_clients) if clients is None else decode(clients)

    def covers(self, clients: np.ndarray) -> np.ndarray:
        """Whether it is charged to each of some clients, bool [k]."""
        if self.client != ALL_CLIENTS:
            return clients == self.client
        if self.clients is None:
            return np.ones(len(clients), dtype=bool)
        return np.isin(clients, decode(self.clients), assume_unique=True)

    @property
    def event(self) -> NoiseEvent:
        """One step of this release as the accountant sees it."""
        return NoiseEvent(self.mechanism, self.noise_multiplier, self.sampling_rate, self.adjacency)


_OF_SUMS = ("largest_weight", "clients", "spent")
_OF_CORRELATED = "combined"
_APART = (*_OF_SUMS, _OF_CORRELATED, "evaluation")
_FIELDS = tuple(f.name for f in fields(Release) if f.name not in _APART)
_NAMES = {
    "release": _FIELDS,
    "sum": (*_FIELDS, *_OF_SUMS),
    "evaluation": (*_FIELDS, "clients"),
}
KINDS = tuple(_NAMES)


def release_entry(release: Release) -> dict[str, Any]:
    """A release as a ledger line holds it."""
    kind = "evaluation" if release.evaluation else "sum" if release.is_sum else "release"
    names = _NAMES[kind]
    # Written where it is stated, so that all other lines are as they were.
    names = names if release.combined is None else (*names, _OF_CORRELATED)
    values = {name: plain(getattr(release, name)) for name in names}
    return {"kind": kind, **values}


def parse_release(entry: Mapping[str, Any]) -> Release:
    """The release of a ledger line; raises where a field is missing or out of range."""
    known = {name: entry[name] for name in _NAMES[entry["kind"]]}
    for name in ("clip_norm", "shares"):
        known[name] = tuple(float(v) for v in known[name])
    if entry.get(_OF_CORRELATED) is not None:
        known[_OF_CORRELATED] = tuple(int(v) for v in entry[_OF_CORRELATED])
    for name in ("epsilon_inflation", "tail_delta", "noise_multiplier", "sampling_rate"):
        known[name] = float(known[name])
    for name in ("vote_noise_scale", "quantum", "largest_weight"):
        known[name] = None if known.get(name) is None else float(known[name])
    release = Release(**known, evaluation=entry["kind"] == "evaluation")
    if release.is_sum != (entry["kind"] == "sum"):
        raise ValueError("is a sum without largest_weight")
    return release
