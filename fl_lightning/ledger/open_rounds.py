"""The releases of an open ledger: of the rounds under way in memory, all others in the file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from fl_lightning.values.release import Release


class OpenRounds:
    """Releases by round and client; memory does not grow with rounds that are appended.

    Args:
        found: releases that are there already.
        read: gives all releases again, oldest first; None: there is nothing to read them from, so
            all are kept.
    """

    def __init__(
        self, found: Sequence[Release], read: Callable[[], Sequence[Release]] | None
    ) -> None:
        self._read = read
        self._count = 0
        self._first = 0  # round from which on all are in memory
        self._rounds: dict[int, dict[tuple[int, bool], list[Release]]] = {}
        self._order: list[Release] = []  # all of them, where nothing can be read
        self._add(found)

    def append(self, releases: Sequence[Release]) -> None:
        """Take new ones; those of rounds before the last two need not be in memory any more."""
        self._add(releases)
        if self._read is None or not releases:
            return
        self._first = max(self._first, min(r.round for r in releases) - 1)
        for past in [round for round in self._rounds if round < self._first]:
            del self._rounds[past]

    def find(self, client: int, round: int, *, evaluation: bool = False) -> list[Release]:
        """Those of a client in a round, oldest first: its updates, or its evaluations."""
        if round < self._first:
            place = client, round, evaluation
            return [r for r in self.all() if (r.client, r.round, r.evaluation) == place]
        return list(self._rounds.get(round, {}).get((client, evaluation), ()))

    def all(self) -> list[Release]:
        """All of them, oldest first."""
        if self._read is None:
            return list(self._order)
        # What an interrupted append left behind was never taken.
        return list(self._read()[: self._count])

    def __len__(self) -> int:
        return self._count

    def _add(self, releases: Iterable[Release]) -> None:
        for release in releases:
            self._count += 1
            of_round = self._rounds.setdefault(release.round, {})
            of_round.setdefault((release.client, release.evaluation), []).append(release)
            if self._read is None:
                self._order.append(release)
