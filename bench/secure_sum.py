"""Bytes and seconds of one secure sum: `python -m bench.secure_sum [--clients 10 100]`.

All members run in this process, one after another, and a tenth of them fall silent before they send
their masked numbers. Times are of one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fl_lightning.deploy.secure_sum.client import SumClient
from fl_lightning.deploy.secure_sum.grid import Block
from fl_lightning.deploy.secure_sum.keys import Identity
from fl_lightning.deploy.secure_sum.server import SumServer
from fl_lightning.deploy.secure_sum.terms import SumTerms
from fl_lightning.values.message import decode

_STAGES = ("sum-terms", "sum-keys", "sum-shares", "sum-survivors", "sum-signatures")
HEAD = "| clients | gone | numbers | up, MB a node | down, MB a node | node, s | server, s |"


class Numbers:
    """A contribution of given numbers, without a ledger."""

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def values(self) -> Tensor:
        return self.held

    def write(self, digest: str) -> str:
        return digest


@dataclass
class Costs:
    """Of each member that stayed: bytes sent and received, and seconds."""

    up: dict[int, int] = field(default_factory=dict)
    down: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)


def measure(clients: int, numbers: int) -> str:
    """One row of the table.

    Args:
        clients: members.
        numbers: that each adds.

    Raises:
        RuntimeError: the sum is wrong.
    """
    identities = [Identity.new() for _ in range(clients)]
    names = tuple(identity.name for identity in identities)
    gone = clients // 10
    blocks = (Block(numbers, 1.0, 1.0),)
    terms = SumTerms("a" * 64, 0, names, clients // 2, 0, "b" * 64, blocks)
    held = torch.arange(numbers) % 1000 - 500
    members = [SumClient(one, k, terms, Numbers(held)) for k, one in enumerate(identities)]
    costs = Costs()

    def ask(requests: Mapping[int, bytes]) -> dict[int, bytes]:
        answers = {}
        for k, data in requests.items():
            begun = time.perf_counter()
            head, _ = decode(data)
            if k < gone and head["do"] == "sum-shares":
                continue
            one = members[k]
            answer = (one.advertise, one.share, one.mask, one.confirm, one.reveal)
            place = _STAGES.index(head["do"])
            answers[k] = answer[place](*(() if place == 0 else (head,)))
            costs.seconds[k] = costs.seconds.get(k, 0.0) + time.perf_counter() - begun
            costs.down[k] = costs.down.get(k, 0) + len(data)
            costs.up[k] = costs.up.get(k, 0) + len(answers[k])
        return answers

    server, begun = SumServer(terms), time.perf_counter()
    total = server.run(ask)
    whole = time.perf_counter() - begun
    if not torch.equal(total, held * (clients - gone)):
        raise RuntimeError("the sum is wrong")
    stayed = range(gone, clients)
    up, down, seconds = (
        statistics.median(found[k] for k in stayed)
        for found in (costs.up, costs.down, costs.seconds)
    )
    own = whole - sum(costs.seconds.values())
    return (
        f"| {clients} | {gone} | {numbers:,} | {up / 1e6:.3g} | {down / 1e6:.3g} "
        f"| {seconds:.3g} | {own:.3g} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.secure_sum", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--numbers", type=int, nargs="+", default=[100_000, 1_000_000])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(HEAD)
    print("|" + "---:|" * 7)
    for clients in options.clients:
        for numbers in options.numbers:
            print(measure(clients, numbers), flush=True)


if __name__ == "__main__":
    main()
