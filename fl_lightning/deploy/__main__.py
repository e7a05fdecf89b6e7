"""The command of a holder of records: `python -m fl_lightning.deploy node --config node.yaml`.

`node` serves requests until it is stopped; `digest` prints the name of the network that a policy
allows.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import nn

from fl_lightning.data import FederatedDataModule
from fl_lightning.deploy.holding import Holding
from fl_lightning.deploy.node import Node
from fl_lightning.deploy.policy import Policy
from fl_lightning.deploy.service import serve
from fl_lightning.ledger import LedgerError
from fl_lightning.local.personal import take_out_personal
from fl_lightning.module import cross_entropy
from fl_lightning.networks.inputs import meet_records
from fl_lightning.networks.outputs import record_loss
from fl_lightning.output.console import say, speak_any_encoding
from fl_lightning.release.agreement import network_digest


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m fl_lightning.deploy", exit_on_error=False)
    commands = parser.add_subcommands(dest="command")
    for name, words in (
        ("node", "serve the records of this holder until stopped"),
        ("digest", "print the digest of the network, for the policy"),
    ):
        one = ArgumentParser(exit_on_error=False, description=words)
        one.add_argument("--config", action="config", help="YAML file with the options below")
        one.add_argument("--folder", type=Path, required=True, help="private folder of the node")
        one.add_argument("--socket", type=Path, default=None, help="null: node.sock in the folder")
        one.add_argument(
            "--socket_group",
            type=str | None,
            default=None,
            help="group whose members may ask at the socket, which then lies in another folder",
        )
        one.add_class_arguments(Policy, "policy")
        one.add_class_arguments(FederatedDataModule, "data")
        one.add_argument(
            "--client",
            type=int | None,
            default=None,
            help="take the part of this client of data that is divided, for trials; null: all",
        )
        one.add_subclass_arguments(nn.Module, "network", required=True)
        one.add_argument(
            "--personal_layers",
            type=list[str],
            default=[],
            help="layers that stay with the holder: no server gets them, nor sends any",
        )
        one.add_argument(
            "--seed",
            type=int,
            default=1,
            help="of the first values of these layers: the server's seed_everything",
        )
        one.add_subclass_arguments(nn.Module, "loss", required=False)
        one.add_argument("--memory_budget", type=float, default=1.0, help="GiB for activations")
        one.set_defaults({"data.num_clients": 1, "data.val_fraction": 0.0})
        commands.add_subcommand(name, one, help=words)
    return parser


def _holding(options: Any, made: Any) -> Holding:
    data = made.data.only(options.client or 0)
    meet_records(made.network, data)
    loss = getattr(made, "loss", None)
    personal = take_out_personal(made.network, options.personal_layers)
    return Holding(data, made.network, loss, made.policy, options.memory_budget, personal)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; errors of the holder's making are one line and exit code 2."""
    torch.set_float32_matmul_precision("highest")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    speak_any_encoding()
    # Of Lightning's checks: a line on GPUs, and on other products of its makers, each time.
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    parser = _parser()
    try:
        config = parser.parse_args(arguments)
        options = config[config.command]
        torch.manual_seed(options.seed)
        made = parser.instantiate(config)[config.command]
        holding = _holding(options, made)
        digest = network_digest(holding.network, record_loss(holding.loss or cross_entropy))
        if config.command == "digest":
            print(digest)
            return
        if digest not in holding.policy.networks:
            raise ValueError(
                f"policy: networks={holding.policy.networks} do not have the node's own, whose "
                f"digest is {digest}: did its source change?"
            )
        _serve(holding, options)
    except (ArgumentError, ValueError, OSError, LedgerError) as error:
        say(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _serve(holding: Holding, options: Any) -> None:
    folder = options.folder.expanduser()
    path = options.socket or folder / "node.sock"
    if options.socket_group and folder.resolve() in path.resolve().parents:
        raise ValueError(
            f"socket_group={options.socket_group} cannot reach {path}, for folder is private: "
            "give socket=, in a folder that the group can enter"
        )
    node = Node(holding, folder, options.client)
    asked: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda signum, _: asked.append(signum))
    size = sum(p.numel() * p.element_size() for p in holding.network.parameters())
    try:
        serve(
            path,
            node.answer,
            most=2 * size + (1 << 20),
            group=options.socket_group,
            answer_seconds=holding.policy.answer_seconds,
            ready=lambda: say(f"node {node.name[:16]} serves at {path}"),
            stopped=lambda: bool(asked),
        )
        say("node stopped")
    finally:
        node.close()


if __name__ == "__main__":
    main()
