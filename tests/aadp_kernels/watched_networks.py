"""Networks whose passes are watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aadp_kernels import NoiseKey, with_clipping
from aadp_kernels.integrations.optim import PrivateOptimizer

Way = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Two layers; what happens to the first is given."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.fc, self.out, self.way = nn.Linear(4, 4), nn.Linear(4, 2), way

    def forward(self, x: Tensor | None = None, other: Any = None, **named: Any) -> Tensor:
        first = next(v for v in (x, *named.values()) if v is not None)
        if isinstance(first, dict):
            first = first["x"]
        return self.out(self.way(self, first))


def private(way: Way = lambda self, x: self.fc(x), **options: Any) -> tuple[Any, PrivateOptimizer]:
    torch.manual_seed(0)
    model = with_clipping(Net(way), p=2)
    arguments = {
        "clip_norm": 0.1, "noise_multiplier": 0.0, "expected_batch_size": 1.0,
        "key": NoiseKey.from_seed(0),
    }  # fmt: skip
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    return model, PrivateOptimizer(sgd, model, **(arguments | options))


def data(n: int = 6) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(1))


FOREIGN: dict[str, Way] = {
    "attribute": lambda self, x: self.fc(x) @ self.fc.weight,
    "F.linear": lambda self, x: self.fc(x) + F.linear(x, self.fc.weight),
    "parameters": lambda self, x: self.fc(x) + sum(p.sum() for p in self.parameters()),
    "captured": lambda self, x: self.fc(x) + x @ next(self.fc.parameters()),
    "of the other layer": lambda self, x: self.fc(x) + x @ self.out.weight.T @ self.out.weight,
    "bias": lambda self, x: self.fc(x) + self.fc.bias,
    "functional_call": lambda self, x: (
        self.fc(x)
        + torch.func.functional_call(nn.Linear(4, 4), dict(self.fc.named_parameters()), (x,))
    ),
}
