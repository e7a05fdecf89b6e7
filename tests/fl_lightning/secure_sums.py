"""Members of secure sums in one process, for the tests: who drops out where, and what is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fl_lightning.deploy.secure_sum.client import SumClient
from fl_lightning.deploy.secure_sum.grid import Block
from fl_lightning.deploy.secure_sum.keys import Identity
from fl_lightning.deploy.secure_sum.terms import SumTerms
from fl_lightning.values.message import decode

STAGES = ("sum-terms", "sum-keys", "sum-shares", "sum-survivors", "sum-signatures")
BLOCKS = (Block(9, 1.0, 2.0), Block(2, 0.5, 1.0))
IDENTITIES = [Identity.new() for _ in range(12)]


def terms_of(members: int, *, shares: int = 1, corrupt: int = 0, **other: Any) -> SumTerms:
    names = tuple(identity.name for identity in IDENTITIES[:members])
    found = {"run": "a" * 64, "round": 0, "context": "b" * 64, "blocks": BLOCKS} | other
    return SumTerms(members=names, shares=shares, corrupt=corrupt, **found)


@dataclass
class Numbers:
    """A contribution that notes what happens to it."""

    held: Tensor
    did: list[str] = field(default_factory=list)

    def values(self) -> Tensor:
        self.did.append("values")
        return self.held

    def write(self, digest: str) -> str:
        self.did.append(f"write {digest}")
        return digest


class Members:
    """All members of a sum, each with its own numbers; some fall silent at a stage."""

    def __init__(self, terms: SumTerms, silent_at: Mapping[int, str] | None = None) -> None:
        draw = torch.Generator().manual_seed(len(terms.members))
        low, high = -(2**27), 2**27
        self.numbers = [
            Numbers(torch.randint(low, high, (terms.grid.size,), generator=draw))
            for _ in terms.members
        ]
        self.clients = [
            SumClient(IDENTITIES[k], k, terms, numbers) for k, numbers in enumerate(self.numbers)
        ]
        self.silent_at = silent_at or {}
        self.said: list[tuple[str, int, bytes]] = []

    def answer(self, number: int, head: Mapping[str, Any]) -> bytes:
        client = self.clients[number]
        if head["do"] == "sum-terms":
            return client.advertise()
        stages = (client.share, client.mask, client.confirm, client.reveal)
        return dict(zip(STAGES[1:], stages, strict=True))[head["do"]](head)

    def ask(self, requests: Mapping[int, bytes]) -> dict[int, bytes]:
        answers = {}
        for number, data in requests.items():
            head, _ = decode(data)
            silent = self.silent_at.get(number)
            if silent is not None and STAGES.index(silent) <= STAGES.index(head["do"]):
                continue
            answers[number] = self.answer(number, head)
            self.said.append((head["do"], number, answers[number]))
        return answers

    def plain_sum(self, survivors: list[int]) -> Tensor:
        return sum((self.numbers[k].held for k in survivors), torch.zeros(11, dtype=torch.int64))


def up_to(members: Members, requests: Mapping[int, bytes], server: Any, stage: str) -> Any:
    """The requests of a stage, after honest answers to all stages before it."""
    takers = (server.keys, server.shares, server.masked, server.signatures)
    for take in takers[: STAGES.index(stage)]:
        requests = take(members.ask(requests))
    return {k: decode(data)[0] for k, data in requests.items()}
