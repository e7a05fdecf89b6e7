"""A small run that is stopped, changed and gone on with, in this process."""

import csv
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from fl_lightning import FederatedDataModule, FederatedModule, PrivacyConfig, from_arrays
from fl_lightning import ledger as ledgers
from fl_lightning.models import MLP
from fl_lightning.output.callbacks import RoundRecorder
from fl_lightning.output.checkpoint import CHECKPOINT, AtomicCheckpointIO, RoundCheckpoint

CLIENTS = 3
RECORD = {"noise_multiplier": 1.0, "epsilon": None, "clip_norm": 1.0}
SETTINGS = {
    "record+local": RECORD | {"setting": "record+local", "thresholds": "quantile"},
    "client+local": RECORD | {"setting": "client+local", "thresholds": "released", "delta": 0.1},
    "client+aggregator": RECORD | {"setting": "client+aggregator", "delta": 0.1},
    "client+secure_sum": RECORD | {"setting": "client+secure_sum", "delta": 0.1},
    "record+local grid": RECORD | {"thresholds": "quantile", "noise_form": "grid"},
    "client+local grid": RECORD
    | {"setting": "client+local", "mechanism": "laplace", "noise_form": "grid", "delta": 0.0},
    "none": {"setting": "none"},
}


def fed_avg_m(parameters):
    return torch.optim.SGD(parameters, lr=1.0, momentum=0.9)


def blobs(seed=0, val_fraction=0.2):
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(0, 3, (90,), generator=generator)
    x = torch.randn(90, 6, generator=generator) + 2 * torch.eye(3, 6)[y]
    arrays = from_arrays(x, y, num_classes=3)
    return FederatedDataModule(arrays, CLIENTS, val_fraction=val_fraction, seed=seed)


def go(
    folder, rounds, *, privacy, resume=False, every=1, data_seed=0, callbacks=(), hidden=(4,),
    **options,
):  # fmt: skip
    """Train up to `rounds` in a folder, as the command line does; the module is handed back."""
    torch.manual_seed(5)
    options = {"planned_rounds": 8, "execution": "vmap", "sampling_rate": 0.5} | options
    module = FederatedModule(
        MLP(6, 3, hidden=list(hidden)),
        PrivacyConfig(**{"seed": 7} | privacy),
        server_optimizer=fed_avg_m,
        run_dir=str(folder),
        **options,
    )
    trainer = pl.Trainer(
        max_epochs=rounds,
        accelerator="cpu",
        logger=False,
        callbacks=[*callbacks, RoundRecorder(), RoundCheckpoint(every)],
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    checkpoint = str(Path(folder) / CHECKPOINT) if resume else None
    trainer.fit(module, blobs(data_seed), ckpt_path=checkpoint, weights_only=False)
    return module


def same_tensors(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def same_optimizers(a, b):
    one, two = (m.trainer.optimizers[0].state_dict() for m in (a, b))
    assert one["param_groups"] == two["param_groups"]
    assert one["state"].keys() == two["state"].keys()
    assert one["state"], "momentum must have been kept"
    for key in one["state"]:
        same_tensors(one["state"][key], two["state"][key])


def rows(path, without=("seconds",)):
    with Path(path).open() as file:
        return [{k: v for k, v in r.items() if k not in without} for r in csv.DictReader(file)]


def charged(folder):
    """(client, round, attempt) of every line."""
    return [(r.client, r.round, r.attempt) for r in ledgers.read(folder)[1]]


class CrashAfterLedger(pl.Callback):
    """Raise in a round after its releases are in the ledger and before its checkpoint."""

    def __init__(self, round):
        self.round = round

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == self.round:
            raise KeyError("crash")


def crash(folder, round, **kwargs):
    with pytest.raises(KeyError, match="crash"):
        go(folder, 8, callbacks=[CrashAfterLedger(round)], **kwargs)
