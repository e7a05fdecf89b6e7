"""Clip-in-backward sees every forward: what it refuses goes to per-sample gradients, exactly."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from aadp_kernels import Layout
from fl_lightning.local.batches import Batch
from fl_lightning.module import cross_entropy
from fl_lightning.privacy.clipping import clip_in_backward_sums, clipped_sums
from fl_lightning.privacy.one_factor import flat_sums
from fl_lightning.values.round import LayerPolicy

CLIP = 0.05


class Elman(nn.Module):
    """Runs over time to the longest record of the batch; tokens of -1 are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.zeros(len(x), 4)
        held = x >= 0
        for t in range(max(1, int(held.sum(1).max()))):
            live = held[:, t, None]
            h = torch.where(live, torch.tanh(self.step(h + x[:, t, None])), h)
        return self.head(h)


class RandomDepth(nn.Module):
    """Uses its layer once or three times, as a random number of torch's says."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        for _ in range(1 if torch.rand(()) < 0.5 else 3):
            x = torch.tanh(self.fc(x))
        return self.head(x)


class Sometimes(nn.Module):
    """Uses a weight beside its layer once a record's first number is above 3."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)
        self.how, self.kept = how, [self.fc.weight]

    def forward(self, x):
        out = self.fc(x)
        if bool((x[:, 0] > 3).any()):
            weight = {
                "attribute": lambda: self.fc.weight,
                "list": lambda: self.kept[0],
                "parameters": lambda: next(self.parameters()),
                "dictionary": lambda: self.fc._parameters["weight"],
            }[self.how]()
            out = out + torch.where(x[:, :1] > 3, x.square() @ weight.T, 0)
        return out


def sums_and_records(network, x, clipping="layer", seed=3, mask=None):
    """Clipped sums of the project and of the definition, by name, and the largest relative move."""
    torch.manual_seed(0)
    y = torch.arange(len(x)) % 3
    trained = {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}
    layout = Layout.build(trained, dict.fromkeys(trained, "all") if clipping == "flat" else None)
    run = clipped_sums(
        network, cross_entropy, layout, p=2, vectorize=False, max_examples=64, example=x[:1],
        clipping=clipping,
    )  # fmt: skip
    clips = torch.full((1, layout.num_layers), CLIP, dtype=torch.float64)
    shares = torch.full_like(clips, 1 / layout.num_layers)
    policy = LayerPolicy(clips, shares, shares, 0 * clips)
    held = (torch.ones(len(x)) if mask is None else mask)[None]
    batch = Batch(x[None], y[None], held, torch.ones(1), torch.ones(1).bool())
    torch.manual_seed(seed)
    sums, _ = run(trained, True, batch, policy)
    expected = {n: torch.zeros_like(v) for n, v in trained.items()}
    for i in range(len(x)):
        loss = cross_entropy(network(x[i : i + 1]), y[i : i + 1]).sum()
        leaves = [dict(network.named_parameters())[n] for n in layout.names]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        norms = torch.zeros(layout.num_layers)
        for g, layer in zip(grads, layout.layer_of, strict=True):
            norms[layer] += g.square().sum()
        for n, g, layer in zip(layout.names, grads, layout.layer_of, strict=True):
            expected[n] += g * min(1.0, CLIP / float(norms[layer].sqrt()))
    return run, {n: v[0] for n, v in sums.items()}, expected


def close(sums, expected):
    for n in expected:
        torch.testing.assert_close(sums[n].float(), expected[n], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clipping", ["layer", "flat"])
def test_a_net_that_runs_to_the_longest_record_is_clipped_by_records(clipping, caplog):
    caplog.set_level(logging.INFO, "pytorch_lightning")
    x = torch.full((4, 32), -1.0)
    x[0, :1], x[1, :32], x[2, :7], x[3, :2] = 0.3, torch.linspace(0, 1, 32), 0.9, 0.1
    run, sums, expected = sums_and_records(Elman(), x, clipping)
    fast = clip_in_backward_sums if clipping == "layer" else flat_sums
    assert run.__qualname__.startswith(fast.__name__)
    close(sums, expected)
    (line,) = [r.message for r in caplog.records if "per-sample" in r.message]
    assert "step is used more than once" in line
    assert line.startswith("private, not released: ")


def test_short_records_are_clipped_in_backward(caplog):
    caplog.set_level(logging.INFO, "pytorch_lightning")
    x = torch.full((4, 32), -1.0)
    x[:, 0] = torch.linspace(0.1, 0.9, 4)
    _, sums, expected = sums_and_records(Elman(), x)
    close(sums, expected)
    assert not caplog.records


def test_a_shared_layer_of_random_depth_never_moves_by_more_than_its_clip_norm():
    torch.manual_seed(0)
    network, x = RandomDepth(), torch.randn(1, 8) * 4
    depths = set()
    for seed in range(12):
        torch.manual_seed(seed)
        depths.add(bool(torch.rand(()) < 0.5))
        _, sums, _ = sums_and_records(network, x, seed=seed)
        for layer in ("fc", "head"):
            own = torch.cat([v.flatten() for n, v in sums.items() if n.startswith(layer)])
            assert float(own.double().norm()) <= CLIP * (1 + 1e-6)
    assert depths == {True, False}


@pytest.mark.parametrize("clipping", ["layer", "flat", "joint"])
@pytest.mark.parametrize("how", ["attribute", "parameters", "dictionary"])
def test_a_parameter_beside_its_layer_is_seen_in_whichever_forward_it_is_used(clipping, how):
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    x[:, 0] = torch.tensor([0.0, 5.0, 1.0, 9.0, 2.0])
    _, sums, expected = sums_and_records(Sometimes(how), x, clipping)
    if clipping == "joint":
        assert all(bool((v != 0).any()) for v in sums.values())
    else:
        close(sums, expected)


def test_a_parameter_that_a_list_holds_gets_no_gradient_but_its_layers():
    """Nothing can put the current values into the list: the use is private, if not exact."""
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    x[:, 0] = 9.0
    _, sums, _ = sums_and_records(Sometimes("list"), x)
    assert float(torch.cat([v.flatten() for v in sums.values()]).norm()) <= 5 * CLIP


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(checkpoint(lambda z: torch.tanh(self.a(z)), x, use_reentrant=False))


@pytest.mark.parametrize("clipping", ["layer", "flat"])
def test_activations_that_are_computed_again_in_backward(clipping):
    torch.manual_seed(0)
    run, sums, expected = sums_and_records(Checkpointed(), torch.randn(6, 8), clipping)
    fast = clip_in_backward_sums if clipping == "layer" else flat_sums
    assert run.__qualname__.startswith(fast.__name__)
    close(sums, expected)


@pytest.mark.parametrize("clipping", ["layer", "flat", "joint"])
def test_a_record_that_changes_the_way_of_its_batch_moves_nobody_else(clipping):
    """The others' clip factors are those of one pass: not 1e-6 more for each of them."""
    torch.manual_seed(0)
    network = Elman()
    x = torch.full((40, 3), -1.0)
    x[:, 0] = torch.linspace(0.5, 1.0, 40)
    mask = torch.ones(40)
    mask[-1] = 0  # counts in no sum, but makes the forward longer
    _, short, _ = sums_and_records(network, x, clipping, mask=mask)
    x[-1] = torch.tensor([0.9, 0.3, 0.7])
    _, beside_long, _ = sums_and_records(network, x, clipping, mask=mask)
    for name, value in short.items():
        gap = (beside_long[name].double() - value.double()).norm() / value.double().norm()
        assert 0 < float(gap) < 3e-7
