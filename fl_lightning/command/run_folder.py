"""The folder of a run: its own from the first moment, gone again where the run was refused."""

from __future__ import annotations

import contextlib
import os
import shutil
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from fl_lightning.output.checkpoint import CHECKPOINT


class RunFolder(pl.Callback):
    """The folder of one run; as a callback it learns when the run begins.

    Guarantees:
        Until then `give_up` takes away what this run made. A folder that was there before stays.
    """

    def __init__(self) -> None:
        self._made: list[Path] = []

    def take(self, folder: Path) -> None:
        """Make the folder where it is missing; process 0 alone does.

        Raises:
            OSError: it cannot be made, or is a file.
        """
        if not is_first_process():
            return
        self._made = _make(folder)
        if not folder.is_dir():
            raise NotADirectoryError(f"run_dir={folder} is a file, not a folder")

    def take_new(self, root: Path) -> Path:
        """Make the folder root/<date>-<time>, or root/<date>-<time>-2 and so on.

        Guarantees:
            No other run has it, however many start in the same second.
        """
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        names = chain([stamp], (f"{stamp}-{i}" for i in count(2)))
        folder = root / next(names)
        if not is_first_process():
            return folder
        while not (made := _make(folder)):
            folder = root / next(names)
        self._made = made
        return folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._made = []

    def give_up(self) -> None:
        """Remove what was made for a run that never began."""
        if self._made:
            *above, folder = self._made
            shutil.rmtree(folder, ignore_errors=True)
            for parent in reversed(above):
                with contextlib.suppress(OSError):  # another run is in it
                    parent.rmdir()
        self._made = []


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; those that this call made, the folder itself last.

    An empty list where the folder was there before.
    """
    made: list[Path] = []
    while True:
        for missing in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
            try:
                missing.mkdir()
            except (FileExistsError, FileNotFoundError):
                break  # another run made it, or took it away, in this moment
            made.append(missing)
        if folder.exists():
            return made if made and made[-1] == folder else []


def is_first_process() -> bool:
    """Whether this is process 0 of a run, as far as its launcher says."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))


def last_checkpoint(run_dir: Path) -> Path:
    """The checkpoint that a run goes on from.

    Raises:
        ValueError: if there is none; Lightning alone would silently start again at round 0.
    """
    path = run_dir / CHECKPOINT
    if not path.exists():
        raise ValueError(
            f"ckpt_path='last': {run_dir} has no checkpoint to go on from. A run that released "
            "nothing yet is started again in the same folder without --ckpt_path"
        )
    return path


def run_of_checkpoint(path: Path) -> Path | None:
    """The folder of the run that a checkpoint was saved in; None where it lies elsewhere."""
    run = path.absolute().parent.parent
    return path.parent.parent if path.absolute() == run / CHECKPOINT else None


def holds_rounds(run_dir: Path) -> bool:
    """Whether a run in the folder has finished a round."""
    table = run_dir / "rounds.csv"
    if not table.is_file():
        return False
    with table.open(encoding="utf-8") as file:
        return sum(1 for _ in file) > 1
