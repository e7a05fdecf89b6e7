"""The node's journal: every request that was refused, chained as the ledger is."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fl_lightning.ledger import chain

FILE = "refusals.jsonl"
# Whoever floods a node with requests must not fill its disk.
MOST_LINES = 100_000


class Journal:
    """Appends to one file; open in one process at a time.

    Args:
        folder: of the node.

    Raises:
        LedgerError: another process has it open, or its chain is broken.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / FILE
        self._descriptor: int | None = chain.open_locked(path, os.O_CREAT)
        found = chain.Reading(path, lambda index, entry: None)
        for _ in found:
            pass
        if found.problems:
            self.close()
            raise chain.LedgerError(f"{path} cannot be trusted: " + "; ".join(found.problems))
        if found.torn:
            os.ftruncate(self._descriptor, found.size)
        self._path = path
        self._lines, self._hash = found.lines, found.hash or None

    def refuse(self, what: str, run: str, reason: str) -> None:
        """Write one refusal down; past `MOST_LINES` nothing is written.

        Args:
            what: the request's kind.
            run: the run that it names, "" for none.
            reason: as the server hears it.
        """
        if self._lines >= MOST_LINES or self._descriptor is None:
            return
        entry: dict[str, Any] = {
            "kind": "refusal",
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "request": what[:40],
            "run": run[:64],
            "reason": reason[:400],
        }
        line, self._hash = chain.seal(entry, self._hash)
        chain.write_all(self._descriptor, line)
        os.fsync(self._descriptor)
        self._lines += 1
        chain.write_head(self._path, self._lines, self._hash)

    def close(self) -> None:
        """Give up the lock."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
