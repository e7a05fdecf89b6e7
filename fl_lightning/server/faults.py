"""Clients that fail or come late, simulated from a public seed, never from data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_DROPOUT, _SPEED, _DELAY = 1, 2, 3


@dataclass(frozen=True)
class Faults:
    """How often clients fail, and how late is too late.

    A client's virtual time of a round is exp(s + d) medians: s is its own slowness and d the luck
    of the round, both normal with standard deviation `spread`.

    Args:
        dropout: probability that a client fails in a round before it releases anything, in [0, 1).
        deadline: virtual time after which an upload is not used, in medians, above 0; None: none.
        seed: public seed.
        spread: of the logarithm of virtual times, > 0.

    Raises:
        ValueError: an argument out of range.
    """

    dropout: float = 0.0
    deadline: float | None = None
    seed: int = 0
    spread: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if self.deadline is not None and not 0 < self.deadline < float("inf"):
            raise ValueError(f"deadline={self.deadline} must be positive and finite, or null")

    def failing(self, clients: np.ndarray, round: int) -> np.ndarray:
        """Which of the clients fail in a round: bool [k]."""
        return self._per_client(_DROPOUT, round, clients, "random") < self.dropout

    def late(self, clients: np.ndarray, round: int) -> np.ndarray:
        """Which of the clients would upload after the deadline: bool [k]."""
        if self.deadline is None:
            return np.zeros(len(clients), dtype=bool)
        return self.virtual_time(clients, round) > self.deadline

    def virtual_time(self, clients: np.ndarray, round: int) -> np.ndarray:
        """Medians that each client needs for a round: float64 [k]."""
        slowness = self._per_client(_SPEED, 0, clients, "standard_normal")
        luck = self._per_client(_DELAY, round, clients, "standard_normal")
        return np.exp(self.spread * (slowness + luck))

    def _per_client(self, kind: int, round: int, clients: np.ndarray, name: str) -> np.ndarray:
        """A draw for each client that depends on (seed, kind, round, client) alone."""
        size = int(clients.max()) + 1 if len(clients) else 0
        generator = np.random.default_rng([self.seed, kind, round])
        return getattr(generator, name)(size)[clients]
