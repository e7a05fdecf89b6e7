"""The releases of an open ledger: of the rounds under way in memory, all others in the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fl_lightning.ledger.stored import StoredReleases
from fl_lightning.values.release import Release


class OpenRounds:
    """Releases by round and client; memory does not grow with rounds that are past.

    Args:
        path: of the file that they stand in.
        count: how many there are already.
        first: round from which on all are in memory, once they are kept.
    """

    def __init__(self, path: Path, count: int = 0, first: int = 0) -> None:
        self._path = path
        self._count = count
        self._first = first
        self._rounds: dict[int, dict[tuple[int, bool], list[Release]]] = {}

    def keep(self, release: Release) -> None:
        """Keep one that is there already, if it is of a round that is under way."""
        if release.round >= self._first:
            of_round = self._rounds.setdefault(release.round, {})
            of_round.setdefault((release.client, release.evaluation), []).append(release)

    def append(self, releases: Sequence[Release]) -> None:
        """Take new ones; those of rounds before the last two need not be in memory any more."""
        for release in releases:
            self.keep(release)
        self._count += len(releases)
        if releases:
            self._forget(min(r.round for r in releases) - 1)

    def find(self, client: int, round: int, *, evaluation: bool = False) -> list[Release]:
        """Those of a client in a round, oldest first: its updates, or its evaluations."""
        if round < self._first:
            place = client, round, evaluation
            return [r for r in self.all() if (r.client, r.round, r.evaluation) == place]
        return list(self._rounds.get(round, {}).get((client, evaluation), ()))

    def all(self) -> Sequence[Release]:
        """All of them so far, oldest first."""
        return StoredReleases(self._path, self._count)

    def __len__(self) -> int:
        return self._count

    def _forget(self, first: int) -> None:
        """Forget rounds before `first`, which the file has."""
        self._first = max(self._first, first)
        for past in [round for round in self._rounds if round < self._first]:
            del self._rounds[past]
