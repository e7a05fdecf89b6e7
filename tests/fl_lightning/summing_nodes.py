"""Runs of client+secure_sum with nodes behind sockets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fl_lightning.deploy.holding import Holding
from fl_lightning.deploy.node import Node
from fl_lightning.deploy.secure_sum.federated import with_secure_sums
from fl_lightning.deploy.secure_sum.keys import Identity
from fl_lightning.deploy.secure_sum.node import IDENTITY_FILE
from fl_lightning.deploy.secure_sum.policy import SumPolicy
from fl_lightning.ledger import read
from fl_lightning.release.federation import Federation
from fl_lightning.values.message import decode, encode
from tests.fl_lightning.nodes import (
    CLIENTS,
    DELTA,
    federation,
    module,
    network,
    policy,
    population,
    trainer,
)

SUM = {"setting": "client+secure_sum", "min_survivors": 2, "delta": DELTA, "epsilon": 50.0}
Ask = Callable[[Mapping[int, bytes]], Mapping[int, bytes]]


def summing_nodes(folder: Path, *, corrupt: int = 0, **options: Any) -> list[Node]:
    folders = [folder / f"node{k}" for k in range(CLIENTS)]
    for one in folders:
        one.mkdir(mode=0o700)
    names = [Identity.kept_in(one / IDENTITY_FILE).name for one in folders]
    known = {"settings": ["client+secure_sum"], "epsilon": 50.0, "simulation": True}
    known |= {"rounds": 20} | options
    allowed = policy(secure_sum=SumPolicy(names, corrupt=corrupt), **known)
    return [
        Node(Holding(population().only(k), network(), None, allowed), one, k)
        for k, one in enumerate(folders)
    ]


def run_of(folder: Path, nodes: list[Node] | None, through: Ask | None = None, **options: Any):
    """A run with nodes, or the simulated one."""
    rounds, lr = options.pop("rounds", 3), options.pop("client_lr", 0.1)
    made = module(folder, {"local_steps": 2, "client_lr": lr}, **(SUM | options))
    if nodes is not None:
        plain = federation(nodes)
        made.federation = with_secure_sums(Federation(plain.members, through or plain.ask), 0)
    trainer(rounds).fit(made, population())
    return made


def ledgers(folder: Path) -> list[Path]:
    return [next((folder / f"node{k}" / "runs").iterdir()) for k in range(CLIENTS)]


# --- what a node refuses of a server ---


def asked(tmp_path: Path, change: Callable[[dict, dict], None], **options: Any) -> list[str]:
    """Why nodes refuse the first terms of a run, changed by the server."""
    nodes = summing_nodes(tmp_path, **options)
    reasons: list[str] = []

    def through(requests: Mapping[int, bytes]) -> dict[int, bytes]:
        answers = {}
        for k, data in requests.items():
            head, tensors = decode(data)
            if head["do"] == "sum-terms":
                change(head, tensors)
            answers[k] = nodes[k].answer(encode(head, tensors))
            reasons.append(decode(answers[k])[0].get("refused", ""))
        return answers

    run_of(tmp_path / "server", nodes, through, rounds=1)
    assert all(len(read(ledger)[1]) == 0 for ledger in ledgers(tmp_path))
    for one in nodes:
        one.close()
    return [reason for reason in reasons if reason]
