"""Nodes of small federations in this process, and the simulation that they must agree with."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch

from fl_lightning import FederatedDataModule, FederatedModule, PrivacyConfig, from_arrays
from fl_lightning.deploy.holding import Holding
from fl_lightning.deploy.node import RUNS, Node
from fl_lightning.deploy.policy import Policy
from fl_lightning.module import cross_entropy
from fl_lightning.networks.outputs import record_loss
from fl_lightning.release.agreement import Agreement, network_digest, propose, terms_of
from fl_lightning.release.federation import Federation, number_members, parse_member
from fl_lightning.rules import Rules
from fl_lightning.values.message import decode, encode

CLIENTS, EPSILON, DELTA = 3, 8.0, 1e-3
RULES = {"sampling_rate": 0.5, "local_steps": 2, "execution": "loop"}
RUN = "ab" * 32


def population(held_out: float = 0) -> FederatedDataModule:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 8, generator=generator)
    y = torch.randint(0, 3, (90,), generator=generator)
    arrays = from_arrays(x, y, x_test=x[:20], y_test=y[:20], num_classes=3)
    return FederatedDataModule(arrays, num_clients=CLIENTS, val_fraction=held_out)


def network() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))


def digest() -> str:
    return network_digest(network(), record_loss(cross_entropy))


def policy(**options) -> Policy:
    known = {"epsilon": EPSILON, "delta": DELTA, "rounds": 10, "networks": [digest()]}
    known |= {"settings": ["record+local", "client+local"]}
    return Policy(**(known | options))


def node(folder: Path, client: int = 0, held_out: float = 0, **options) -> Node:
    records = population(held_out).only(client)
    return Node(Holding(records, network(), None, policy(**options)), folder, client)


def say(to: Node, head: dict, tensors: dict | None = None) -> tuple[dict, dict]:
    return decode(to.answer(encode(head, tensors)))


def federation(nodes: list[Node]) -> Federation:
    facts = [say(one, {"do": "hello"})[0] for one in nodes]
    members = number_members([parse_member(f) for f in facts])
    return Federation(members, lambda asked: {k: nodes[k].answer(m) for k, m in asked.items()})


def trainer(rounds: int, **options) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=rounds, accelerator="cpu", logger=False, limit_val_batches=0,
        num_sanity_val_steps=0, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def module(folder: Path, rules: dict | None = None, **privacy) -> FederatedModule:
    config = PrivacyConfig(**({"epsilon": EPSILON, "delta": DELTA} | privacy))
    return FederatedModule(network(), config, run_dir=str(folder), **(RULES | (rules or {})))


def deployed(folder: Path, nodes: list[Node], *, rounds: int = 3, callbacks=(), **privacy):
    """A run of some rounds with nodes for its clients."""
    rules, held_out = privacy.pop("rules", None), privacy.pop("held_out", 0)
    made = module(folder, rules, **privacy)
    made.federation = federation(nodes)
    trainer(rounds, callbacks=list(callbacks)).fit(made, population(held_out))
    return made


def terms(rounds: int = 10, rules: dict | None = None, **privacy) -> Agreement:
    config = PrivacyConfig(**({"epsilon": EPSILON, "delta": DELTA} | privacy))
    chosen = Rules(config, **({"sampling_rate": 0.5, "local_steps": 2} | (rules or {})))
    plan = {"rounds": rounds, "span": rounds}
    return propose(chosen, run=RUN, client=0, clients=CLIENTS, network=digest(), **plan)


def join(to: Node, agreement: Agreement | None = None, **changed) -> dict:
    wanted = terms_of(agreement or terms()) | changed
    return say(to, {"do": "join", "terms": wanted, "known": 0})[0]


def model(fill: float | None = None) -> dict[str, torch.Tensor]:
    values = {n: p.detach().clone() for n, p in network().named_parameters()}
    return values if fill is None else {n: torch.full_like(v, fill) for n, v in values.items()}


def release(to: Node, round: int = 0, *, known: int = 0, params=None, run: str = RUN):
    head = {"do": "release", "run": run, "round": round, "context": "", "known": known}
    return say(to, head, model() if params is None else params)


def run_folder(folder: Path, run: str = RUN) -> Path:
    return folder / RUNS / run
