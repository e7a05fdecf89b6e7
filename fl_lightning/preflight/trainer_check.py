"""Refuses options of a Trainer that rounds cannot follow, or that would do something else."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy

from fl_lightning.preflight.callback_check import check_callbacks
from fl_lightning.preflight.proposed_run import ProposedRun
from fl_lightning.processes.strategy import ClientParallelStrategy


def check_trainer(proposed: ProposedRun) -> None:
    """What the Trainer is asked for.

    Raises:
        ValueError: naming the argument and its value.
    """
    trainer = proposed.trainer
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        raise ValueError(
            f"trainer.max_epochs={trainer.max_epochs}: give the number of rounds; privacy is "
            "planned for it"
        )
    planned = proposed.rules.planned_rounds or trainer.max_epochs
    if trainer.max_epochs > planned:
        raise ValueError(
            f"trainer.max_epochs={trainer.max_epochs} is more than planned_rounds={planned}"
        )
    check_processes(trainer)
    check_options(trainer)
    check_callbacks(proposed)
    if str(trainer.precision) not in ("32-true", "64-true"):
        raise ValueError(
            f"trainer.precision={trainer.precision}: clipping is only proven for 32-true, 64-true"
        )
    if torch.get_float32_matmul_precision() != "highest":
        raise ValueError(
            f"torch.set_float32_matmul_precision('{torch.get_float32_matmul_precision()}'): "
            "reduced precision breaks the bound of the clipping; set it to 'highest'"
        )


def check_processes(trainer: pl.Trainer) -> None:
    """Whether the processes of a Trainer can share cohorts.

    Raises:
        ValueError: naming the argument and its value.
    """
    strategy, size = trainer.strategy, trainer.world_size
    ours = isinstance(strategy, ClientParallelStrategy)
    if not ours and (size > 1 or not isinstance(strategy, SingleDeviceStrategy)):
        raise ValueError(
            f"trainer.strategy={type(strategy).__name__} with {size} process(es): clients are "
            "shared by ClientParallelStrategy alone, which is `--trainer.strategy ddp` on the "
            "command line and strategy=fl_lightning.ClientParallelStrategy() in Python"
        )
    if not ours:
        return
    connector = trainer._accelerator_connector
    if connector.use_distributed_sampler:
        raise ValueError(
            "trainer.use_distributed_sampler=True would deal records twice to the processes, which "
            "share clients and validation records exactly: set it to False"
        )
    if strategy._layer_sync is not None:
        raise ValueError(
            "trainer.sync_batchnorm=True: statistics of batches are shared by clients without "
            "protection; set it to False"
        )


def check_options(trainer: pl.Trainer) -> None:
    """Options of loops over records, which a run of rounds does not have.

    Raises:
        ValueError: naming the option and its value.
    """
    overfit = getattr(trainer, "overfit_batches", 0)
    batches, interval = trainer.limit_train_batches, trainer.val_check_interval
    every_round = trainer.check_val_every_n_epoch is not None
    refused = {
        "accumulate_grad_batches": (
            trainer.accumulate_grad_batches != 1,
            "must be 1: a batch is a round",
        ),
        "gradient_clip_val": (
            bool(trainer.gradient_clip_val),
            "clips nothing here: updates are clipped by privacy.clip_norm; leave it null",
        ),
        "overfit_batches": (
            bool(overfit),
            "has no meaning for rounds: leave it 0, and take fewer records from the source",
        ),
        "limit_train_batches": (
            batches < 1,
            "leaves no rounds: an epoch is one round; give the number of rounds by max_epochs",
        ),
        "val_check_interval": (
            every_round and isinstance(interval, int) and interval > 1,
            "counts batches within a round, which is one; use check_val_every_n_epoch",
        ),
    }
    for name, (wrong, why) in refused.items():
        if wrong:
            raise ValueError(f"trainer.{name}={getattr(trainer, name)} {why}")
