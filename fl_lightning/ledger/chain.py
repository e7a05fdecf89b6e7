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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fl_lightning.ledger.quick_lines import QuickLines

_NO_HASH = "0" * 64
_HEAD_LENGTH = 128
_HASH = slice(-67, -3)  # where a line has its own
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


class Place(NamedTuple):
    """A place in a file: lines and bytes before it, and the hash of the last of these lines."""

    lines: int
    hash: str
    size: int


class Reading:
    """One pass over a chained file: goes once through what `parse` makes of its lines, in order.

    Lines are read one by one, so memory does not grow with the file. The pass ends at the first
    broken line. What else it found is complete when it has ended.

    Args:
        path: of the file.
        parse: (index, entry) → an object; raises where an entry is none.
        quick: reads lines of a form that it knows, without `parse`; None: there are none.
        start: where to begin, as a reading of the same file that is under way tells; None: at the
            first line.

    Attributes:
        problems: why the chain cannot be trusted; [] if it can.
        lines: lines that are in order.
        hash: of the last of them, "" before the first.
        size: their bytes.
        torn: what follows the last line end.
    """

    def __init__(
        self,
        path: Path,
        parse: Callable[[int, dict[str, Any]], Any],
        quick: QuickLines | None = None,
        start: Place | None = None,
    ) -> None:
        self.path = path
        self.problems: list[str] = []
        self.lines, self.hash, self.size = start or Place(0, "", 0)
        self.torn = b""
        self._before: tuple[int, str, int] = self.place
        self._parse, self._quick = parse, quick

    @property
    def place(self) -> Place:
        """Behind the last line that it has given."""
        return Place(self.lines, self.hash, self.size)

    @property
    def before(self) -> Place:
        """Before the last line that it has given."""
        return Place(*self._before)

    def __iter__(self) -> Iterator[Any]:
        # Before the lines: whoever appends meanwhile writes lines first and then the head.
        stated, digest = self._head()
        there = ""
        with self.path.open("rb") as file:
            file.seek(self.size)
            for line in file:
                if line[-1:] != b"\n":
                    self.torn = line
                    break
                self._before = self.lines, self.hash, self.size
                try:
                    known = None if self._quick is None else self._quick(line, self.hash)
                    found, self.hash = known or self._read(line)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    reason = (
                        str(error) if type(error) is ValueError else f"is unreadable ({error!r})"
                    )
                    self.problems.append(f"line {self.lines + 1} {reason}")
                    return
                self.lines += 1
                self.size += len(line)
                if self.lines == stated:
                    there = self.hash
                yield found
        self._compare(stated, digest, there)

    def _read(self, line: bytes) -> tuple[Any, str]:
        entry = json.loads(line)
        body = {k: v for k, v in entry.items() if k not in ("prev", "hash")}
        own, digest = seal(body, entry["prev"])
        if own != line:
            raise ValueError("was changed: its hash does not match its content")
        if entry["prev"] != (self.hash or _NO_HASH):
            raise ValueError("does not follow the line before it: lines were removed or reordered")
        found = self._parse(self.lines, body)
        if self._quick is not None:
            self._quick.learn(line, found)
        return found, digest

    def _head(self) -> tuple[int | None, str]:
        """Lines and last hash by the head; None where it says nothing, or why in its place."""
        try:
            return read_head(head_path(self.path))
        except FileNotFoundError:
            return None, ""
        except LedgerError as error:
            return None, str(error)

    def _compare(self, stated: int | None, digest: str, there: str) -> None:
        """Compare the lines with the head; `there` is the hash of the line that it names."""
        name = head_path(self.path).name
        if stated is None:
            if digest or self.lines > 1:
                missing = f"{name} is missing: lines may have been removed"
                self.problems.append(digest or missing)
        elif stated > self.lines:
            self.problems.append(
                f"line {self.lines + 1} is missing: {name} counts {stated} lines, the file has "
                f"{self.lines}"
            )
        elif there != digest or stated < 1:
            self.problems.append(f"line {stated} is not the one in {name}")


def hashes(path: Path) -> Iterator[str]:
    """The hash of every line of a file whose chain is unbroken, in order."""
    with path.open("rb") as file:
        for line in file:
            if line[-1:] == b"\n":
                yield line[_HASH].decode()


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
        text = b""
        # It may be written over meanwhile.
        while (now := head.read_bytes()) != text:
            text = now
        content = json.loads(text)
        return int(content["entries"]), str(content["hash"])
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{head.name} is unreadable ({error!r})") from error


def write_head(path: Path, lines: int, digest: str) -> None:
    """Replace the head; a crash leaves the old one or the new one."""
    head = head_path(path)
    draft = head.with_name(head.name + ".new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(descriptor, _head_text(lines, digest))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(draft, head)


def move_head(path: Path, lines: int, digest: str) -> None:
    """Write the next head over the last one, which `write_head` wrote.

    It has the same length and lies within one sector of a disk, so a crash leaves the old one or
    the new one. It is not awaited on disk: an older head is behind its file, which is no problem.
    """
    head, text = head_path(path), _head_text(lines, digest)
    if not head.exists() or head.stat().st_size != len(text):
        write_head(path, lines, digest)
        return
    descriptor = os.open(head, os.O_WRONLY)
    try:
        os.pwrite(descriptor, text, 0)
    finally:
        os.close(descriptor)


def _head_text(lines: int, digest: str) -> bytes:
    return canonical({"entries": lines, "hash": digest}).ljust(_HEAD_LENGTH - 1) + b"\n"


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
