"""The ledger: what was released, written down before it leaves, and what it cost.

`ledger.jsonl` holds one JSON object a line. Line 1 is the header (facts of the run), every further
line is one release. Each line carries the hash of the line before it and its own, so a change or a
removal inside the file breaks the chain; `ledger.head` holds the number of lines and the last hash,
so a removal at the end is found as well. The chain finds accidents and careless edits. It is no
signature: whoever can write both files can write another history.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_lightning.ledger import chain
from fl_lightning.ledger.chain import LedgerError
from fl_lightning.ledger.header import check_facts
from fl_lightning.ledger.open_rounds import OpenRounds
from fl_lightning.ledger.stored import (
    StoredReleases,
    check_trust,
    reading,
    reading_on,
    resolve,
)
from fl_lightning.ledger.survey import Survey, survey
from fl_lightning.values.release import Release, release_entry


class LedgerWarning(UserWarning):
    """A torn last line, left by a crash during a write, was set aside."""


_OPEN: weakref.WeakSet[Ledger] = weakref.WeakSet()


def _forget_in_child() -> None:
    # A forked worker that outlives the run would otherwise keep the lock. Closing does not unlock.
    for ledger in list(_OPEN):
        ledger.close()


os.register_at_fork(after_in_child=_forget_in_child)


class Ledger:
    """The ledger of one run, open for appending; one at a time (advisory lock on the file).

    Open one with `Ledger.create` or `Ledger.open`; it is also a context manager.

    Guarantees:
        When `append` has returned, its releases are on disk (fsync) and count after any crash.
        When it has raised `LedgerError`, none of them counts and the file is as it was.
        After a crash during `append`, those of its releases that reached the file completely count,
        though they may never have left the client: epsilon can only be too high.
    """

    def __init__(
        self,
        path: Path,
        descriptor: int | None,
        header: Mapping[str, Any],
        lines: OpenRounds,
        head_hash: str,
        size: int = 0,
    ) -> None:
        self.path = path
        self._descriptor = descriptor
        self._header: dict[str, Any] = dict(header)
        self._lines = lines
        self._hash = head_hash
        self._size = size
        self._broken = ""
        _OPEN.add(self)

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: Mapping[str, Any]) -> Ledger:
        """Start a ledger in a run's directory (or at a file named `*.jsonl`).

        Args:
            path: directory or file; the directory is made where missing.
            header: facts of the run, JSON-like; `REQUIRED_FACTS` at least. `delta` and `epsilon`
                (the target) are one number, or one a client; infinities are allowed.

        Raises:
            ValueError: a required fact is missing or of no known kind.
            LedgerError: there is a ledger with releases, or it is in use.
        """
        facts = check_facts(header)
        path = resolve(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = chain.open_locked(path, os.O_CREAT)
        try:
            if path.read_bytes().count(b"\n") > 1 or _stated_lines(path) > 1:
                raise LedgerError(
                    f"{path.parent} already has a ledger with releases: resume that run, or choose "
                    "another directory"
                )
            line, digest = chain.seal({"kind": "header", "facts": facts}, None)
            try:
                os.ftruncate(descriptor, 0)
                chain.write_all(descriptor, line)
                os.fsync(descriptor)
                chain.write_head(path, 1, digest)
                chain.sync_directory(path.parent)
            except OSError as error:
                raise LedgerError(f"cannot write the ledger in {path.parent}: {error}") from error
            return cls(path, descriptor, facts, OpenRounds(path), digest, len(line))
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str], known: Mapping[str, Any] | None = None) -> Ledger:
        """Open an existing ledger to go on with it; checks all of it first.

        A torn last line (a crash during a write) is moved to `ledger.jsonl.torn` with a
        `LedgerWarning`. Complete lines behind the head count.

        Args:
            path: directory or file.
            known: what a checkpoint says of the ledger: `run_id`, how many `releases` it had and
                its `ledger_head` then. None: nothing.

        Raises:
            FileNotFoundError: no ledger there.
            LedgerError: the chain is broken, lines are missing, the ledger is in use, or is not
                the one that is known.
        """
        path = resolve(path)
        if not path.exists():
            raise FileNotFoundError(f"no ledger at {path}")
        descriptor = chain.open_locked(path)
        try:
            found = survey(path, None if known is None else known["releases"])
            check_trust(path, found.reading)
            if found.header is None:
                raise LedgerError(f"{path} has no header: the run was stopped before it began")
            if known is not None:
                _check_known(path, found, known)
            rounds = OpenRounds(path, found.count, found.first)
            for release in reading_on(path, found.header, found.start):
                rounds.keep(release)
            try:
                if found.reading.torn:
                    _set_aside(path, descriptor, found.reading)
                chain.write_head(path, *found.reading.place[:2])
            except OSError as error:
                raise LedgerError(f"cannot write the ledger in {path.parent}: {error}") from error
            _, head, size = found.reading.place
            return cls(path, descriptor, found.header, rounds, head, size)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def copy_of(
        cls,
        path: str | os.PathLike[str],
        header: Mapping[str, Any],
        rounds: OpenRounds,
        head_hash: str,
    ) -> Ledger:
        """A copy, to be read, of a ledger that another process holds open. It takes no new lines.

        Args:
            path: directory or file of the ledger, which this process sees too.
            header, rounds, head_hash: of the ledger that is open there; `rounds` becomes the
                copy's own.
        """
        return cls(resolve(path), None, header, rounds, head_hash)

    def follow(self, releases: Sequence[Release], head_hash: str) -> None:
        """Take over, into a copy, releases that were appended where the ledger is open."""
        assert self._descriptor is None
        self._remember(releases, head_hash)

    def append(self, releases: Sequence[Release]) -> None:
        """Write releases down, durably, before they leave the client.

        Args:
            releases: of one round, any number; each (client, round, attempt) only once ever.

        Raises:
            ValueError: a release that is already in the ledger.
            LedgerError: nothing was written (disk full and the like); none of them counts.
        """
        self._check_usable()
        lines, digest, seen = [], self._hash, set()
        for release in releases:
            key = (release.client, release.round, release.attempt)
            known = self.find(release.client, release.round, evaluation=release.evaluation)
            if (*key, release.evaluation) in seen or any(
                r.attempt == release.attempt for r in known
            ):
                raise ValueError(f"releases: (client, round, attempt) {key} is already recorded")
            seen.add((*key, release.evaluation))
            line, digest = chain.seal(release_entry(release), digest)
            lines.append(line)
        if not lines:
            return
        data = b"".join(lines)
        assert self._descriptor is not None
        try:
            chain.write_all(self._descriptor, data)
            os.fsync(self._descriptor)
            chain.move_head(self.path, len(self) + 1 + len(lines), digest)
        except OSError as error:
            self._roll_back(error)
            raise LedgerError(
                f"cannot write the ledger in {self.path.parent}, nothing was released: {error}"
            ) from error
        except BaseException:
            self._broken = "an append was interrupted"
            raise
        self._size += len(data)
        self._remember(releases, digest)

    @property
    def releases(self) -> Sequence[Release]:
        """All releases so far, oldest first; read from the file whenever they are gone through.

        Raises:
            LedgerError: the file is not what was written; when they are gone through.
        """
        return self._lines.all()

    @property
    def rounds(self) -> OpenRounds:
        """Its releases as it keeps them, for a copy in another process."""
        return self._lines

    @property
    def header(self) -> dict[str, Any]:
        """The facts of the run, as written (infinities are the string "inf")."""
        return dict(self._header)

    @property
    def head_hash(self) -> str:
        """Hash of the last line: it stands for the whole history."""
        return self._hash

    def find(self, client: int, round: int, *, evaluation: bool = False) -> list[Release]:
        """Releases of a client in a round, by attempt: its updates, or its evaluations."""
        return self._lines.find(client, round, evaluation=evaluation)

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[Release]:
        return iter(self._lines.all())

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up the lock; the object can still be read."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a Ledger is a file of its own and cannot be pickled or copied")

    def _check_usable(self) -> None:
        if self._descriptor is None:
            raise LedgerError(f"the ledger in {self.path.parent} is closed")
        if self._broken:
            raise LedgerError(f"{self._broken} in {self.path.parent}: open the ledger again")

    def _remember(self, releases: Sequence[Release], digest: str) -> None:
        self._hash = digest
        self._lines.append(releases)

    def _roll_back(self, cause: OSError) -> None:
        assert self._descriptor is not None
        try:
            os.ftruncate(self._descriptor, self._size)
            os.fsync(self._descriptor)
            known = len(self) + 1, self._hash
            if chain.read_head(chain.head_path(self.path)) != known:
                chain.write_head(self.path, *known)
        except (OSError, LedgerError):
            self._broken = f"a failed append ({cause}) could not be taken back"


def _check_known(path: Path, found: Survey, known: Mapping[str, Any]) -> None:
    """Whether a ledger is the one that a checkpoint was saved with, or has gone on from there."""
    assert found.header is not None
    if found.header["run_id"] != known["run_id"]:
        raise LedgerError(f"{path.parent}: the ledger is of another run than the secret there")
    count = known["releases"]
    if found.count < count:
        raise LedgerError(
            f"{path.parent}: the ledger has {found.count} releases, the checkpoint knows of "
            f"{count}: lines were lost, the run cannot go on"
        )
    head = known.get("ledger_head")  # checkpoints of schema 0 do not have it
    if head is not None and found.then != head:
        raise LedgerError(
            f"{path.parent}: the ledger is not the one that the checkpoint was saved with: after "
            f"{count} releases its last hash was {head}"
        )


def _stated_lines(path: Path) -> int:
    try:
        return chain.read_head(chain.head_path(path))[0]
    except FileNotFoundError:
        return 0


def _set_aside(path: Path, descriptor: int, found: chain.Reading) -> None:
    torn = path.with_name(path.name + ".torn")
    with torn.open("ab") as file:
        file.write(found.torn + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.ftruncate(descriptor, found.size)
    os.fsync(descriptor)
    warnings.warn(
        f"{path}: the last line was torn by a crash ({len(found.torn)} bytes), moved to "
        f"{torn.name}; its release had not left the client",
        LedgerWarning,
        stacklevel=3,
    )


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Release]]:
    """Header and releases of a ledger, checked, without opening it for appending.

    All releases are in memory then; `stored` gives them one by one.

    Raises:
        FileNotFoundError: no ledger there.
        LedgerError: the chain is broken or lines are missing.
    """
    header, releases = stored(path)
    return header, list(releases)


def stored(path: str | os.PathLike[str]) -> tuple[dict[str, Any], StoredReleases]:
    """`read`, but releases are read from the file whenever they are gone through, and checked then.

    Raises:
        FileNotFoundError: no ledger there.
        LedgerError: the chain is broken or lines are missing.
    """
    path = resolve(path)
    found, header = reading(path), None
    for entry in found:
        header = header or entry
    if header is None and not found.problems:
        found.problems.append("it has no header")
    check_trust(path, found)
    assert header is not None
    return header, StoredReleases(path, found.lines - 1)
