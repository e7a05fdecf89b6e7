"""A hash-chained file of JSON lines with a head beside it: what `ledger.py` is written in.

Every line holds the hash of the line before it ("prev") and the SHA-256 of its own canonical JSON
without that hash ("hash"). The head (`<name>.head`) holds the number of lines and the last hash.
The head is written after the lines are on disk, so it is never ahead of an honest file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NO_HASH = "0" * 64
# json.dumps would make one for every line.
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


class LedgerError(RuntimeError):
    """The ledger cannot be trusted, is in use, or could not be written."""


def canonical(entry: Mapping[str, Any]) -> bytes:
    """The one way to write an entry: sorted keys, no spaces, ASCII, no infinities."""
    return _ENCODER.encode(entry).encode()


def seal(entry: Mapping[str, Any], previous: str | None) -> tuple[bytes, str]:
    """The entry's line, chained to the previous hash (None: first line), and its own hash."""
    chained = {**entry, "prev": previous or _NO_HASH}
    text = canonical(chained)
    digest = hashlib.sha256(text).hexdigest()
    return text[:-1] + b',"hash":"%b"}\n' % digest.encode(), digest


@dataclass
class Scan:
    """What a pass over the files found; entries and hashes stop at the first broken line."""

    entries: list[Any] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    size: int = 0
    torn: bytes = b""


def scan(path: Path, parse: Callable[[int, dict[str, Any]], Any]) -> Scan:
    """Check the whole chain; `parse(index, entry)` turns entries into objects or raises."""
    found = Scan()
    data = path.read_bytes()
    found.size = data.rfind(b"\n") + 1
    found.torn = data[found.size :]
    for index, line in enumerate(data[: found.size].split(b"\n")[:-1]):
        try:
            _read_line(found, index, line, parse)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = str(error) if type(error) is ValueError else f"is unreadable ({error!r})"
            found.problems.append(f"line {index + 1} {reason}")
            return found
    _check_head(found, head_path(path))
    return found


def _read_line(
    found: Scan, index: int, line: bytes, parse: Callable[[int, dict[str, Any]], Any]
) -> None:
    entry = json.loads(line)
    previous = found.hashes[-1] if found.hashes else None
    body = {k: v for k, v in entry.items() if k not in ("prev", "hash")}
    own, digest = seal(body, entry["prev"])
    if own != line + b"\n":
        raise ValueError("was changed: its hash does not match its content")
    if entry["prev"] != (previous or _NO_HASH):
        raise ValueError("does not follow the line before it: lines were removed or reordered")
    found.entries.append(parse(index, body))
    found.hashes.append(digest)


def _check_head(found: Scan, head: Path) -> None:
    lines = len(found.hashes)
    try:
        stated, digest = read_head(head)
    except FileNotFoundError:
        if lines > 1:
            found.problems.append(f"{head.name} is missing: lines may have been removed")
        return
    except LedgerError as error:
        found.problems.append(str(error))
        return
    if stated > lines:
        found.problems.append(
            f"line {lines + 1} is missing: {head.name} counts {stated} lines, the file has {lines}"
        )
    elif stated < 1 or found.hashes[stated - 1] != digest:
        found.problems.append(f"line {stated} is not the one in {head.name}")


def head_path(path: Path) -> Path:
    """Where the head of a chained file lies."""
    return path.with_suffix(".head")


def read_head(head: Path) -> tuple[int, str]:
    """Lines and last hash by the head.

    Raises:
        FileNotFoundError: there is none.
        LedgerError: it cannot be read.
    """
    try:
        content = json.loads(head.read_bytes())
        return int(content["entries"]), str(content["hash"])
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{head.name} is unreadable ({error!r})") from error


def write_head(path: Path, lines: int, digest: str) -> None:
    """Replace the head; a crash leaves the old one or the new one."""
    head = head_path(path)
    draft = head.with_name(head.name + ".new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(descriptor, canonical({"entries": lines, "hash": digest}) + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(draft, head)


def write_all(descriptor: int, data: bytes) -> None:
    """`os.write` until all is written."""
    while data:
        data = data[os.write(descriptor, data) :]


def sync_directory(directory: Path) -> None:
    """Make new names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_locked(path: Path, flags: int = 0) -> int:
    """Open for appending with an exclusive advisory lock that lives as long as the descriptor.

    Raises:
        LedgerError: somebody else holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | flags, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise LedgerError(
            f"the ledger in {path.parent} is in use by another run; one run, one directory"
        ) from error
    return descriptor
