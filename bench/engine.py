"""One engine in a process: `python -m bench.engine NAME PROBLEM`, see `bench.turns`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch import Tensor, nn

from bench import federation
from bench.turns import Turnstile


def plain_loop(problem: dict[str, Any]) -> None:
    """The floor: nothing but PyTorch."""
    local = federation.Local(problem)
    weights, turn = federation.start(problem), Turnstile(torch.__version__)
    for round in range(len(problem["schedule"])):
        turn(lambda weights=weights: weights)
        weights = local.round(weights, round)


def fl_lightning(problem: dict[str, Any]) -> None:
    """This package: a Trainer whose steps are rounds, with ledger and metrics."""
    import pytorch_lightning as pl

    from bench.rival_engines import join_processes
    from fl_lightning import (
        ClientParallelStrategy,
        FederatedDataModule,
        FederatedModule,
        PrivacyConfig,
        from_arrays,
    )
    from fl_lightning.output.callbacks import RoundRecorder
    from fl_lightning.output.checkpoint import AtomicCheckpointIO, RoundCheckpoint

    class Turn(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            share = trainer.strategy.broadcast if trainer.world_size > 1 else None
            turn.share = share
            turn(lambda: pl_module.network.state_dict(), folder=str(pl_module.run_path))

    turn = Turnstile(pl.__version__)
    options = problem["options"]
    processes = options.get("processes", 1)
    join_processes(processes)
    data = FederatedDataModule(
        from_arrays(
            problem["x"], problem["y"], problem["x_test"], problem["y_test"], num_classes=10,
            name="benchmark",
        ),
        num_clients=len(problem["owners"]), val_fraction=0.0, seed=problem["seed"],
    )  # fmt: skip
    module = FederatedModule(
        federation.network(problem["network"]),
        PrivacyConfig(**options["privacy"]),
        clients_per_round=problem["schedule"].shape[1],
        sampling_rate=None, batch_size=problem["batch"], local_steps=problem["steps"],
        client_lr=problem["lr"], seed=problem["seed"],
        execution=options.get("execution", "auto"),
        run_dir=str(Path("run").resolve()),
    )  # fmt: skip
    callbacks: list[pl.Callback] = [Turn(), RoundRecorder()]
    if options.get("checkpoint"):
        callbacks.append(RoundCheckpoint())
    trainer = pl.Trainer(
        max_epochs=len(problem["schedule"]),
        accelerator="gpu" if problem["device"] == "cuda" else "cpu",
        devices=processes, strategy=ClientParallelStrategy() if processes > 1 else "auto",
        use_distributed_sampler=False, plugins=[AtomicCheckpointIO()], callbacks=callbacks,
        logger=False, enable_checkpointing=bool(options.get("checkpoint")),
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)


def lightning_per_client(problem: dict[str, Any]) -> None:
    """What one would write with Lightning alone: a Trainer for every client of every round."""
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader, TensorDataset

    class Client(pl.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=problem["lr"])

    def train(weights: dict[str, Tensor], client: int, round: int) -> dict[str, Tensor]:
        module.model.load_state_dict(weights)
        loader = DataLoader(
            TensorDataset(*federation.records(problem, client, round)), batch_size=problem["batch"]
        )
        trainer = pl.Trainer(
            max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, devices=1,
            accelerator="gpu" if problem["device"] == "cuda" else "cpu",
        )  # fmt: skip
        trainer.fit(module, loader)
        return {name: value.detach().cpu() for name, value in module.model.state_dict().items()}

    module = Client(federation.network(problem["network"]))
    weights = {n: v.cpu() for n, v in federation.start(problem).items()}
    turn = Turnstile(pl.__version__)
    for round, cohort in enumerate(problem["schedule"].tolist()):
        turn(lambda weights=weights: weights)
        total = {name: torch.zeros_like(value) for name, value in weights.items()}
        for client in cohort:
            for name, value in train(weights, client, round).items():
                total[name] += value
        weights = {name: value / len(cohort) for name, value in total.items()}


def engines() -> dict[str, Callable[[dict[str, Any]], None]]:
    """All engines by name."""
    from bench import rival_engines as rivals

    return {
        "plain_loop": plain_loop,
        "fl_lightning": fl_lightning,
        "lightning_per_client": lightning_per_client,
        "flower": rivals.flower,
        "pfl": rivals.pfl,
    }


def main() -> None:
    """Run an engine until it is told to end."""
    name, path = sys.argv[1:]
    warnings.simplefilter("ignore")
    problem = torch.load(path)
    torch.manual_seed(0)
    try:
        engines()[name](problem)
    except Exception as error:
        # The last line of the log is what the report shows.
        import traceback

        traceback.print_exc()
        print(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        sys.stdout.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
