"""What a holder insists on in every secure sum."""

from __future__ import annotations

from dataclasses import dataclass

HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class SumPolicy:
    """What a holder insists on in every secure sum; no message widens it.

    Args:
        identities: names of the nodes that the holder knows to be different organisations: whoever
            can add names to this list can be most of a sum alone.
        corrupt: how many of them may work with the server; terms must allow for as many.
        least: fewest clients in a sum, whatever the noise needs.
        runs: runs that may begin a sum, ever, at least 1; what they may spend stands elsewhere.

    Raises:
        ValueError: a value out of range.
    """

    identities: list[str]
    corrupt: int
    least: int = 2
    runs: int = 100

    def __post_init__(self) -> None:
        for name in self.identities:
            if not (len(name) == 64 and set(name) <= HEX):
                raise ValueError(f"policy: identities has {name!r}, not 64 hex digits")
        for name, least in (("corrupt", 0), ("least", 2), ("runs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"policy: {name}={getattr(self, name)} must be at least {least}")
