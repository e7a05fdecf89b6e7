"""A ledger that somebody edits and seals again: its chain is unbroken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fl_lightning import _chain

Entries = list[dict[str, Any]]


def entries_of(folder: Path) -> Entries:
    lines = (folder / "ledger.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("prev", "hash")} for line in lines
    ]


def reseal(entries: Entries, folder: Path) -> Path:
    """Write a ledger of these entries; its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    digest, lines = None, []
    for entry in entries:
        line, digest = _chain.seal(entry, digest)
        lines.append(line)
    (folder / "ledger.jsonl").write_bytes(b"".join(lines))
    assert digest is not None
    _chain.write_head(folder / "ledger.jsonl", len(lines), digest)
    return folder


def edited(source: Path, folder: Path, change: Callable[[Entries], Any]) -> Path:
    """A ledger of its own after an edit: `change` works on the entries, or returns others."""
    entries = entries_of(source)
    return reseal(change(entries) or entries, folder)


def facts(**values: Any) -> Callable[[Entries], None]:
    """An edit of the header."""

    def change(entries: Entries) -> None:
        entries[0]["facts"].update(values)

    return change


def lines(where: slice | int = slice(1, None), **values: Any) -> Callable[[Entries], None]:
    """An edit of releases; a value may be a function of the old one."""

    def change(entries: Entries) -> None:
        chosen = entries[where] if isinstance(where, slice) else [entries[where]]
        for entry in chosen:
            for name, value in values.items():
                entry[name] = value(entry[name]) if callable(value) else value

    return change


def both(*changes: Callable[[Entries], Any]) -> Callable[[Entries], None]:
    """Several edits."""

    def change(entries: Entries) -> None:
        for one in changes:
            assert one(entries) is None

    return change


def without(*numbers: int) -> Callable[[Entries], Entries]:
    """Without some entries (0 is the header)."""
    return lambda entries: [e for i, e in enumerate(entries) if i not in numbers]


def tenfold(value: float) -> float:
    return 10 * value
