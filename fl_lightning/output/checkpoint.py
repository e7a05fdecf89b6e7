"""One checkpoint a run, overwritten after every round so that a crash never leaves half of one."""

from __future__ import annotations

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from fl_lightning.processes.launching import stop_of
from fl_lightning.processes.strategy import processes_of

CHECKPOINT = Path("checkpoints") / "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the old one, makes it durable, and only then replaces that.

    A damaged checkpoint is an error that says so: what a run released stands in its ledger, and
    starting again at round 0 would release the same records anew.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Save by rename.

        Raises:
            OSError: disk full and the like; the checkpoint before is untouched.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        except BaseException as error:
            partial.unlink(missing_ok=True)  # what the disk has no room for
            if not isinstance(error, OSError):
                raise
            raise OSError(
                error.errno, f"cannot save {target}, the one before stays: {error.strerror}"
            ) from error
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Load a checkpoint.

        Raises:
            ValueError: it is truncated or otherwise damaged.
        """
        try:
            return super().load_checkpoint(path, *args, **options)
        except (FileNotFoundError, PermissionError):
            raise
        except (RuntimeError, OSError, EOFError, UnpicklingError, KeyError) as error:
            what = repr(error).splitlines()[0][:120]
            raise ValueError(
                f"ckpt_path={path} is damaged ({what}): put back a copy of it, or start a new run "
                "in another folder; what was released stays in the ledger"
            ) from error


class RoundCheckpoint(Checkpoint):
    """Saves before round 0, so that every release has a checkpoint before it, and after rounds.

    A run that is to stop ends here, after a checkpoint.

    Args:
        every_n_rounds: rounds between checkpoints, at least 1. A crash repeats the rounds since
            the last one; repeating them exactly costs no privacy.
    """

    def __init__(self, every_n_rounds: int = 1) -> None:
        if every_n_rounds < 1:
            raise ValueError(f"every_n_rounds={every_n_rounds} must be at least 1")
        self.every_n_rounds = every_n_rounds

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The state before round 0."""
        if trainer.current_epoch == 0:
            self._save(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The state after a round."""
        rounds = trainer.current_epoch + 1
        stop = stop_of(trainer)
        due = rounds == trainer.max_epochs or trainer.should_stop
        due = due or rounds % self.every_n_rounds == 0
        # All save, or none: the others may not have heard of a stop yet.
        if due or any(processes_of(trainer).together(lambda: stop.asked is not None)):
            self._save(trainer, pl_module)
        stop.check()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Free the run folder, so that this process too may go on: Lightning tears nothing down."""
        stop_of(trainer).leave()
        pl_module.teardown("fit")

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = Path(pl_module.run_path) / CHECKPOINT  # pyright: ignore[reportArgumentType]
        trainer.save_checkpoint(path, weights_only=False)
