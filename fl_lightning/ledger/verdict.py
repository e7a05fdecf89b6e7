"""All checks of a ledger together: what `ledger verify` says."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fl_lightning.ledger import chain
from fl_lightning.ledger.line_checks import contradictions
from fl_lightning.ledger.run_checks import RunFiles
from fl_lightning.ledger.stored import StoredReleases, reading, resolve

SHORTEST = 16


@dataclass(frozen=True)
class Verdict:
    """The result of a check of a ledger.

    Args:
        problems: each with its line or file; none in a ledger that can be trusted.
        notes: what is worth knowing and no problem.
        releases: lines below the header.
        schema: of the header.
        head: hash of the last line.
    """

    problems: list[str]
    notes: list[str]
    releases: int = 0
    schema: int = 0
    head: str = ""


def examine(path: str | os.PathLike[str], head: str | None = None) -> Verdict:
    """Check a ledger, and what the folder of its run says of it.

    Args:
        path: the file or the run's directory.
        head: hash of a line that must be there, or its first `SHORTEST` or more hex digits.

    Raises:
        FileNotFoundError: no ledger there.
        ValueError: `head` is no hash.
    """
    if head is not None and not re.fullmatch(rf"[0-9a-fA-F]{{{SHORTEST},64}}", head):
        raise ValueError(f"head={head!r} must be {SHORTEST} to 64 hex digits")
    file = resolve(path)
    found = reading(file)
    lines = iter(found)
    header = next(lines, None)
    problems = [] if header is None else _contradictions(header, lines)
    for _ in lines:
        pass  # a broken chain is what counts, also behind what a check broke off at
    if found.problems:
        return Verdict(found.problems, [])
    if header is None:
        return Verdict(["line 1 is missing: the file has no header"], [])
    notes: list[str] = []
    if head is not None:
        named, words = _named(head.lower(), chain.hashes(file))
        (notes if named else problems).append(words)
    if not problems:
        run = RunFiles(file, header, StoredReleases(file, found.lines - 1))
        run.check()
        problems, notes = run.problems, [*notes, *run.notes]
    return Verdict(problems, notes, found.lines - 1, header.get("schema", 0), found.hash)


def _contradictions(header: dict[str, Any], releases: Iterator[Any]) -> list[str]:
    try:
        return contradictions(header, releases)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        return [f"line 1 (header): its facts make no sense ({error!r})"]


def _named(head: str, hashes: Iterable[str]) -> tuple[bool, str]:
    """Whether a hash names one line, and which or why not in words."""
    lines, last = [], 0
    for last, digest in enumerate(hashes, 1):
        if digest.startswith(head):
            lines.append(last)
    if not lines:
        return False, f"no line has hash {head}: this is not the ledger that it was taken from"
    if len(lines) > 1:
        return False, f"hash {head} begins {len(lines)} lines: give more of it"
    later = last - lines[0]
    if not later:
        return True, f"head {head} is the last line, {lines[0]}"
    return True, f"head {head} is line {lines[0]}; {later} lines were written after it"
