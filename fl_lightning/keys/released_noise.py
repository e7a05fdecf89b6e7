"""Finds the noise keys of released rounds again, by digests in a private file of the run.

A later round takes back a part of earlier noise, so the keys of earlier rounds must be found after
a resumption. They follow from the run's secret and from a digest of everything that the noise hid.
These digests lie in a file beside the secret, with the public name that the ledger knows a round
by. A digest is no key, but who has it can test guesses of records: it is as private as they are.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from aadp_kernels import NoiseKey
from fl_lightning.keys import digests
from fl_lightning.keys.run_key import public_name

FILE = "secret.rounds"


def _here(work: Callable[[], None]) -> None:
    work()


class ReleasedNoise:
    """Keys of the noise of single rounds, each bound to all that its noise hides.

    Args:
        key: of the run.
        folder: of the run.
        once: does a piece of work in one of the processes that share the run, and raises in all of
            them what it raised.

    Raises:
        ValueError: others can read the file.
    """

    def __init__(
        self, key: NoiseKey, folder: Path, *, once: Callable[[Callable[[], None]], None] = _here
    ) -> None:
        self._key = key
        self._path = folder / FILE
        self._once = once
        self._known = _read(self._path)

    def keep(self, round_key: NoiseKey, values: Iterable[digests.Part]) -> NoiseKey:
        """Give the key of the noise of a round, after its digest was written to the file.

        Args:
            round_key: of the round, as `binding.round_key` derives it.
            values: all that the noise hides and is scaled by. Ignored under a public seed.

        Raises:
            OSError: the file cannot be written; nothing was drawn, in no process.
        """
        of_round = public_name(round_key)
        hidden = [of_round] if round_key.simulated else [of_round, *values]
        digest = digests.bulk_digest(hidden)
        key = self._key_of(digest)
        name = public_name(key)
        if name not in self._known:
            self._once(lambda: _append(self._path, f"{name} {digest}"))
            self._known[name] = digest
        return key

    def _key_of(self, digest: str) -> NoiseKey:
        return self._key.derive("released noise", digest)

    def find(self, name: str) -> NoiseKey:
        """The key of the noise of a round that was released, by the name in its ledger line.

        Raises:
            ValueError: the file does not know it.
        """
        digest = self._known.get(name)
        if digest is None:
            raise ValueError(
                f"{self._path} does not know the noise of a round that the ledger calls "
                f"{name[:16]}…: later rounds cannot draw it again; put the file back, or start a "
                "new run"
            )
        key = self._key_of(digest)
        if public_name(key) != name:
            raise ValueError(f"{self._path} was changed: line {name[:16]}… has another digest")
        return key


def _read(path: Path) -> dict[str, str]:
    """Digest of each round by its name; later lines win, and torn ones are none."""
    if not path.exists():
        return {}
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ValueError(f"{path} has mode {mode:o}: others can read it; chmod 600 it")
    parts = [
        line.split(" ") for line in path.read_text(encoding="utf-8", errors="replace").split("\n")
    ]
    return {p[0]: p[1] for p in parts if len(p) == 2 and len(p[1]) == 64}


def _append(path: Path, line: str) -> None:
    """Durable before it returns. A line that a crash tore stays one of its own."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        data = f"\n{line}\n".encode()
        while data:
            data = data[os.write(handle, data) :]
        os.fsync(handle)
    finally:
        os.close(handle)
