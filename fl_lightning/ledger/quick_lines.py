"""Reads lines of single releases as they are written, without a parser of JSON.

Most of a ledger is lines of one form: the release of one client. What such lines share is parsed
and checked once; of every other line its spelling is compared with the only one that `chain.seal`
gives, its hash is computed, and what is its own is read. Whatever else is left to `chain.Reading`.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from fl_lightning.values.release import Release

_WHOLE = rb"(0|[1-9][0-9]{0,17})"
_NUMBER, _NUMBERS, _TEXT = rb"[^,}\]]+", rb"\[([0-9.e,+-]+)\]", rb'"([ !#-\[\]-~]*)"'
# Names in the order of canonical JSON. A group is a value of its own, or several that lines share.
_LINE = re.compile(
    rb'\{("adjacency":"[a-z_]*"),"attempt":%(whole)b,"binding":%(text)b,"client":%(whole)b,'
    rb'"clip_norm":%(numbers)b,"digest":%(text)b,("epsilon_inflation":%(number)b),'
    rb'"first_step":%(whole)b,("guarantee":[a-z]*,"kind":"release","mechanism":"[a-z]*",'
    rb'"noise_multiplier":%(number)b,"num_layers":[0-9]+),"prev":"([0-9a-f]{64})",'
    rb'"quantum":(null|[0-9.e+-]+),"round":%(whole)b,("sampling_rate":%(number)b),"shares":%(numbers)b,'
    rb'("steps":[0-9]+,"tail_delta":%(number)b,"vote_noise_scale":%(number)b),'
    rb'"hash":"([0-9a-f]{64})"\}\n'
    % {b"whole": _WHOLE, b"number": _NUMBER, b"numbers": _NUMBERS, b"text": _TEXT}
)
_SHARED = (1, 7, 9, 13, 15)  # the groups of several values
_SEALED = slice(None, -len(b',"hash":""}\n') - 64)  # what is hashed, but for the last brace
_MOST, _MOST_NUMBERS = 1 << 14, 1 << 10


class QuickLines:
    """Reads lines of single releases; `chain.Reading` asks it before it parses a line.

    Args:
        skim: give the number of its round in place of a release: its hash, its form and what it
            shares with others are checked, its own numbers are not read.
    """

    def __init__(self, *, skim: bool = False) -> None:
        self._skim = skim
        self._shared: dict[tuple[bytes, ...], dict[str, Any]] = {}
        self._numbers: dict[bytes, tuple[float, ...]] = {}

    def __call__(self, line: bytes, before: str) -> tuple[Release | int, str] | None:
        """The release of a line, or its round, and its hash; None where a parser must say more.

        Args:
            line: of the file, with its end.
            before: hash of the line before it.
        """
        match = _LINE.fullmatch(line)
        if match is None:
            return None
        *kind, previous, round, stated = match.group(*_SHARED, 10, 12, 16)
        shared = self._shared.get(tuple(kind))
        digest = hashlib.sha256(line[_SEALED] + b"}").hexdigest()
        if shared is None or previous.decode() != before or stated.decode() != digest:
            return None
        if self._skim:
            return int(round), digest
        release = self._own(shared, match)
        return None if release is None else (release, digest)

    def _own(self, shared: dict[str, Any], match: re.Match[bytes]) -> Release | None:
        """A release of its own numbers and of what it shares; None where a parser must say more."""
        attempt, binding, client, clip_norm, digest, first_step, quantum, round, shares = (
            match.group(2, 3, 4, 5, 6, 8, 11, 12, 14)
        )
        norms = self._numbers.get(clip_norm) or self._read(clip_norm)
        parts = self._numbers.get(shares) or self._read(shares)
        layers = shared["num_layers"]
        if norms is None or parts is None or len(norms) != layers or len(parts) != layers:
            return None
        grid = (None,) if quantum == b"null" else self._numbers.get(quantum) or self._read(quantum)
        if grid is None:
            return None
        values = shared.copy()
        (values["quantum"],) = grid
        values["attempt"], values["client"], values["round"] = int(attempt), int(client), int(round)
        values["first_step"], values["clip_norm"], values["shares"] = int(first_step), norms, parts
        values["binding"], values["digest"] = binding.decode(), digest.decode()
        release = object.__new__(Release)
        object.__setattr__(release, "__dict__", values)
        return release

    def learn(self, line: bytes, release: object) -> None:
        """Keep what other lines share with one of which a parser has found that it is right."""
        match = _LINE.fullmatch(line)
        if match is not None and isinstance(release, Release):
            if len(self._shared) >= _MOST:
                self._shared.clear()
            self._shared[match.group(*_SHARED)] = dict(vars(release))

    def _read(self, text: bytes) -> tuple[float, ...] | None:
        """Finite numbers >= 0 in the only spelling that is written; None if they are others."""
        try:
            found = list(map(float, text.split(b",")))
        except ValueError:
            return None
        if repr(found)[1:-1].replace(", ", ",").encode() != text or min(found) < 0:
            return None
        if len(self._numbers) >= _MOST_NUMBERS:
            self._numbers.clear()
        self._numbers[text] = numbers = tuple(found)
        return numbers
