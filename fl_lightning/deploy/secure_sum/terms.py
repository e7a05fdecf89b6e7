"""What all nodes of a secure sum agree on before it begins, and what a holder insists on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from fl_lightning.deploy.policy import Refused
from fl_lightning.deploy.secure_sum.grid import Block, Grid
from fl_lightning.deploy.secure_sum.keys import digest
from fl_lightning.deploy.secure_sum.masks import MOST_NUMBERS
from fl_lightning.deploy.secure_sum.policy import HEX, SumPolicy


@dataclass(frozen=True)
class SumTerms:
    """Terms of one sum. Public; every signature and key of the sum is bound to all of them.

    Args:
        run: public name of the run, 64 hex digits.
        round: number of the sum in the run; a node begins each once, in rising order.
        members: identities (64 hex digits) that may take part, in the order of their numbers.
        shares: clients whose parts of the noise are the whole noise, at least 1.
        corrupt: members that may work with the server without harm, at least 0.
        context: digest of all else that the nodes must have in common (the model, the rules of
            training and clipping), 64 hex digits: a server cannot give members different ones.
        blocks: of the numbers that are added.

    Raises:
        ValueError: a value out of range, or too few members for `shares` and `corrupt`.
    """

    run: str
    round: int
    members: tuple[str, ...]
    shares: int
    corrupt: int
    context: str
    blocks: tuple[Block, ...] = field(repr=False)

    def __post_init__(self) -> None:
        for name in (self.run, self.context, *self.members):
            if not (isinstance(name, str) and len(name) == 64 and set(name) <= HEX):
                raise ValueError("terms: run, context and members must be 64 hex digits")
        for name, least in (("round", 0), ("shares", 1), ("corrupt", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 2**31:
                raise ValueError(f"terms: {name}={value} must be a whole number from {least}")
        if len(set(self.members)) < len(self.members):
            raise ValueError("terms: a member is named twice")
        if self.threshold > len(self.members):
            raise ValueError(
                f"terms: {len(self.members)} members are fewer than {self.threshold}, which "
                f"shares={self.shares} and corrupt={self.corrupt} need"
            )
        if not 1 <= self.grid.size <= MOST_NUMBERS:
            raise ValueError(f"terms: {self.grid.size} numbers cannot be added")

    @property
    def threshold(self) -> int:
        """Members that must be there at every stage.

        So many that `shares` of them are honest, and that two sets of so many have an honest
        member in common: honest members never reveal for two different sets of survivors.
        """
        return max(self.shares + self.corrupt, (len(self.members) + self.corrupt) // 2 + 1, 2)

    @cached_property
    def grid(self) -> Grid:
        """Steps and bounds of the numbers that are added."""
        return Grid(self.blocks, len(self.members), self.shares)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that stand for all terms."""
        text = json.dumps(asdict(self), sort_keys=True, allow_nan=False)
        return digest(b"terms", text.encode())


def head_of(terms: SumTerms) -> dict[str, Any]:
    """The terms as a message holds them."""
    return asdict(terms)


def parse_terms(found: Any) -> SumTerms:
    """The terms of a message.

    Raises:
        ValueError: something is missing, of another type or out of range.
    """
    names = set(SumTerms.__dataclass_fields__)
    if not isinstance(found, Mapping) or set(found) != names:
        raise ValueError(f"terms must have {', '.join(sorted(names))}")
    members, blocks = found["members"], found["blocks"]
    if not isinstance(members, list | tuple) or not isinstance(blocks, list | tuple):
        raise ValueError("terms: members and blocks must be lists")
    try:
        parsed = tuple(Block(**block) for block in blocks)
        good = all(type(b.size) is int and _number(b.reach) and _number(b.scale) for b in parsed)
    except TypeError as error:
        raise ValueError(f"terms: blocks cannot be read: {error}") from error
    if not good:
        raise ValueError("terms: blocks must have a whole number and two numbers")
    return SumTerms(**{**found, "members": tuple(members), "blocks": parsed})


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def check_terms(terms: SumTerms, policy: SumPolicy, name: str) -> int:
    """The node's number in a sum whose terms its holder allows.

    Args:
        terms: as proposed.
        policy: of the holder.
        name: of the node's identity.

    Raises:
        Refused: naming the term.
    """
    strangers = set(terms.members) - set(policy.identities)
    if strangers:
        raise Refused(f"policy: {len(strangers)} members are not listed by the holder")
    if name not in terms.members:
        raise Refused("terms: this node is not a member")
    if terms.corrupt < policy.corrupt:
        raise Refused(f"policy: corrupt={terms.corrupt}, the holder allows for {policy.corrupt}")
    if terms.threshold < policy.least:
        raise Refused(f"policy: {terms.threshold} clients are enough, the holder asks for more")
    return terms.members.index(name)
