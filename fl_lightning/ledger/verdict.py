"""All checks of a ledger together: what `ledger verify` says."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fl_lightning.ledger.client_reports import undercharged
from fl_lightning.ledger.file import scan
from fl_lightning.ledger.line_checks import contradictions
from fl_lightning.ledger.run_checks import RunFiles

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
    file, written = scan(path)
    if written.problems:
        return Verdict(written.problems, [])
    if not written.entries:
        return Verdict(["line 1 is missing: the file has no header"], [])
    header, releases = written.entries[0], written.entries[1:]
    try:
        problems = contradictions(header, releases) or undercharged(header, releases)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        problems = [f"line 1 (header): its facts make no sense ({error!r})"]
    notes: list[str] = []
    if head is not None:
        named, found = _named(head.lower(), written.hashes)
        (notes if named else problems).append(found)
    if not problems:
        run = RunFiles(file.parent, header, releases, written.hashes)
        run.check()
        problems, notes = run.problems, [*notes, *run.notes]
    return Verdict(problems, notes, len(releases), header.get("schema", 0), written.hashes[-1])


def _named(head: str, hashes: Sequence[str]) -> tuple[bool, str]:
    """Whether a hash names one line, and which or why not in words."""
    lines = [line for line, digest in enumerate(hashes, 1) if digest.startswith(head)]
    if not lines:
        return False, f"no line has hash {head}: this is not the ledger that it was taken from"
    if len(lines) > 1:
        return False, f"hash {head} begins {len(lines)} lines: give more of it"
    later = len(hashes) - lines[0]
    if not later:
        return True, f"head {head} is the last line, {lines[0]}"
    return True, f"head {head} is line {lines[0]}; {later} lines were written after it"
