"""Which sums a node has begun: each round of a run once, in rising order, also after a crash."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fl_lightning.deploy.policy import Refused
from fl_lightning.ledger import chain

FILE = "sums.json"


class Begun:
    """The last round that a node began in each run, kept in a file.

    Two sums of one round would hold the same values for different survivors, and their difference
    is what few nodes sent. So a round that was given up is not tried again.

    Args:
        folder: of the node, which one process has open.
        runs: runs that may begin, at least 1.

    Raises:
        ValueError: the file is damaged.
    """

    def __init__(self, folder: Path, runs: int) -> None:
        self._path = folder / FILE
        self._runs = runs
        self._last: dict[str, int] = {}
        if self._path.exists():
            found = json.loads(self._path.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or not all(type(v) is int for v in found.values()):
                raise ValueError(f"{self._path} is damaged: put back the node's last copy of it")
            self._last = found

    def begin(self, run: str, round: int) -> None:
        """Write down that a round begins; it is on disk when this returns.

        Raises:
            Refused: it has begun before, a later one has, or the run is one too many.
        """
        if run not in self._last and len(self._last) >= self._runs:
            raise Refused(
                f"policy: runs={self._runs} have begun sums, as many as the holder allows"
            )
        if round <= self._last.get(run, -1):
            raise Refused(f"sum: round {round} is not after round {self._last[run]}, begun before")
        last = {**self._last, run: round}
        partial = self._path.with_name(FILE + ".partial")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            chain.write_all(descriptor, json.dumps(last).encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, self._path)
        chain.sync_directory(self._path.parent)
        self._last = last
