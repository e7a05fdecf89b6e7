"""The clients of a run that live elsewhere: who they are, and how they are asked."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fl_lightning.release.agreement import Agreement, propose, terms_of
from fl_lightning.rules import Rules
from fl_lightning.values.message import decode, encode

FILE = "nodes.json"
_LOG = logging.getLogger("pytorch_lightning")
Answer = tuple[dict[str, Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Member:
    """What a node says of itself. Public.

    Args:
        name: of the node, 64 hex digits; it stays as long as the node's folder.
        epsilon, delta: what its holder promises for one run.
        records: how many it has; None: it does not say.
        number: client number that it asks for, for comparisons with a simulation; None: any.
        held_out: how many records it keeps for private evaluations; None: it does not say.
    """

    name: str
    epsilon: float
    delta: float
    records: int | None
    number: int | None = None
    held_out: int | None = None


@dataclass(frozen=True)
class SumProposal:
    """A sum that the server wants of some nodes. Public.

    Args:
        run: public name of the run.
        round: round number.
        clients: ids of those asked.
        noise_parts: clients whose parts of the noise are the whole.
        multiplier: noise multiplier for a client of weight 1.
        asked: weight of each client over the largest, before its ε lowers it.
        blocks: (numbers, bound before noise, scale of the whole noise), see `NoisedSum.blocks`.
        context: what noise of a public seed is bound to.
        params: global model.
        history: row of the released history that clip norms and shares follow from.
    """

    run: str
    round: int
    clients: Sequence[int]
    noise_parts: int
    multiplier: float
    asked: Sequence[float]
    blocks: Sequence[tuple[int, float, float]]
    context: str
    params: Mapping[str, Tensor]
    history: Mapping[str, Tensor]


@dataclass(frozen=True)
class SumOutcome:
    """The result of a `SumProposal`.

    Args:
        sums: float64, one tensor of numbers a block; None: the sum was given up.
        survivors: ids of the clients in it.
        charged: ids of those that may have charged it, whatever came of it.
        heads: heads of their ledgers by client, as they say.
    """

    sums: Sequence[Tensor] | None
    survivors: Sequence[int]
    charged: Sequence[int]
    heads: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Federation:
    """Nodes by client number, and what carries messages to them.

    Args:
        members: client k is the node `members[k]`.
        ask: messages by client → answers of those that answered in time.
        sum: the protocol by which nodes add up what nobody may see; None: there is none.
    """

    members: Sequence[Member]
    ask: Callable[[Mapping[int, bytes]], Mapping[int, bytes]]
    sum: Callable[[SumProposal], SumOutcome] | None = None

    def end(self) -> None:
        """Tell the nodes that the run has ended, so that each writes its statement."""
        self.answers(dict.fromkeys(range(len(self.members)), encode({"do": "end"})))

    def answers(self, requests: Mapping[int, bytes]) -> dict[int, Answer]:
        """What the asked nodes say; one that answers nothing that can be read counts as silent."""
        found = {}
        for client, data in sorted(self.ask(requests).items()):
            try:
                found[client] = decode(data)
            except ValueError as error:
                _LOG.warning(f"client {client}: its answer is left out: {error}")
        return found


def parse_member(facts: Mapping[str, Any]) -> Member:
    """What a node answers to `hello`.

    Raises:
        ValueError: something is missing or cannot be.
    """
    try:
        known = {"held_out": None, **facts}  # nodes.json of older runs has none
        member = Member(**{name: known[name] for name in Member.__dataclass_fields__})
        good = (
            isinstance(member.name, str)
            and len(member.name) == 64
            and float(member.epsilon) > 0
            and 0 <= float(member.delta) < 1
            and (member.records is None or int(member.records) >= 1)
            and (member.number is None or int(member.number) >= 0)
            and (member.held_out is None or int(member.held_out) >= 0)
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"a node says too little of itself: {error}") from error
    if not good:
        raise ValueError(f"a node says of itself what cannot be: {dict(facts)}")
    return member


def number_members(members: Sequence[Member]) -> list[Member]:
    """The nodes by client number: those that they ask for if all do, else in order of their names.

    Raises:
        ValueError: two nodes have one name, or ask for one number.
    """
    if len({m.name for m in members}) < len(members):
        raise ValueError("nodes: two of them have one name: is one folder used by two nodes?")
    wanted = sorted((m.number, m) for m in members if m.number is not None)
    if len(wanted) < len(members):
        return sorted(members, key=lambda m: m.name)
    if [number for number, _ in wanted] != list(range(len(members))):
        raise ValueError(
            f"nodes: they ask for the client numbers {[n for n, _ in wanted]}, not for 0 to "
            f"{len(members) - 1}, each once"
        )
    return [member for _, member in wanted]


def write_members(folder: Path, members: Sequence[Member]) -> None:
    """Keep who is who for as long as the run lives."""
    path = folder / FILE
    partial = path.with_name(f"{FILE}.partial")
    partial.write_text(json.dumps([asdict(m) for m in members], indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_members(folder: Path) -> list[Member] | None:
    """The nodes of a run that has begun; None of another."""
    path = folder / FILE
    if not path.is_file():
        return None
    return [parse_member(facts) for facts in json.loads(path.read_text(encoding="utf-8"))]


def shared(values: Sequence[float]) -> float | list[float]:
    """One number where all are equal, as configurations have it."""
    return values[0] if len(set(values)) == 1 else list(values)


def agreements(
    rules: Rules, members: Sequence[Member], *, run: str, network: str, steps: np.ndarray, span: int
) -> list[Agreement]:
    """What is proposed to each node.

    Args:
        rules: of the run.
        members: by client number.
        run: public name of the run.
        network: `network_digest`.
        steps: noised steps that the schedule plans for each client, [K].
        span: rounds of the run.

    Returns:
        Clients of one ε and δ plan for as many rounds as the one of them with most: they have the
        multiplier of a simulation.
    """
    most: dict[tuple[float, float], int] = {}
    for member, planned in zip(members, steps.tolist(), strict=True):
        promise = member.epsilon, member.delta
        most[promise] = max(most.get(promise, 1), planned // rules.steps_a_release)
    return [
        propose(
            rules,
            run=run,
            client=client,
            clients=len(members),
            network=network,
            rounds=most[member.epsilon, member.delta],
            span=span,
        )
        for client, member in enumerate(members)
    ]


def join_request(agreement: Agreement, known: int) -> bytes:
    """Asks a node to keep to an agreement; `known`: its ledger lines that the server has."""
    return encode({"do": "join", "terms": terms_of(agreement), "known": known})
