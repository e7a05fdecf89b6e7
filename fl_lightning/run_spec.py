"""The inputs of a run: everything that is known before it begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from aadp_kernels import Layout
from fl_lightning.data import FederatedDataModule
from fl_lightning.local.gradient import Loss
from fl_lightning.processes.together import Processes
from fl_lightning.release.federation import Federation
from fl_lightning.rules import Rules
from fl_lightning.values.round import Params


@dataclass(frozen=True)
class RunSpec:
    """The inputs of a run that `begin_run` begins. Nothing of the run exists yet.

    Args:
        rules: of the run.
        network: the global model, on its device.
        loss: loss of each record.
        layout: trained parameters and their layers.
        data: records and who holds them.
        folder: of the run.
        processes: those of the run.
        vmaps: whether clients can be trained together under vmap.
        last_model: rounds → what each release is multiplied by in the last model, see
            `server.optimizer.weights_in_last_model`; called only for noise that rounds share.
        resumed: state of the checkpoint that the run goes on from, or None.
        federation: nodes that release for themselves; None: all clients are simulated here.
        search: facts of the search that the run is a candidate of; None: of none.
        number: at a node, what its client is called in the federation; None: not a node.
        span: at a node, rounds of the federation's run.
    """

    rules: Rules
    network: nn.Module
    loss: Loss
    layout: Layout
    data: FederatedDataModule
    folder: Path
    processes: Processes
    vmaps: bool
    last_model: Callable[[int], np.ndarray]
    resumed: dict[str, Any] | None
    federation: Federation | None = None
    number: int | None = None
    span: int | None = None
    search: dict[str, Any] | None = None

    def params(self) -> Params:
        """The trained parameters."""
        parameters = dict(self.network.named_parameters())
        return {name: parameters[name].detach() for name in self.layout.names}
