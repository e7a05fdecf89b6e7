"""Gradients of records in two steps: norms of each layer, and sums by factors that come later."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aadp_kernels import WatchedForward, forget_gradients, record_gradients, with_kept_gradients

RECORDS = 6


class Network(nn.Module):
    """Tokens, then layers of each kind, the dense ones of all widths."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(9, 12, padding_idx=0)
        self.norm = nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 40), nn.Linear(40, 12, bias=False)
        self.conv, self.group = nn.Conv1d(12, 6, 3, padding=1), nn.GroupNorm(2, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(self.up(self.norm(self.token(x))).tanh())
        h = self.group(self.conv(h.transpose(1, 2)).tanh())
        return self.last(h.mean(2))


@pytest.fixture(params=["torch", "numba"], autouse=True)
def kernels(request, monkeypatch):
    if request.param == "numba":
        pytest.importorskip("numba")
        return
    for module in ("clip", "products", "two_steps"):
        name = f"aadp_kernels.clip_in_backward.{module}.record_kernels"
        monkeypatch.setattr(name, lambda _: None)


def network_and_records() -> tuple[Network, Tensor, Tensor]:
    torch.manual_seed(0)
    network = Network()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network, torch.randint(9, (RECORDS, 7)), torch.randn(RECORDS, 3)


def loss_of(outputs: Tensor, y: Tensor) -> Tensor:
    return ((outputs - y) ** 2).sum()


def kept(network: nn.Module, x: Tensor, y: Tensor):
    """Entries of the layers, each with its gradients of records [B, n] by name."""
    model = with_kept_gradients(network)
    watch = WatchedForward(model)
    given = {n: p.detach().requires_grad_() for n, p in network.named_parameters()}
    with watch.forward(given, len(x)):
        outputs = model(x)
    found = record_gradients(model, loss_of(outputs, y))
    forget_gradients(model)
    rows = []
    for i in range(len(x)):
        network.zero_grad()
        loss_of(network(x[i : i + 1]), y[i : i + 1]).backward()
        grads = {n: p.grad for n, p in network.named_parameters()}
        rows.append({n: g.clone() for n, g in grads.items() if g is not None})
    return [
        (layer, {n: torch.stack([row[n] for row in rows]).double() for n in names_of(layer)})
        for layer in found
    ]


def names_of(layer) -> list[str]:
    return [name for name in (layer.weight_name, layer.bias_name) if name is not None]


@pytest.mark.parametrize(("p", "l1"), [(1, False), (1, True), (2, False), (2, True)])
def test_norms_are_those_of_records_one_by_one(p, l1):
    found = kept(*network_and_records())
    assert len(found) == 7
    for layer, true in found:
        flat = torch.cat([value.flatten(1) for value in true.values()], 1)
        norm1, square, finite = layer.norms(p, l1=l1)
        assert finite.tolist() == [True] * RECORDS
        for value, want, wanted in (
            (norm1, flat.abs().sum(1), p == 1 or l1),
            (square, flat.square().sum(1), p == 2),
        ):
            assert (value is not None) == wanted, names_of(layer)
            if value is not None:
                assert value.dtype == torch.float64
                torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-9)


def test_sums_are_those_of_records_times_their_factors():
    factor = torch.tensor([0.5, 0.0, 1.0, 0.25, 1.0, 2 / 3])
    for layer, true in kept(*network_and_records()):
        found = layer.sums(factor, torch.ones(RECORDS, dtype=torch.bool))
        assert set(found) == set(true)
        for name, value in found.items():
            want = torch.einsum("b,b...->...", factor.double(), true[name])
            torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("l1", [False, True])
def test_strange_records_are_named_and_left_out(l1):
    """NaN in a record's target reaches every layer; the sums are those of the others."""
    network, x, y = network_and_records()
    y[2] = torch.nan
    others = torch.arange(RECORDS) != 2
    factor = torch.rand(RECORDS)
    for layer, true in kept(network, x, y):
        _, _, finite = layer.norms(2, l1=l1)
        assert finite.tolist() == others.tolist(), names_of(layer)
        for name, value in layer.sums(factor, finite).items():
            want = torch.einsum("b,b...->...", factor[others].double(), true[name][others])
            torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-6)


def test_what_is_held_of_a_normalisation_layer_are_gradients_of_records():
    for layer, true in kept(*network_and_records()):
        if layer.weight_name in ("norm.weight", "group.weight"):
            for held, value in zip((layer.a, layer.g), true.values(), strict=True):
                assert held.shape == value.shape
                torch.testing.assert_close(held.double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [4, 30])
@pytest.mark.parametrize("positions", [0, 5, 30])
@pytest.mark.parametrize("bias", [False, True])
def test_dense_layers_of_any_widths(width, positions, bias):
    """Vectors, and positions with and without Gram matrices; either side may be the narrower."""
    torch.manual_seed(positions)
    shape = (RECORDS, positions, 16) if positions else (RECORDS, 16)
    x, y = torch.randn(shape), torch.randn(*shape[:-1], width)
    ((layer, true),) = kept(nn.Sequential(nn.Linear(16, width, bias=bias)), x, y)
    flat = torch.cat([value.flatten(1) for value in true.values()], 1)
    square = layer.norms(2, l1=False)[1]
    torch.testing.assert_close(square, flat.square().sum(1), rtol=1e-5, atol=0)
    factor = torch.rand(RECORDS)
    for name, value in layer.sums(factor, torch.ones(RECORDS, dtype=torch.bool)).items():
        want = torch.einsum("b,b...->...", factor.double(), true[name])
        torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-5)
