"""Callbacks of Lightning that a run of rounds cannot have, or a private one must not."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning import callbacks

from fl_lightning.preflight.proposed_run import ProposedRun

# They need Lightning's own steps over records, or a network that stays as the ledger knows it.
_REFUSED: dict[type[pl.Callback], str] = {
    callbacks.StochasticWeightAveraging: (
        "swaps the server's schedule for one of its own and ends with another model than the last "
        "checkpoint's; use EMAWeightAveraging or WeightAveraging"
    ),
    callbacks.ModelPruning: (
        "replaces parameters while noise is planned for those that there are; prune the network "
        "before the run, or what the run has made"
    ),
    callbacks.BaseFinetuning: (
        "freezes and thaws layers while noise is planned for those that are trained; freeze them "
        "before the run by requires_grad_(False)"
    ),
    callbacks.GradientAccumulationScheduler: "accumulates batches, and a batch is a round",
    callbacks.LearningRateFinder: "trains on the records before anything is accounted for",
    callbacks.BatchSizeFinder: "trains on the records before anything is accounted for",
    callbacks.SpikeDetection: "needs the training loss, which no client releases",
}
_PRIVATE = "sim_only/"
_KNOWN = ("pytorch_lightning", "fl_lightning", "lightning")


def check_callbacks(proposed: ProposedRun) -> None:
    """Refuse callbacks that change the network or the rounds, or choose by private figures.

    Raises:
        ValueError: naming the callback's class.
    """
    trainer = proposed.trainer
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        name = f"trainer.callbacks: {type(callback).__name__}"
        for kind, why in _REFUSED.items():
            if isinstance(callback, kind):
                raise ValueError(f"{name} {why}")
        if isinstance(callback, callbacks.LearningRateMonitor) and not trainer.loggers:
            raise ValueError(f"{name} needs a logger: trainer.logger is off")
        monitor = _monitor(callback)
        if monitor is None:
            continue
        if monitor.startswith(_PRIVATE) and proposed.rules.privacy.private:
            what = "stops" if isinstance(callback, callbacks.EarlyStopping) else "keeps a model"
            raise ValueError(
                f"{name}(monitor={monitor!r}) {what} by private figures of the held-out records, "
                "for which no noise is planned; leave it out, or use privacy.setting none"
            )
        if not _is_logged(monitor, proposed):
            raise ValueError(
                f"{name}(monitor={monitor!r}): a run logs no such figure, only "
                f"{_PRIVATE}val_loss and {_PRIVATE}val_accuracy where records are held out"
            )


def _monitor(callback: pl.Callback) -> str | None:
    """The figure that a callback decides by."""
    if isinstance(callback, callbacks.EarlyStopping | callbacks.ModelCheckpoint):
        return callback.monitor
    return None


def _is_logged(monitor: str, proposed: ProposedRun) -> bool:
    """Whether there will be such a figure, as far as can be known."""
    trainer = proposed.trainer
    kinds = [type(proposed.module), *map(type, trainer.callbacks)]  # pyright: ignore[reportAttributeAccessIssue]
    if any(kind.__module__.split(".")[0] not in _KNOWN for kind in kinds):
        return True  # what others log is not known
    figures = [f"{_PRIVATE}val_{name}" for name in ("loss", "accuracy", *(proposed.metrics or ()))]
    return monitor in figures and bool(proposed.data.val_fraction and trainer.limit_val_batches)
