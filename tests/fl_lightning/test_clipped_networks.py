"""Clipping of networks that use their layers in other ways: rows, weights, activations, types."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from aadp_kernels import Layout, UnsupportedLayerError
from fl_lightning.local.batches import Batch
from fl_lightning.models import CNN
from fl_lightning.module import cross_entropy
from fl_lightning.privacy.clipping import clipped_sums
from fl_lightning.privacy.one_factor import dense_layers
from fl_lightning.values.round import LayerPolicy
from tests.fl_lightning.flat_networks import (
    by_layer,
    flat_layout,
    make_network,
    parameters,
    records_of,
    some_batch,
)


def full_batch() -> Batch:
    """Records of one client, none of them padding."""
    batch = some_batch(1)
    batch.mask[:] = 1
    return batch


def sums_of(network: nn.Module, clipping: str, batch: Batch, clip: float) -> tuple[dict, Layout]:
    """Clipped sums with equal clip norms and shares, and their layout."""
    whole = Layout.build(dict(network.named_parameters()))
    layout = flat_layout(network) if clipping == "flat" else whole
    run = clipped_sums(
        network, cross_entropy, layout, p=2, vectorize=True, max_examples=4, example=batch.x[0, :1],
        clipping=clipping,
    )  # fmt: skip
    clips = torch.full((1, layout.num_layers), clip, dtype=torch.float64)
    shares = torch.full_like(clips, 1 / layout.num_layers)
    policy = LayerPolicy(clips, shares, shares, 0 * clips)
    return run(parameters(network), True, batch, policy)[0], layout


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.fc(x))


class Positions(nn.Module):
    """Dense layers on two halves of a record, all records' halves at once."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc2(self.fc1(x.view(-1, 4)).tanh()).view(-1, 2, 3).mean(1)


class Elsewhere(nn.Module):
    """A weight used by its layer and beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(x) + nn.functional.linear(x.square(), self.fc.weight)


@pytest.mark.parametrize("clipping", ["layer", "flat", "joint"])
@pytest.mark.parametrize("network", [Positions(), Elsewhere(), Twice()])
def test_records_are_clipped_whole_whatever_the_network_does_with_them(clipping, network):
    """Rows of a layer that are no records, parameters used twice or beside their layer."""
    batch = full_batch()
    sums, layout = sums_of(network, clipping, batch, 0.3)
    shares = torch.full((layout.num_layers,), 1 / layout.num_layers)
    expected = {n: torch.zeros_like(v) for n, v in parameters(network).items()}
    for record in records_of(network, batch, 0):
        norms = by_layer(record, layout, 2)
        units = norms / 0.3 * shares.sqrt()
        for n, layer in zip(layout.names, layout.layer_of, strict=True):
            size = units.norm() if clipping == "joint" else norms[layer] / 0.3
            expected[n] += record[n] * min(1.0, 1 / float(size))
    for n in expected:
        torch.testing.assert_close(sums[n][0].float(), expected[n].float(), rtol=2e-5, atol=2e-6)


class InPlace(nn.Module):
    """Activations that overwrite what a layer gave, hooks, and an argument by name."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 30), nn.Linear(30, 3)
        self.fc2.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
        self.fc2.register_forward_hook(lambda _, __, output: 3 * output)

    def forward(self, x):
        hidden = self.fc1(input=x)
        hidden *= 2.0
        return self.fc2(hidden.relu_())


class Unused(nn.Module):
    """One layer that nobody calls and one that the outputs do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.never, self.beside = nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        self.beside(x)
        return self.fc(x)


@pytest.mark.parametrize("clipping", ["layer", "flat", "joint"])
@pytest.mark.parametrize("network", [InPlace(), Unused()])
def test_unclipped_sums_are_ordinary_gradients(clipping, network):
    batch = full_batch()
    sums, _ = sums_of(network, clipping, batch, 1e6)
    loss = cross_entropy(network(batch.x[0]), batch.y[0]).sum()
    leaves = list(network.parameters())
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    for n, expected in zip(parameters(network), found, strict=True):
        torch.testing.assert_close(sums[n][0], expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("clipping", ["layer", "flat", "joint"])
def test_networks_in_float64(clipping):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    batch = replace(full_batch(), x=full_batch().x.double())
    sums, _ = sums_of(network, clipping, batch, 0.1)
    assert all(v.dtype == torch.float64 and v.isfinite().all() for v in sums.values())


def test_networks_that_have_other_layers_are_told_apart():
    network, x = make_network(), torch.zeros(2, 8)
    _, found = dense_layers(network, flat_layout(network), x)
    assert list(found) == ["fc1", "fc2", "fc3"]
    with pytest.raises(UnsupportedLayerError, match="fc is used more than once"):
        dense_layers(Twice(), flat_layout(Twice()), x)
    cnn = CNN(num_classes=3)
    image = torch.zeros(2, 1, 8, 8)
    with pytest.raises(UnsupportedLayerError, match="Linear layers"):
        dense_layers(cnn, flat_layout(cnn), image)
    options = {"p": 2, "vectorize": True, "max_examples": 9, "example": image, "clipping": "flat"}
    clipped_sums(cnn, cross_entropy, flat_layout(cnn), **options)
    with pytest.raises(ValueError, match="automatic"):
        clipped_sums(cnn, cross_entropy, flat_layout(cnn), automatic=True, **options)
