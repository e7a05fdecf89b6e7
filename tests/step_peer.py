"""A peer of `bench.step_peers` that runs in a process: vmap(grad) of the MLP, clipped by layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F


def build(
    network: str, variant: str, parameters: dict[str, Tensor], x: Tensor, y: Tensor,
    clips: list[float], members: list[list[str]], lr: float,
) -> tuple[str, Callable[[float], list[Tensor]]]:  # fmt: skip
    """Version and step; the variant "no noise" forgets it."""

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        hidden = F.linear(x.flatten(), p["fc1.weight"], p["fc1.bias"]).tanh()
        return F.cross_entropy(F.linear(hidden, p["fc2.weight"], p["fc2.bias"]), y)

    def run(scale: float) -> list[Tensor]:
        found = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
        noise = 0.0 if variant == "no noise" else scale
        sums = {}
        for names, clip in zip(members, clips, strict=True):
            norm = torch.stack([found[n].flatten(1).norm(dim=1) for n in names]).norm(dim=0)
            for n in names:
                total = torch.einsum("b,b...->...", (clip / norm).clamp(max=1.0), found[n])
                sums[n] = total + noise * torch.randn_like(total)
        return [sums[n] for n in parameters]

    return "1.0", run
