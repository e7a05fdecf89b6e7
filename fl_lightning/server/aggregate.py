"""Released updates → server pseudo-gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aadp_kernels import Layout
from fl_lightning.local.rows import flat_rows
from fl_lightning.values.round import LayerPolicy, Params

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


def noise_variance(policy: LayerPolicy, mechanism: str, factor: Tensor) -> Tensor:
    """Variance of the noise in one number of each layer of each client's release, float64 [k, L].

    Args:
        policy: noise of the release.
        mechanism: gaussian or laplace.
        factor: what the sum with its noise was multiplied by, [k]: lr/B_k; 1 for whole updates.
    """
    of_unit = 2.0 if mechanism == "laplace" else 1.0
    return of_unit * (policy.noise_scale * factor.double()[:, None]).square()


class WeightedMean:
    """Weighted mean of client updates, each layer with weights of its own, group by group."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.weight = torch.zeros(layout.num_layers, dtype=torch.float64)
        self.variance = torch.zeros_like(self.weight)
        self.total: Params = {}

    def add(self, update: Params, weights: Tensor, variance: Tensor | None = None) -> None:
        """Add updates [k, ...] with weights [k, L] and the known variance of their noise [k, L]."""
        self.weight += weights.sum(0)
        if variance is not None:
            self.variance += (weights.square() * variance).sum(0)
        for name, layer in zip(self.layout.names, self.layout.layer_of, strict=True):
            value = update[name]
            row = weights[:, layer].to(value.device, value.dtype)
            part = value[0] * row if len(value) == 1 else row @ flat_rows(value)
            part = part.view(value.shape[1:])
            self.total[name] = self.total[name] + part if name in self.total else part

    def signal(self) -> Tensor:
        """Share of each layer's mean that is more than its noise, in [0, 1], float64 [L].

        The positive part of James and Stein's (1961) shrinkage: 1 - d·s²/‖mean‖², s² the variance
        of the noise in one number of the mean.
        """
        energy = torch.zeros_like(self.weight)
        for name, layer in zip(self.layout.names, self.layout.layer_of, strict=True):
            energy[layer] += self.total[name].double().square().sum().cpu()
        noise = torch.tensor(self.layout.dims, dtype=torch.float64) * self.variance
        return (1 - noise / energy.clamp(min=1e-300)).clamp(min=0.0)

    def write_gradient(self, network: nn.Module, *, denoise: bool = False) -> None:
        """Write the negative mean into `.grad`: a server SGD step of lr 1 is then FedAvg."""
        parameters = dict(network.named_parameters())
        signal = self.signal() if denoise else None
        weights = self.weight.tolist()
        for name, layer in zip(self.layout.names, self.layout.layer_of, strict=True):
            mean = self.total[name] / -weights[layer]
            parameters[name].grad = mean if signal is None else mean * float(signal[layer])
