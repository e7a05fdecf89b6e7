"""Networks applied with other values: exchanged everywhere, and put back."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import grad, vmap

from fl_lightning.networks.functional import apply_with


def held(network: nn.Module) -> list[int]:
    """The very tensors that the network holds, under all names."""
    return [id(p) for _, p in network.named_parameters(remove_duplicate=False)]


def test_a_module_under_two_names_gets_its_own_tensors_back():
    layer = nn.Linear(3, 3)
    network = nn.Sequential(layer, nn.Tanh(), layer)
    values = {n: torch.ones_like(p) for n, p in network.named_parameters()}
    before, x = held(network), torch.ones(2, 3)
    out = apply_with(network, values, x)
    expected = torch.tanh(torch.full((2, 3), 4.0)) * 3
    torch.testing.assert_close(out, expected.sum(1, keepdim=True).expand(2, 3) / 3 + 1)
    assert held(network) == before
    vmap(grad(lambda v, r: apply_with(network, v, r[None]).sum()), (None, 0))(values, x)
    assert held(network) == before


def test_a_parameter_of_two_modules_is_exchanged_in_both():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    before = held(network)
    values = {n: torch.ones_like(p) for n, p in network.named_parameters()}
    assert set(values) == {"0.weight", "0.bias", "1.bias"}
    torch.testing.assert_close(
        apply_with(network, values, torch.ones(2, 3)), torch.full((2, 3), 13.0)
    )
    assert held(network) == before


def test_buffers_and_a_network_that_is_one_layer():
    network = nn.BatchNorm1d(3).eval()
    values = {"weight": torch.full((3,), 2.0), "running_mean": torch.ones(3)}
    out = apply_with(network, values, torch.ones(2, 3))
    assert not out.any()
    assert network.weight.tolist() == [1, 1, 1]
