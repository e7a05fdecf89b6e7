"""Which checkpoint a command goes on from when whoever starts it does not know.

`--ckpt_path auto` starts a run where its folder has no checkpoint, and goes on where it has one: a
cluster may start the same command again and again. Under SLURM it is the default of a job that was
put back into the queue, and the folder is named by the job and the command.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from fl_lightning.ledger import FILE_NAME
from fl_lightning.output.checkpoint import CHECKPOINT
from fl_lightning.processes import slurm

AUTO = "auto"


def settle(
    ckpt_path: str | None, run_dir: str | None, arguments: Sequence[str]
) -> tuple[str | None, str | None]:
    """Checkpoint and run folder of a command, as far as that follows from where it runs.

    Args:
        ckpt_path: as asked for; `auto` is settled, and under SLURM null in a job that is run again.
        run_dir: as asked for.
        arguments: the command, which under SLURM names the folder together with the job.

    Raises:
        ValueError: `auto` without a folder, or a folder whose releases have no checkpoint.
    """
    if run_dir is None and slurm.in_batch():
        run_dir = str(Path("runs") / f"slurm-{slurm.job()}-{_name(arguments)}")
    again = slurm.in_batch() and slurm.restarted()
    if ckpt_path != AUTO and not (ckpt_path is None and again):
        return ckpt_path, run_dir
    if run_dir is None:
        raise ValueError("ckpt_path='auto' needs run_dir: the folder of the run to start or go on")
    folder = Path(run_dir).expanduser()
    if (folder / CHECKPOINT).exists():
        return str(folder / CHECKPOINT), run_dir
    for name in (FILE_NAME, "rounds.csv"):
        # Before its first release a run has a checkpoint; its loss must not make ε begin at 0.
        if _lines(folder / name) > 1:
            raise ValueError(
                f"run_dir={run_dir}: {name} holds rounds, but there is no checkpoint to go on "
                f"from; put {CHECKPOINT} back, or start a new run in another folder"
            )
    return None, run_dir


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _name(arguments: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:8]
