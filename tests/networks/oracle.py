"""Clipped sums by the definition: float64, plain autograd, one record at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """How a record's gradient is clipped.

    Args:
        clipping: "layer", "flat" or "joint".
        p: norm of a layer, 1 or 2.
        order: of the norm over layers under joint clipping: 2 for Gaussian noise, 1 for Laplace.
        clips: clip norm of each layer, by name; "all" under flat clipping.
        shares: budget share of each layer, which joint clipping measures by.
    """

    clipping: str
    p: int
    order: int
    clips: dict[str, float]
    shares: dict[str, float] = field(default_factory=dict)

    def layer(self, parameter: str) -> str:
        """Layer of a parameter: the module that owns it, or itself where the network does."""
        return "all" if self.clipping == "flat" else parameter.rpartition(".")[0] or parameter

    def norms(self, gradient: Gradients) -> dict[str, float]:
        """Norm of each layer of one gradient."""
        parts: dict[str, list[Tensor]] = {}
        for name, value in gradient.items():
            flat = torch.view_as_real(value) if value.is_complex() else value
            parts.setdefault(self.layer(name), []).append(flat.reshape(-1).double())
        return {
            layer: float(torch.linalg.vector_norm(torch.cat(some), self.p))
            for layer, some in parts.items()
        }

    def moves(self, gradient: Gradients) -> dict[str, float]:
        """Norms over what one record may contribute: at most 1 each."""
        norms = self.norms(gradient)
        if self.clipping != "joint":
            return {layer: norm / self.clips[layer] for layer, norm in norms.items()}
        power = 1 / self.order
        units = [norms[n] * self.shares[n] ** power / self.clips[n] for n in norms]
        return {"all": sum(u**self.order for u in units) ** power}

    def factors(self, gradient: Gradients) -> dict[str, float]:
        """What each layer of a record's gradient is multiplied by; 0 where it is not finite."""
        moves = self.moves(gradient)
        factors = {
            layer: 0.0 if move != move or move == float("inf") else min(1.0, 1 / max(move, 1e-300))
            for layer, move in moves.items()
        }
        if self.clipping != "joint":
            return factors
        return dict.fromkeys(self.norms(gradient), factors["all"])


def double(network: nn.Module) -> nn.Module:
    """The network in float64 (complex128), in place: who keeps a parameter keeps this one."""
    for parameter in network.parameters():
        wide = torch.complex128 if parameter.is_complex() else torch.float64
        if parameter.is_complex() or parameter.is_floating_point():
            parameter.data = parameter.data.to(wide)
    return network.double()


def record_gradients(
    network: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor
) -> list[Gradients]:
    """Gradient of each record's own loss: one forward and one backward of a batch of one.

    Args:
        network: in float64; this very module is used, no copy of it.
        loss: (outputs, labels) → [B].
        x: records [B, ...].
        y: labels [B].
    """
    return [batch_gradients(network, loss, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]


def batch_gradients(
    network: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor
) -> Gradients:
    """Gradient of the summed loss of a batch; the arguments are those of `record_gradients`."""
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    dtype = next((p.dtype.to_real() for p in network.parameters()), torch.float64)
    inputs: Any = x.to(dtype) if x.is_floating_point() else x
    value = loss(network(inputs.clone()), y).sum()
    if not value.requires_grad:
        return {n: torch.zeros_like(p) for n, p in trained.items()}
    network.zero_grad()
    value.backward()  # what reentrant checkpoints need
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}
    network.zero_grad()
    return {n: (g.to_dense() if g.is_sparse else g).detach().clone() for n, g in found.items()}


def clipped_sum(gradients: Sequence[Gradients], rule: Rule, like: Gradients) -> Gradients:
    """Σ over records of the clipped gradient; zeros of `like` for no record."""
    total = {n: torch.zeros_like(v) for n, v in like.items()}
    for gradient in gradients:
        factors = rule.factors(gradient)
        for name, value in gradient.items():
            factor = factors[rule.layer(name)]
            if factor:
                total[name] += factor * value
    return total
