"""A federation on Flower on this machine: one command, TLS, node keys; and it is the simulation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fl_lightning import ledger as ledgers
from fl_lightning.output.checkpoint import CHECKPOINT
from tests.deployment.books import check_books, ledgers_of, lines_of, listening, processes_of

pytest.importorskip("flwr")
loopback = pytest.importorskip("fl_lightning.deploy.loopback")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
QUIET = {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
# 127.0.0.1, and the same as an IPv6 socket has it.
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
NODES, ROUNDS = 2, 10


def test_ten_rounds_by_one_command(tmp_path: Path) -> None:
    folder = tmp_path / "federation"
    command = [sys.executable, "-m", "fl_lightning.deploy.loopback", "--folder", str(folder)]
    command += ["--nodes", str(NODES), "--rounds", str(ROUNDS)]
    addresses: set[str] = set()
    seen: set[str] = set()
    with (tmp_path / "output.txt").open("wb") as output:
        env = os.environ | QUIET
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=env)
        while process.poll() is None:
            running = processes_of(folder)
            addresses |= listening(list(running))
            seen |= {name for name in ("superlink", "supernode", "deploy node", "serverapp")
                     if any(name in command for command in running.values())}  # fmt: skip
            time.sleep(0.5)
    text = (tmp_path / "output.txt").read_text(errors="replace")
    assert process.returncode == 0, text
    assert {"superlink", "supernode", "deploy node"} <= seen
    assert addresses
    assert addresses <= LOOPBACK
    assert processes_of(folder) == {}
    run, holders = folder / "run", [folder / f"holder{k}" for k in range(NODES)]
    check_books(run, holders, 8.0)
    copied = sorted(repr(line) for line in ledgers.read(run)[1])
    own = [repr(line) for k, holder in enumerate(holders) for line in lines_of(holder, k)]
    assert copied == sorted(own)
    assert len(copied) == NODES * ROUNDS
    for name in ("summary.json", "privacy_statement.md", "config.yaml", "nodes.json"):
        assert (run / name).stat().st_size > 0
    assert (run / "plots" / "convergence.png").stat().st_size > 0
    for holder in holders:
        (one,) = ledgers_of(holder)
        assert (one / "privacy_statement.md").stat().st_size > 0
        assert oct(holder.stat().st_mode & 0o777) == "0o700"


def test_the_federation_trains_the_model_of_the_simulation(tmp_path: Path) -> None:
    """With a public seed, which holders allow for trials: one noise, and the last bits of float32.

    Torch sums the records of one client by other code than those of a client among several.
    """
    rounds = 3
    folder, simulated = tmp_path / "federation", tmp_path / "simulated"
    node, policy = loopback.demonstration(NODES, rounds, "digits")
    policy["simulation"] = True
    arguments = f"{loopback.server_arguments(rounds, 'digits')} --privacy.seed=7"
    os.environ |= QUIET
    with loopback.running(loopback.Loopback(folder, NODES, node, policy)) as federation:
        federation.submit({"arguments": arguments, "run-dir": str(folder / "run"), "nodes": NODES})
    promise = [f"--data.num_clients={NODES}", "--privacy.epsilon=8.0", "--privacy.delta=1e-5"]
    command = [sys.executable, "-m", "fl_lightning.fit", *arguments.split(), *promise]
    done = subprocess.run(
        [*command, f"--run_dir={simulated}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | QUIET,
    )
    assert done.returncode == 0, done.stderr
    want, have = (
        torch.load(path / CHECKPOINT, weights_only=False)["state_dict"]
        for path in (simulated, folder / "run")
    )
    assert want.keys() == have.keys()
    for name, value in want.items():
        torch.testing.assert_close(value, have[name], rtol=1e-5, atol=1e-6)
    both = (simulated, folder / "run")
    facts = ("client", "round", "attempt", "binding", "event", "steps", "first_step", "tail_delta")
    shown = [[[getattr(line, n) for n in facts] for line in ledgers.read(p)[1]] for p in both]
    assert shown[0] == shown[1]
    ends = [json.loads((path / "summary.json").read_text()) for path in both]
    for name in ("epsilon_max", "releases", "rounds", "delta_max"):
        assert ends[0][name] == ends[1][name]
