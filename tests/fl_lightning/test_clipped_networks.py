"""Clipping of networks that use their layers in other ways: rows, weights, activations, types."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from aadp_kernels import Bias, Layout, UnsupportedLayerError
from fl_lightning.local.batches import Batch
from fl_lightning.models import CNN
from fl_lightning.module import cross_entropy
from fl_lightning.privacy import clipping as clipping_module
from fl_lightning.privacy.clipping import clipped_sums
from fl_lightning.privacy.one_factor import kept_layers, layer_units
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
    x = torch.zeros(2, 8)
    kept_layers(make_network(), x)
    kept_layers(CNN(num_classes=3), torch.zeros(2, 1, 8, 8))
    with pytest.raises(UnsupportedLayerError, match="fc is used more than once"):
        kept_layers(Twice(), x)
    deep = nn.Sequential(nn.Linear(8, 4), nn.PReLU(), nn.Linear(4, 3))
    with pytest.raises(UnsupportedLayerError, match="PReLU"):
        kept_layers(deep, x)
    options = {"p": 2, "vectorize": True, "max_examples": 9, "example": x, "clipping": "flat"}
    clipped_sums(deep, cross_entropy, flat_layout(deep), **options)
    with pytest.raises(ValueError, match="automatic"):
        clipped_sums(deep, cross_entropy, flat_layout(deep), automatic=True, **options)


class Text(nn.Module):
    """Tokens with shared positions, attention of dense layers, both kinds of norms."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(20, width, padding_idx=0), nn.Embedding(6, width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.norm, self.rms = nn.LayerNorm(width), nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 96), nn.Linear(96, width, bias=False)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        h = self.norm(self.token(x) + self.place(torch.arange(6)[None]))
        mixed = (self.q(h) @ self.k(h).transpose(1, 2)).softmax(-1) @ self.v(h)
        h = self.rms(h + mixed)
        return self.head((h + self.down(self.up(h).relu())).mean(1))


class Image(nn.Module):
    """Convolutions with padding, groups and reflections, norms over groups and instances."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")
        self.two = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2, bias=False)
        self.groups, self.each = nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)
        self.bias, self.head = Bias(4, 1, 1), nn.Linear(4, 3)
        self.frozen = nn.Linear(3, 3)
        self.frozen.weight.requires_grad_(False)

    def forward(self, x):
        h = self.groups(self.one(x)).tanh()
        h = self.bias(self.each(self.two(h))).tanh()
        return self.frozen(self.head(h.sum((2, 3))))


LAYERS = {
    "text": (Text, lambda g: torch.randint(0, 20, (1, 6, 6), generator=g)),
    "image": (Image, lambda g: torch.randn(1, 6, 2, 6, 6, generator=g)),
}


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize("clipping", ["layer", "flat", "joint"])
@pytest.mark.parametrize("kind", LAYERS)
def test_all_known_layers_are_clipped_in_one_pass(kind, clipping, mechanism, monkeypatch):
    """Against clipping by the definition, in float64; no per-sample gradients are made."""
    torch.manual_seed(0)
    make, records = LAYERS[kind]
    network, p = make(), 1 if mechanism == "laplace" else 2
    x = records(torch.Generator().manual_seed(1))
    y = torch.arange(6)[None] % 3
    if x.is_floating_point():
        x[0, 2], x[0, 3] = 30 * x[0, 2], torch.nan
    mask = torch.ones(1, 6)
    mask[0, 4] = 0
    batch = Batch(x, y, mask, torch.ones(1), torch.ones(1).bool())
    trained = {n: q.detach() for n, q in network.named_parameters() if q.requires_grad}
    groups = dict.fromkeys(trained, "all") if clipping == "flat" else None
    layout = Layout.build(trained, groups)
    votes_at = torch.full((1, layout.num_layers), 1.0, dtype=torch.float64)
    judge = copy.deepcopy(network).double()
    wide = x.double() if x.is_floating_point() else x
    known = []
    for i in range(6):
        judge.zero_grad()
        cross_entropy(judge(wide[0, i : i + 1]), y[0, i : i + 1]).sum().backward()
        known.append({n: q.grad.clone() for n, q in judge.named_parameters() if n in trained})
    norms = torch.stack([by_layer(g, layout, p) for g in known])
    keep = [i for i in range(6) if mask[0, i] and bool(norms[i].isfinite().all())]
    clips = 0.8 * norms[keep].median(0).values[None].double() + 1e-3
    shares = torch.arange(1.0, 1 + layout.num_layers, dtype=torch.float64)[None]
    monkeypatch.setattr(clipping_module, "_or_by_records", lambda one_pass, _: one_pass)
    run = clipped_sums(
        network, cross_entropy, layout, p=p, vectorize=True, max_examples=99, example=x[0, :1],
        clipping=clipping, mechanism=mechanism,
    )  # fmt: skip
    policy = LayerPolicy(clips, shares, shares, 0 * clips, votes_at)
    with torch.no_grad():
        sums, counts = run(trained, True, batch, policy)
    units = layer_units(policy, clipping, mechanism)[0]
    expected = {n: torch.zeros_like(v, dtype=torch.float64) for n, v in trained.items()}
    for i in keep:
        over = norms[i] / (clips[0] if clipping == "layer" else units)
        size = over if clipping == "layer" else over.norm(p).expand_as(over)
        for n, layer in zip(layout.names, layout.layer_of, strict=True):
            expected[n] += known[i][n] * min(1.0, 1 / float(size[layer]))
    for n, want in expected.items():
        scale = float(clips[0, layout.layer_of[layout.names.index(n)]])
        torch.testing.assert_close(sums[n][0].double(), want, rtol=1e-4, atol=1e-5 * scale)
    l1 = torch.stack([by_layer(known[i], layout, 1) for i in keep])
    votes = ((l1 <= 1.0).double() - 0.5).sum(0)
    torch.testing.assert_close(counts[0, :, 0].double(), votes)


class Mean(nn.Module):
    """A dense layer over positions, and one on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)
        nn.init.zeros_(self.fc1.weight)

    def forward(self, x):
        return self.fc2(self.fc1(x).tanh().mean(1))


@pytest.mark.parametrize("clipping", ["flat", "joint"])
def test_a_record_too_large_for_one_layer_counts_in_none(clipping):
    """Its norm is finite, and its sum in float32 would not be: the first layer alone says so."""
    network = Mean()
    layout = Layout.build(dict(network.named_parameters()))
    layout = flat_layout(network) if clipping == "flat" else layout
    x = torch.ones(1, 2, 5, 4)
    x[0, 1] = 3e38
    run = clipped_sums(
        network, cross_entropy, layout, p=2, vectorize=False, max_examples=4,
        example=torch.ones(1, 5, 4), clipping=clipping,
    )  # fmt: skip
    clips = torch.ones(1, layout.num_layers, dtype=torch.float64)
    policy = LayerPolicy(clips, clips / layout.num_layers, clips / layout.num_layers, 0 * clips)
    one = torch.ones(1)
    batch = Batch(x, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2), one, one.bool())
    sums, counts = run(parameters(network), True, batch, policy)
    assert counts[0, :, 2].tolist() == [1.0] * layout.num_layers
    alone = Batch(x[:, :1], batch.y[:, :1], batch.mask[:, :1], one, one.bool())
    want, _ = run(parameters(network), True, alone, policy)
    assert all(torch.allclose(sums[n], want[n]) for n in sums)
