"""What a round costs a node beyond the simulation: messages, socket, ledger, state, Flower.

    python -m bench nodes    # four minutes; in Flower's environment (make federation) its part too

One node with all digits, the same rounds in every way. A fresh process a message is what Flower
alone would do, if the client's app trained by itself.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from bench import machine, pages
from fl_lightning import FederatedDataModule, FederatedModule, PrivacyConfig
from fl_lightning.deploy.client_run import ClientRun
from fl_lightning.deploy.frames import ask
from fl_lightning.deploy.holding import Holding
from fl_lightning.deploy.node import Node
from fl_lightning.deploy.policy import Policy
from fl_lightning.ledger import Ledger
from fl_lightning.models import CNN
from fl_lightning.release.agreement import network_digest, propose, terms_of
from fl_lightning.values.message import decode, encode

RESULTS = machine.ROOT / "bench" / "results" / "nodes.json"
PAGE = machine.ROOT / "docs" / "deployment.md"
ROUNDS, FRESH = 20, 5
RUN = "ab" * 32
CASES: dict[str, dict[str, Any]] = {
    "CNN of 2,842 parameters": {},
    "CNN of 1.1 million parameters": {"channels": [64], "hidden": [1024]},
}


def module(network: dict[str, Any], folder: Path) -> FederatedModule:
    """The run of the measurement; its noise is calibrated for all rounds."""
    torch.manual_seed(0)
    return FederatedModule(
        CNN(**network),
        PrivacyConfig(epsilon=8.0, delta=1e-5),
        sampling_rate=1.0,
        planned_rounds=ROUNDS + 3,
        execution="loop",
        run_dir=str(folder),
    )


def messages(network: dict[str, Any], folder: Path) -> tuple[bytes, list[bytes]]:
    """What a server sends: its proposal, and the model of every round."""
    made = module(network, folder)
    digest = network_digest(made.network, made.loss)
    terms = propose(
        made.rules, run=RUN, client=0, clients=1, network=digest, rounds=ROUNDS + 3, span=ROUNDS + 3
    )
    params = {n: p.detach() for n, p in made.network.named_parameters()}
    rounds = [
        encode({"do": "release", "run": RUN, "round": r, "context": "", "known": r}, params)
        for r in range(ROUNDS + 3)
    ]
    return encode({"do": "join", "terms": terms_of(terms), "known": 0}), rounds


def simulated(network: dict[str, Any], folder: Path) -> list[float]:
    """Seconds of each round of a simulation of one client."""
    import pytorch_lightning as pl

    seconds: list[float] = []

    class Clock(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            seconds.append(pl_module.result.seconds)

    trainer = pl.Trainer(
        max_epochs=ROUNDS, accelerator="cpu", logger=False, limit_val_batches=0,
        num_sanity_val_steps=0, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Clock()],
    )  # fmt: skip
    trainer.fit(module(network, folder), FederatedDataModule("digits", 1, val_fraction=0.0))
    return seconds[1:]


@contextmanager
def timed(owner: type, name: str, seconds: list[float]) -> Iterator[None]:
    """Adds up what one method takes."""
    real = getattr(owner, name)

    def clocked(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - begun)

    setattr(owner, name, clocked)
    try:
        yield
    finally:
        setattr(owner, name, real)


def in_this_process(network: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A node without a socket, and what of its time goes where."""
    join, rounds = messages(network, folder / "server")
    data = FederatedDataModule("digits", 1, val_fraction=0.0)
    made = module(network, folder / "server")
    digest = network_digest(made.network, made.loss)
    policy = Policy(8.0, 1e-5, networks=[digest])
    node = Node(Holding(data.only(0), made.network, None, policy), folder / "holder")
    assert "refused" not in decode(node.answer(join))[0]
    node.answer(rounds[0])
    ledger, state, whole, size = [], [], [], 0
    with timed(Ledger, "append", ledger), timed(ClientRun, "_save", state):
        for request in rounds[1:ROUNDS]:
            begun = time.perf_counter()
            size = len(node.answer(request))
            whole.append(time.perf_counter() - begun)
    node.close()
    model = sum(p.numel() * p.element_size() for p in made.network.parameters())
    sizes = {"model": model, "question": len(rounds[0]), "answer": size}
    return {"seconds": whole, "ledger": ledger, "state": state, "bytes": sizes, "digest": digest}


