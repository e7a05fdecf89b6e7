"""A run before anything of it exists: what the checks and the dry round look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from torch import nn
from torchmetrics import MetricCollection

from aadp_kernels import Layout
from fl_lightning.data import FederatedDataModule
from fl_lightning.local.gradient import Loss
from fl_lightning.rules import Rules


@dataclass(frozen=True)
class ProposedRun:
    """What a run is to be made of.

    Args:
        rules: of the run.
        module: the LightningModule that holds the network.
        network: the global model.
        loss: loss of each record.
        server_optimizer, server_scheduler: what makes the server's optimizer and its schedule.
        data: records and who holds them.
        trainer: of the run.
        member: whether its one client is a node, which adds to sums with others.
        metrics: further figures of held-out records.
        elsewhere: whether its clients are nodes, whose records are not here.
    """

    rules: Rules
    module: pl.LightningModule
    network: nn.Module
    loss: Loss
    server_optimizer: Callable[[Any], Any]
    server_scheduler: Callable[[Any], Any] | None
    data: FederatedDataModule
    trainer: pl.Trainer
    member: bool = False
    metrics: MetricCollection | None = None
    elsewhere: bool = False

    @property
    def layout(self) -> Layout:
        """The trained parameters and their layers, once lazy layers have theirs."""
        return trained_layers(self.network, self.rules)

    @property
    def rounds(self) -> int:
        """Rounds that the run plans for."""
        return self.rules.planned_rounds or self.trainer.max_epochs or 0


def trained_layers(network: nn.Module, rules: Rules) -> Layout:
    """The trained parameters and their layers: one layer where all is clipped together."""
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    flat = dict.fromkeys(trained, "all") if rules.privacy.clipping == "flat" else None
    return Layout.build(trained, flat)
