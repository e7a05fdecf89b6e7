"""A small network and its private optimizer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aadp_kernels import NoiseKey, with_clipping
from aadp_kernels.integrations.optim import PrivateOptimizer

CLIP = 0.01


def network() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 2))
    return with_clipping(net, p=2)


def private(model: nn.Module, inner: Any = None, **options: Any) -> PrivateOptimizer:
    arguments = {
        "clip_norm": CLIP, "noise_multiplier": 1.0, "expected_batch_size": 1.0,
        "key": NoiseKey.from_seed(0),
    }  # fmt: skip
    inner = torch.optim.SGD(model.parameters(), lr=0.5) if inner is None else inner
    return PrivateOptimizer(inner, model, **(arguments | options))


def loss_of(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 20, generator=generator)
    return F.cross_entropy(model(x), torch.arange(30) % 2, reduction="sum")


def train(model: nn.Module, optimizer: PrivateOptimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
