"""Runs of the command line that are killed, and what must be there afterwards."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fl_lightning import ledger as ledgers
from fl_lightning.output.checkpoint import CHECKPOINT

SIGKILL = -9
SECRET = bytes(range(32))
COMMAND = [
    *("--run_dir", "run", "--data.num_clients", "4", "--data.val_fraction", "0"),
    *("--model.network", "fl_lightning.models.LogisticRegression", "--model.execution", "loop"),
    *("--model.sampling_rate", "0.5", "--privacy.epsilon", "null", "--privacy.delta", "0.001"),
    *("--privacy.noise_multiplier", "2", "--trainer.max_epochs", "6", "--trainer.logger", "false"),
    *("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"),
]
SETTINGS = {
    "record+local": [],
    "client+local": ["--privacy.thresholds", "released"],
    "client+aggregator": ["--model.clients_per_round", "2"],
    "client+secure_sum": ["--model.dropout", "0.2", "--privacy.min_survivors", "2"],
}


class Zygote:
    """Runs of the command line in forks of one process that has imported everything."""

    def __init__(self) -> None:
        env = os.environ | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            env=env | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, cwd: Path, *args: str, **place: Any) -> dict[str, Any]:
        """Run in a folder that already has the secret; `place` says where to die."""
        run = cwd / "run"
        run.mkdir(parents=True, exist_ok=True)
        if not (run / "secret.key").exists():
            (run / "secret.key").write_bytes(SECRET)
            (run / "secret.key").chmod(0o600)
        order = {"cwd": str(cwd), "args": [*COMMAND, *args], **place}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def go_on(self, cwd: Path, *args: str, **place: Any) -> dict[str, Any]:
        """Resume; where nothing was released yet, be refused and start again."""
        answer = self(cwd, *args, "--ckpt_path", "last", **place)
        if answer["status"] == 2:
            assert "no checkpoint to go on from" in (cwd / "output.txt").read_text()
            assert len(complete_lines(cwd)) <= 1, "releases without a checkpoint before them"
            answer = self(cwd, *args, **place)
        assert answer["status"] in (0, SIGKILL), (cwd / "output.txt").read_text()
        return answer


def complete_lines(cwd: Path) -> list[bytes]:
    """Lines of the ledger that were written to their end."""
    path = cwd / "run" / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith(b"\n")]


def weights(cwd: Path) -> dict[str, torch.Tensor]:
    return torch.load(cwd / "run" / CHECKPOINT, weights_only=False)["state_dict"]


def rounds(cwd: Path) -> list[dict[str, str]]:
    """The table of rounds, but for times and for ε, which is by a ledger that may be ahead."""
    with (cwd / "run" / "rounds.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in r.items() if k != "seconds" and "epsilon" not in k} for r in rows]


def assert_same_end(cwd: Path, undisturbed: Path) -> None:
    assert ledgers.verify(cwd / "run") == []
    for name in ("ledger.jsonl", "ledger.head"):
        assert (cwd / "run" / name).read_bytes() == (undisturbed / "run" / name).read_bytes()
    want = weights(undisturbed)
    for name, value in weights(cwd).items():
        assert torch.equal(value, want[name]), name
    assert rounds(cwd) == rounds(undisturbed)
