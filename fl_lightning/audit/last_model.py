"""What a reader of the last model learns, who may only ask it for an output.

A canary's last model is the first one with all its own releases added, as in a federation of one
client by plain averaging. With other clients it would be the same plus what they add, which has
nothing to do with the canary: a reader of theirs sees less.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fl_lightning.audit.canary import HUGE, Canary
from fl_lightning.networks.functional import apply_with

Floats = npt.NDArray[np.float64]
# Models of so many numbers together are kept; 1 GiB.
_MOST = 2**28


class LastModels:
    """The last models of the canaries of a copy.

    Args:
        network: in evaluation mode.
        canary: whose record is asked for.
        count: canaries n.
        factor: what a release is multiplied by before it is added to the model.
    """

    def __init__(self, network: nn.Module, canary: Canary, count: int, factor: float) -> None:
        self.network, self.canary, self.factor = network, canary, factor
        self._moved: dict[str, Tensor] | None = None
        if count * sum(p.numel() for p in canary.params.values()) <= _MOST:
            self._moved = {n: torch.zeros(count, *p.shape) for n, p in canary.params.items()}

    def add(self, clients: Tensor, update: Mapping[str, Tensor]) -> None:
        """Released gradients or updates, each [k, ...], of canaries `clients` [k]."""
        for name, moved in (self._moved or {}).items():
            moved[clients] += self.factor * update[name].to(moved)

    def scores(self) -> Floats | None:
        """How much less the canary's loss is than it was before, [n]; None: too many to keep."""
        if self._moved is None:
            return None
        record = self.canary.record[None]
        label = torch.zeros(1, device=record.device)

        def loss(params: Mapping[str, Tensor]) -> float:
            return float(self.canary.loss(apply_with(self.network, params, record), label)) / HUGE

        with torch.no_grad():
            before = loss(self.canary.params)
            count = len(next(iter(self._moved.values())))
            return np.array(
                [
                    before
                    - loss({n: p + self._moved[n][i].to(p) for n, p in self.canary.params.items()})
                    for i in range(count)
                ]
            )
