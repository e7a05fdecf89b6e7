"""The releases in a ledger's file, one by one: memory does not grow with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from fl_lightning.accounting.sum_costs import SUM_FACTS
from fl_lightning.ledger import chain
from fl_lightning.ledger.chain import LedgerError
from fl_lightning.ledger.header import check_schema
from fl_lightning.ledger.quick_lines import QuickLines
from fl_lightning.values.release import KINDS, Release, parse_release

FILE_NAME = "ledger.jsonl"


def resolve(path: str | os.PathLike[str]) -> Path:
    """The ledger's file from itself or from the run's directory."""
    path = Path(path)
    return path if path.suffix == ".jsonl" else path / FILE_NAME


def _parser(
    header: dict[str, Any],
) -> Callable[[int, Mapping[str, Any]], dict[str, Any] | Release]:
    """Turns the entries of one file, in order, into the header and releases; raises ValueError."""

    def parse(index: int, entry: Mapping[str, Any]) -> dict[str, Any] | Release:
        kind = entry["kind"]
        if kind not in (KINDS if index else ("header",)):
            expected = "release" if index else "header"
            raise ValueError(f"is out of place: kind {kind!r} instead of {expected!r}")
        if not index:
            header.update(entry["facts"])
            check_schema(header)
            return dict(header)
        if kind == "evaluation" and header.get("evaluation") is None:
            raise ValueError("is an evaluation, of which the header says nothing")
        if kind == "sum" and any(header.get(name) is None for name in SUM_FACTS):
            raise ValueError(f"is a sum, for which the header must state {', '.join(SUM_FACTS)}")
        return parse_release(entry)

    return parse


def reading(path: Path, *, skim: bool = False) -> chain.Reading:
    """A pass over a ledger's file: it gives the header and then releases.

    Args:
        path: of the file.
        skim: give the numbers of the rounds of most releases in their place, see `QuickLines`.
    """
    return chain.Reading(path, _parser({}), QuickLines(skim=skim))


def reading_on(path: Path, header: Mapping[str, Any], start: chain.Place) -> chain.Reading:
    """A pass over the releases from a place on; header and place are those of an earlier one."""
    return chain.Reading(path, _parser(dict(header)), QuickLines(), start)


def check_trust(path: Path, found: chain.Reading) -> None:
    """Refuse a ledger in which a pass, now at its end, found problems.

    Raises:
        LedgerError: it did.
    """
    if found.problems:
        raise LedgerError(f"{path} cannot be trusted: " + "; ".join(found.problems))


class StoredReleases(Sequence[Release]):
    """Releases of a ledger's file, oldest first; read from it whenever they are gone through.

    Args:
        path: of the file.
        count: how many of them count; what an interrupted append left behind them does not.

    Raises:
        LedgerError: when they are gone through: the file is not what was written.
    """

    def __init__(self, path: Path, count: int) -> None:
        self._path = path
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Release]:
        found = reading(self._path)
        for entry in found:
            if 1 < found.lines <= self._count + 1:
                yield entry
        check_trust(self._path, found)
        if found.lines <= self._count:
            raise LedgerError(
                f"{self._path} has {found.lines - 1} releases, {self._count} were there"
            )

    def __getitem__(self, index: Any) -> Any:
        """A release, or those of a slice as a tuple."""
        if isinstance(index, slice):
            start, stop, step = index.indices(self._count)
            return tuple(islice(self, start, stop, step)) if step > 0 else tuple(self)[index]
        return next(islice(self, range(self._count)[index], None))
