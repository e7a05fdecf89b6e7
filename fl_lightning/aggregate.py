"""Released updates → server pseudo-gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aadp_kernels import Layout
from fl_lightning.types import LayerPolicy, Params

WEIGHTINGS = ("records", "uniform", "precision")


def client_weights(
    rule: str,
    *,
    client_sizes: Tensor,
    expected_batch: Tensor,
    policy: LayerPolicy | None,
    num_layers: int,
) -> Tensor:
    """Public weight of each client's layers, float64 [k, L].

    ``records``: n_k. ``uniform``: 1. ``precision``: the inverse variance of the noise in the
    layer's mean gradient or update, (B_k/σ_{k,l})²; equal weights where there is no noise.

    Args:
        rule: one of the three.
        client_sizes: n_k [k], public.
        expected_batch: B_k [k], what the noise is divided by; 1 for whole updates. Public.
        policy: noise of the release; None without privacy.
        num_layers: L.
    """
    if rule == "uniform":
        weights = torch.ones_like(client_sizes, dtype=torch.float64)
    elif rule == "records":
        weights = client_sizes.double()
    elif rule == "precision":
        if policy is not None and bool((policy.noise_scale > 0).all()):
            return (expected_batch.double()[:, None] / policy.noise_scale).square()
        weights = torch.ones_like(client_sizes, dtype=torch.float64)
    else:
        raise ValueError(f"weighting={rule!r} is not one of {WEIGHTINGS}")
    return weights[:, None].expand(-1, num_layers)


class WeightedMean:
    """Weighted mean of client updates, each layer with weights of its own, group by group."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.weight = torch.zeros(layout.num_layers, dtype=torch.float64)
        self.total: Params = {}

    def add(self, update: Params, weights: Tensor) -> None:
        """Add updates [k, ...] with weights [k, L]."""
        self.weight += weights.sum(0)
        for name, layer in zip(self.layout.names, self.layout.layer_of, strict=True):
            value = update[name]
            row = weights[:, layer].to(value.device, value.dtype)
            part = (row @ value.flatten(1)).view(value.shape[1:])
            self.total[name] = self.total[name] + part if name in self.total else part

    def write_gradient(self, network: nn.Module) -> None:
        """Write the negative mean into `.grad`: a server SGD step of lr 1 is then FedAvg."""
        parameters = dict(network.named_parameters())
        for name, layer in zip(self.layout.names, self.layout.layer_of, strict=True):
            parameters[name].grad = -self.total[name] / float(self.weight[layer])
