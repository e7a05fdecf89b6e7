"""The pass over a ledger that is opened: what it is, and where its rounds under way begin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_lightning.ledger.chain import Place, Reading
from fl_lightning.ledger.stored import reading


@dataclass(frozen=True)
class Survey:
    """What a pass over a ledger found.

    Attributes:
        reading: at its end: problems, lines, last hash, what is torn.
        header: None where there is not even that.
        then: hash of the line that a checkpoint knows as its last, "" where there is none.
        first: the round before the last one, or before the last one that a checkpoint knows of.
        start: a place behind the header; no line of `first` or a later round is before it.
    """

    reading: Reading
    header: dict[str, Any] | None
    then: str
    first: int
    start: Place

    @property
    def count(self) -> int:
        """Releases."""
        return self.reading.lines - 1


def survey(path: Path, known: int | None) -> Survey:
    """Check the chain of a ledger, and the form of its lines.

    Args:
        path: of the file.
        known: how many releases a checkpoint knows of; None: all.
    """
    found = reading(path, skim=True)
    header, then = None, ""
    # The last round and the one before it, with the places of their first lines.
    before = last = (0, found.place)
    for entry in found:
        lines = found.lines
        if header is None:
            header = entry
            before = last = (0, found.place)
        elif known is None or lines - 1 <= known:
            round = entry if isinstance(entry, int) else entry.round
            if round > last[0]:
                before, last = last, (round, found.before)
        if lines - 1 == known:
            then = found.hash
    return Survey(found, header, then, *before)
