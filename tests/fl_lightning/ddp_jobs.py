"""Small runs in any number of processes: `torchrun ... ddp_jobs.py JOBS`.

JOBS is a JSON list of jobs, run one after another in the same processes; see `go`.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from fl_lightning import (
    ClientParallelStrategy,
    FederatedDataModule,
    FederatedModule,
    PrivacyConfig,
    from_arrays,
)
from fl_lightning.models import MLP
from fl_lightning.output.callbacks import RoundRecorder
from fl_lightning.output.checkpoint import CHECKPOINT, AtomicCheckpointIO, RoundCheckpoint


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0, momentum=0.9)


def blobs(clients: int, partition: str, records: str) -> FederatedDataModule:
    """Three classes of Gaussian records; `records` may be "lost" (all NaN)."""
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(0, 3, (123,), generator=generator)
    x = torch.randn(123, 6, generator=generator) + 2 * torch.eye(3, 6)[y]
    if records == "lost":
        x = torch.full_like(x, torch.nan)
    arrays = from_arrays(x, y, x[:31], y[:31], num_classes=3)
    return FederatedDataModule(
        arrays, clients, partition=partition, alpha=2.0, val_fraction=0.2, eval_batch_size=7
    )


class Crash(pl.Callback):
    """Raise in a round after its releases are in the ledger and before its checkpoint."""

    def __init__(self, round: int) -> None:
        self.round = round

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == self.round:
            raise KeyError("crash")


def go(
    folder: str,
    privacy: dict[str, Any],
    *,
    rounds: int = 3,
    resume: bool = False,
    crash: int | None = None,
    clients: int = 5,
    partition: str = "iid",
    records: str = "",
    threads: int = 1,
    processes: int = 1,
    **options: Any,
) -> FederatedModule:
    """Train in a folder, then test; what was found goes into `found.json` there."""
    torch.set_num_threads(threads)
    torch.manual_seed(5)
    defaults = {"planned_rounds": 8, "execution": "loop", "sampling_rate": 0.5}
    module = FederatedModule(
        MLP(6, 3, hidden=[4]),
        PrivacyConfig(**({"seed": 7} | privacy)),
        server_optimizer=momentum,
        run_dir=folder,
        **(defaults | options),
    )
    trainer = pl.Trainer(
        max_epochs=rounds,
        accelerator="cpu",
        devices=processes,
        strategy=ClientParallelStrategy() if processes > 1 else "auto",
        use_distributed_sampler=processes == 1,
        logger=False,
        callbacks=[*([] if crash is None else [Crash(crash)]), RoundRecorder(), RoundCheckpoint()],
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = blobs(clients, partition, records)
    checkpoint = str(Path(folder) / CHECKPOINT) if resume else None
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    except KeyError:
        if crash is None:
            raise
        return module
    (found,) = trainer.test(module, data, verbose=False)
    if trainer.is_global_zero:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    return module


def main(jobs: str) -> None:
    """All jobs of a file; a job that fails ends the process."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    for job in json.loads(Path(jobs).read_text()):
        go(**job)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
