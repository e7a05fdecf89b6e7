"""Loss, accuracy and metrics of records that nobody trains on, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from fl_lightning.data import FederatedDataModule
from fl_lightning.local.gradient import Loss
from fl_lightning.networks.inputs import input_dtype
from fl_lightning.networks.metrics import computed, update_metrics
from fl_lightning.networks.outputs import batch_sums
from fl_lightning.processes.together import Processes
from fl_lightning.release.personal_models import ModelsElsewhere, PersonalModels, outputs_of


class Evaluable(Protocol):
    """What figures are of."""

    @property
    def network(self) -> nn.Module: ...
    @property
    def loss(self) -> Loss: ...
    @property
    def data(self) -> FederatedDataModule: ...
    @property
    def metrics(self) -> MetricCollection | None: ...


class HeldOutFigures:
    """Figures of one pass over held-out or test records, of the model as it is then. Private.

    Args:
        run: the global model, what it is judged by, and of which data.
        personal: each client's own model, in place of the global one; None: there are none.
    """

    def __init__(self, run: Evaluable, personal: PersonalModels | ModelsElsewhere | None) -> None:
        self.network, self.loss, self.metrics = run.network, run.loss, run.metrics
        self.num_classes, self.personal = run.data.num_classes, personal
        self._sums = torch.zeros(4, dtype=torch.float64)  # see `batch_sums`

    def add(self, batch: Sequence[Tensor]) -> None:
        """See a batch (x, y), or (x, y, client) where clients have models of their own."""
        x, y, *owners = batch
        if not len(x):
            return  # fewer records than processes
        x = x.to(input_dtype(self.network, x))
        parts = outputs_of(self.network, self.personal, x, owners[0] if owners else None)
        for rows, outputs in parts:
            self._sums += batch_sums(outputs, y[rows], self.loss, self.num_classes)
            if self.metrics is not None:
                update_metrics(self.metrics, outputs, y[rows], self.loss)

    def values(self, processes: Processes) -> dict[str, Tensor]:
        """What all processes found, by name; nothing where there was no record."""
        (sums,) = processes.sum([self._sums])
        if not sums[0]:
            return {}
        values = {"loss": sums[1] / sums[0]}
        if sums[3]:  # some outputs say nothing of a class
            values["accuracy"] = sums[2] / sums[0]
        return values if self.metrics is None else values | computed(self.metrics)
