"""Runs that tests stop, in forks of one process, and what every stop promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fl_lightning import ledger as ledgers
from fl_lightning.output.checkpoint import CHECKPOINT
from tests.fl_lightning.killing import COMMAND as SMALL_RUN
from tests.fl_lightning.killing import SECRET, assert_same_end, complete_lines

BOUND = 10.0  # seconds from the signal until the last process has ended
COMMAND = [*SMALL_RUN, "--data.val_fraction", "0.2"]
GO_ON = "go on by the same command with --run_dir run --ckpt_path last"


class Nursery:
    """Runs in forks of one process that has imported everything; see nursery.py."""

    def __init__(self) -> None:
        env = os.environ | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("nursery.py"))],
            env=env | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, cwd: Path, *args: str, processes: int = 1, **order: Any) -> dict[str, Any]:
        run = cwd / order.pop("folder", "run")
        run.mkdir(parents=True, exist_ok=True)
        if not (run / "secret.key").exists():
            (run / "secret.key").write_bytes(SECRET)
            (run / "secret.key").chmod(0o600)
        order |= {"cwd": str(cwd), "processes": processes}
        order.setdefault("args", [*COMMAND, *args])
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        outputs = [(cwd / f"output.{rank}").read_text() for rank in range(processes)]
        return answer | {"said": "".join(outputs)}


def stop(nursery: Nursery, cwd: Path, *args: str, **order: Any) -> dict[str, Any]:
    """Stop a run; what is promised of every stop."""
    answer = nursery(cwd, *args, **order)
    said = answer["said"]
    print({k: order.get(k) for k in ("processes", "place", "signal", "to", "deaf")}, answer)
    assert answer["seconds"] < BOUND, said
    assert "Traceback" not in said, said
    assert "Error" not in said, said
    assert "Warning" not in said, said
    if (cwd / "run" / "ledger.jsonl").exists():
        assert ledgers.verify(cwd / "run") == []
    return answer


def go_on(nursery: Nursery, cwd: Path, undisturbed: Path, processes: int) -> None:
    """As the line says; the end is that of a run that nobody stopped."""
    before = complete_lines(cwd)
    again = ["--ckpt_path", "last"] if (cwd / "run" / CHECKPOINT).exists() else []
    answer = nursery(cwd, *again, processes=processes)
    assert answer["statuses"] == [0] * processes, answer["said"]
    if len(before) > 1:
        assert complete_lines(cwd)[: len(before)] == before
    assert_same_end(cwd, undisturbed)
