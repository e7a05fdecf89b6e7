"""Whether the other files of a run's folder speak of the same ledger.

The checkpoint, the privacy statement and the summary each name a hash of the ledger, of the moment
they were written at. Where the ledger has gone on since, that is a line before the last.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fl_lightning.accounting.sum_costs import num_clients, of_clients
from fl_lightning.ledger import chain
from fl_lightning.ledger.accounts import accounts, largest_epsilon
from fl_lightning.ledger.checkpoint_facts import privacy_facts
from fl_lightning.ledger.client_reports import show_bound
from fl_lightning.values.release import Release

_HASH = re.compile(r"\b[0-9a-f]{64}\b")
_ROUNDING = 1e-6


@dataclass
class RunFiles:
    """A checked ledger, and what the files beside it say of it.

    Args:
        file: of the ledger, in the folder of its run.
        header, releases: of the ledger.
    """

    file: Path
    header: Mapping[str, Any]
    releases: Sequence[Release]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _epsilons: dict[int, float] = field(default_factory=dict)

    def check(self) -> None:
        """Fill `problems` and `notes`."""
        folder = self.file.parent
        self._checkpoint(folder / "checkpoints" / "last.ckpt")
        self._statement(folder / "privacy_statement.md")
        self._summary(folder / "summary.json")

    def _place(self, name: str, hashes: Sequence[str]) -> int | None:
        """The last line that a file names; a problem where it names lines of another ledger."""
        wanted = set(hashes)
        lines = {d: i for i, d in enumerate(chain.hashes(self.file), 1) if d in wanted}
        known = [lines[digest] for digest in hashes if digest in lines]
        if not known:
            self.problems.append(f"{name} names head {hashes[-1]}, which no line of the ledger has")
            return None
        last = len(self.releases) + 1
        if known[-1] < last:
            self.notes.append(f"{name} is of line {known[-1]} of {last}")
        return known[-1]

    def _epsilon(self, line: int) -> float:
        """Largest ε over the clients up to a line."""
        if line not in self._epsilons:
            found = accounts(self.header, islice(self.releases, line - 1))
            self._epsilons[line] = largest_epsilon(found)
        return self._epsilons[line]

    def _checkpoint(self, path: Path) -> None:
        if not path.is_file():
            return
        name, header = "checkpoints/last.ckpt", self.header
        try:
            state = privacy_facts(path)
        except (OSError, ValueError) as error:
            self.notes.append(f"{name} was not compared, it cannot be read: {error!r:.80}")
            return
        if state is None:
            return
        for fact, promised in (
            ("run_id", state["run_id"]),
            *((n, state["promise"].get(n)) for n in ("setting", "mechanism", "noise_form")),
        ):
            if header.get(fact, promised) != promised:
                self.problems.append(f"{name} is of {fact} {promised}, the ledger {header[fact]}")
        known = state["budget"]["multiplier"].numpy()
        if header.get("schema") and not _same(known, of_clients(header, "noise_multiplier")):
            self.problems.append(f"{name} has other noise multipliers than the header")
        known = state["budget"].get("coefficients")
        if known != header.get("coefficients"):
            self.problems.append(f"{name} has other coefficients of shared noise than the header")
        for fact in ("epsilon", "delta"):
            value = state["promise"].get(fact)
            promised = np.ravel(math.inf if value is None else value).astype(np.float64)
            if not _same(np.resize(promised, num_clients(header)), of_clients(header, fact)):
                self.problems.append(f"{name} has another {fact} than the header")
        if state["releases"] > len(self.releases):
            self.problems.append(
                f"{name} knows of {state['releases']} releases, the ledger has "
                f"{len(self.releases)}: lines are missing"
            )
        elif state.get("ledger_head"):
            place = self._place(name, [state["ledger_head"]])
            if place is not None and place != state["releases"] + 1:
                count = state["releases"]
                self.problems.append(f"{name} knows of {count} releases at line {place}")

    def _statement(self, path: Path) -> None:
        if not path.is_file():
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        hashes = _HASH.findall(text)
        if not hashes:
            self.notes.append(f"{path.name} names no head of a ledger")
            return
        line = self._place(path.name, hashes)
        if line is not None:
            wanted = f"epsilon {show_bound(self._epsilon(line))} at delta "
            if line > 1 and wanted not in text:
                self.problems.append(f"{path.name} does not say '{wanted.strip()} …'")

    def _summary(self, path: Path) -> None:
        if not path.is_file():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            head, stated = found.get("ledger_head"), found.get("epsilon_max")
            stated = None if stated is None else float(stated)
        except (ValueError, AttributeError, TypeError):
            self.problems.append(f"{path.name} is unreadable")
            return
        if head is None:
            self.notes.append(f"{path.name} names no head of a ledger")
            return
        line = self._place(path.name, [str(head)])
        if line is not None and line > 1:
            spent = self._epsilon(line)
            if stated is None or not _close(stated, spent):
                self.problems.append(f"{path.name}: epsilon_max is {stated}, by the ledger {spent}")


def _close(a: float, b: float) -> bool:
    return a == b or math.isclose(a, b, rel_tol=_ROUNDING)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool((a == b).all())
