"""Runs that are tried with one thing wrong."""

import pytorch_lightning as pl
import torch

from fl_lightning import FederatedDataModule, FederatedModule, PrivacyConfig, from_arrays
from fl_lightning.models import MLP


def data(num_records=60, **options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_records, 6, generator=generator)
    y = torch.arange(num_records) % 3
    return FederatedDataModule(
        from_arrays(x, y, num_classes=3),
        **({"num_clients": 3, "val_fraction": 0.0} | options),
    )


def train(folder, *, network=None, records=None, privacy=None, trainer=None, **options):
    """Train two rounds; every argument may be wrong."""
    module = FederatedModule(
        network or MLP(6, 3, hidden=[4]),
        PrivacyConfig(**{"epsilon": None, "noise_multiplier": 1.0, "seed": 0} | (privacy or {})),
        **({"run_dir": str(folder), "execution": "loop"} | options),
    )
    pl.Trainer(
        **{
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "limit_val_batches": 0,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        | (trainer or {})
    ).fit(module, records or data())
    return module
