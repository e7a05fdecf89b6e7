"""Layers that no record moves at the start are named: their share would buy noise alone."""

from __future__ import annotations

import logging

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from fl_lightning import FederatedDataModule, FederatedModule, PrivacyConfig, from_arrays


class LowRank(nn.Module):
    """x → (W + B·A)·x with a frozen W."""

    def __init__(self, *, start: float, frozen: bool) -> None:
        super().__init__()
        self.whole = nn.Linear(6, 3).requires_grad_(False)
        self.down = nn.Linear(6, 2, bias=False).requires_grad_(not frozen)
        self.up = nn.Linear(2, 3, bias=False)
        nn.init.constant_(self.up.weight, start)

    def forward(self, x):
        return self.whole(x) + self.up(self.down(x))


@pytest.mark.parametrize(
    ("start", "frozen", "setting", "named"),
    [
        (0.0, False, "record+local", True),
        (0.0, True, "record+local", False),
        (0.5, False, "record+local", False),
        (0.0, False, "none", False),
    ],
)
def test_what_no_record_moves_is_named(start, frozen, setting, named, tmp_path, caplog):
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    data = FederatedDataModule(from_arrays(x, torch.arange(24) % 3), num_clients=2)
    given = {} if setting == "none" else {"epsilon": 8.0, "delta": 1e-2}
    module = FederatedModule(
        LowRank(start=start, frozen=frozen), PrivacyConfig(setting=setting, **given),
        run_dir=str(tmp_path),
    )  # fmt: skip
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False)
    with caplog.at_level(logging.INFO, logger="pytorch_lightning"):
        module.check(data, trainer)
    assert ("no record moves down.weight at the start" in caplog.text) == named
