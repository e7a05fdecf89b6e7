"""Rounds as callbacks see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from aadp_kernels import Layout
from fl_lightning.output.callbacks import RoundRecorder
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.rules import Rules
from fl_lightning.values.round import RoundResult

K, M, L = 5, 3, 2


class Rounds(pl.LightningModule):
    """Stands in for FederatedModule: results are functions of the round and of `shift`."""

    federation: Any = None
    evaluated: Any = None
    run: Any = None

    def __init__(self, path: Path, privacy: PrivacyConfig | None = None, shift: float = 0.0):
        super().__init__()
        self.automatic_optimization = False
        self.network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 3))
        self.layout = Layout.build(dict(self.network.named_parameters()))
        self.privacy = privacy or PrivacyConfig(seed=1)
        self.rules = Rules(self.privacy)
        self.ledger: Any = object() if self.privacy.private else None
        self.run_path, self.shift = path, shift
        self.result: RoundResult | None = None

    def training_step(self, batch: int, batch_idx: int) -> None:
        self.optimizers().step()
        r = self.current_epoch
        table = np.arange(M * L, dtype=float).reshape(M, L) + r + self.shift
        if not self.privacy.private:
            table = np.zeros((0, 0))
        self.result = RoundResult(
            round=r,
            cohort=np.array([r % K, (r + 1) % K, (r + 2) % K]),
            clip_norm=table + 1,
            shares=table + 2,
            contribution=table + 3,
            noise_scale=table + 4,
            clipped_fraction=table + 5,
            nonfinite=r,
            participants=3,
            epsilon_spent=np.linspace(r, r + 1, K),
            seconds=0.25,
        )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.log("sim_only/val_accuracy", (self.current_epoch + 1) / 100, batch_size=1)
            self.log("sim_only/val_loss", 2.0, batch_size=1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/accuracy", 0.5, batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(1), batch_size=None)

    val_dataloader = test_dataloader = train_dataloader


def train(
    module: Rounds, rounds: int, *more: pl.Callback, ckpt: Path | None = None, **options: Any
):
    """Fit with a recorder; returns the Trainer."""
    defaults: dict[str, Any] = {"logger": False, "enable_progress_bar": False}
    if not any(isinstance(c, ModelCheckpoint) for c in more):
        defaults["enable_checkpointing"] = False
    trainer = pl.Trainer(
        max_epochs=rounds,
        accelerator="cpu",
        callbacks=[*more, RoundRecorder()],
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=module.run_path,
        **{**defaults, **options},
    )
    trainer.fit(module, ckpt_path=ckpt, weights_only=False)
    return trainer