def write_node(network: dict[str, Any], folder: Path, digest: str) -> Path:
    """Configuration of a node service."""
    folder.mkdir(parents=True)
    options = {
        "folder": str(folder / "holder"),
        "policy": {"epsilon": 8.0, "delta": 1e-5, "networks": [digest]},
        "data": {"source": "digits", "num_clients": 1, "val_fraction": 0.0},
        "network": {"class_path": "fl_lightning.models.CNN", "init_args": network},
    }
    (folder / "node.yaml").write_text(yaml.safe_dump(options))
    return folder / "node.yaml"


@contextmanager
def service(config: Path) -> Iterator[Path]:
    """A node service, from its start until it is stopped."""
    path = config.parent / "holder" / "node.sock"
    command = [sys.executable, "-m", "fl_lightning.deploy", "node", "--config", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not path.exists():
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
            time.sleep(0.01)
        yield path
    finally:
        process.terminate()
        process.wait()


def answered(path: Path, request: bytes) -> float:
    """Seconds of one question to a service."""
    begun = time.perf_counter()
    head, _ = decode(ask(path, request))
    seconds = time.perf_counter() - begun
    if "refused" in head:
        raise RuntimeError(head["refused"])
    return seconds


def through_sockets(network: dict[str, Any], folder: Path, digest: str) -> dict[str, list[float]]:
    """A resident service, and then a fresh one for every message."""
    join, rounds = messages(network, folder / "server")
    config = write_node(network, folder / "node", digest)
    with service(config) as path:
        answered(path, join)
        answered(path, rounds[0])
        resident = [answered(path, request) for request in rounds[1 : ROUNDS - FRESH]]
    fresh = []
    for request in rounds[ROUNDS - FRESH : ROUNDS]:
        begun = time.perf_counter()
        with service(config) as path:
            answered(path, request)
            fresh.append(time.perf_counter() - begun)
    return {"resident": resident, "fresh": fresh}


def through_flower(folder: Path) -> list[float] | None:
    """Seconds of the rounds of a federation of one node; None without Flower."""
    if importlib.util.find_spec("flwr") is None:
        return None
    from fl_lightning.deploy.loopback import Loopback, demonstration, running, server_arguments

    node, policy = demonstration(1, ROUNDS, "digits")
    with running(Loopback(folder, 1, node, policy)) as loopback:
        options = {"arguments": server_arguments(ROUNDS, "digits"), "nodes": 1}
        loopback.submit(options | {"run-dir": str(folder / "run")})
    with (folder / "run" / "rounds.csv").open() as file:
        return [float(row["seconds"]) for row in csv.DictReader(file)][1:]


def run_all() -> None:
    """Every case, into the result file; then the table."""
    found: dict[str, Any] = {}
    for case, network in CASES.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            here = in_this_process(network, folder / "here")
            digest = here.pop("digest")
            found[case] = {
                "simulated": simulated(network, folder / "simulated"),
                **here,
                **through_sockets(network, folder, digest),
            }
            if not network:
                found[case]["flower"] = through_flower(folder / "federation")
        print(case, {k: _middle(v) for k, v in found[case].items() if k != "bytes"}, flush=True)
    whole = {"machine": machine.record(torch.device("cpu")), "cases": found}
    RESULTS.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    report()


def _middle(values: list[float] | None) -> float | None:
    return None if values is None else round(1e3 * statistics.median(values), 2)


_ROWS = {
    "simulated": "a round of the simulation",
    "seconds": "node, in one process",
    "ledger": "– of which its ledger (write and fsync)",
    "state": "– of which its state and last answer (write and fsync)",
    "resident": "node service behind its socket",
    "fresh": "a fresh process for the message",
    "flower": "node service behind Flower, TLS and all",
}


def table() -> str:
    """Markdown table of the committed results."""
    cases = json.loads(RESULTS.read_text())["cases"]
    rows = [["a release of one node", *cases], ["---"] * (len(cases) + 1)]
    for key, words in _ROWS.items():
        times = [_middle(case.get(key)) for case in cases.values()]
        rows.append([words, *("-" if t is None else f"{t:.1f} ms" for t in times)])
    middles = [
        (statistics.median(c["fresh"]), statistics.median(c["resident"])) for c in cases.values()
    ]
    ratios = [fresh / resident for fresh, resident in middles]
    rows.append(["fresh process / resident service", *(f"{r:.0f}×" for r in ratios)])
    for key in ("question", "answer"):
        sizes = [(c["bytes"][key], c["bytes"]["model"]) for c in cases.values()]
        shown = [f"{size:,} ({size / model:.2f} of the model)" for size, model in sizes]
        rows.append([f"bytes of the {key}", *shown])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def report() -> None:
    """Write the table into its page."""
    pages.put(PAGE, "nodes table", table())
