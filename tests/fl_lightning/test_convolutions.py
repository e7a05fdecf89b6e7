"""Convolutions of many clients at once, against one convolution a client; recorded gradients."""

import random

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from fl_lightning.local.batches import Batch
from fl_lightning.local.gradient import CohortGradient
from fl_lightning.local.recording import MOST, SEEN_BEFORE, Recorded, can_record
from fl_lightning.models import CNN, MLP
from fl_lightning.module import cross_entropy
from fl_lightning.networks import convolutions
from fl_lightning.networks.convolutions import CohortConvolutions

CLIENTS = 3


def convolve(weight, bias, x, factor, options):
    out = nn.functional.conv2d(x, weight, bias, **options)
    return (out.sin() * factor).sum()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("channels", "size", "kernel", "options"),
    [
        (1, (9, 9), (6, 6), {"stride": 2, "padding": 2}),
        (5, (8, 7), (3, 2), {"stride": (2, 1), "padding": (1, 0)}),
        (4, (6, 6), (1, 1), {}),
        (2, (9, 9), (3, 3), {"dilation": 2, "padding": (2,)}),
        (4, (6, 6), (3, 3), {"groups": 2}),
        (3, (6, 6), (3, 3), {"padding": "same"}),
    ],
)
def test_gradients_equal_those_of_each_client(channels, size, kernel, options, with_bias, shared):
    torch.manual_seed(0)
    groups = options.get("groups", 1)
    lead = () if shared else (CLIENTS,)
    weight = torch.randn(*lead, 6, channels // groups, *kernel)
    bias = torch.randn(*lead, 6) if with_bias else None
    x, factor = torch.randn(CLIENTS, 4, channels, *size), torch.randn(CLIENTS)
    wanted = (0, 1, 2) if with_bias else (0, 2)
    gradient = grad(convolve, argnums=wanted)
    own = None if shared else 0
    mapped = vmap(gradient, in_dims=(own, own if with_bias else None, 0, 0, None))
    with CohortConvolutions():
        got = mapped(weight, bias, x, factor, options)
    for k in range(CLIENTS):
        parts = [t if shared or t is None else t[k] for t in (weight, bias)]
        for have, want in zip(got, gradient(*parts, x[k], factor[k], options), strict=True):
            torch.testing.assert_close(have[k], want, rtol=1e-4, atol=1e-4)


def test_outside_vmap_and_without_gradients_nothing_changes():
    x, layer = torch.randn(2, 3, 8, 8), nn.Conv2d(3, 4, 3)
    with CohortConvolutions():
        torch.testing.assert_close(layer(x), layer(x.double().float()), rtol=0, atol=0)
        got = vmap(lambda row: nn.functional.conv2d(row, layer.weight, layer.bias))(x[:, None])
        layer(x).sum().backward()
    torch.testing.assert_close(got[:, 0], layer(x), rtol=1e-5, atol=1e-5)
    (want,) = torch.autograd.grad(layer(x).sum(), [layer.weight])
    torch.testing.assert_close(layer.weight.grad, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("affine", [True, False])
def test_group_normalisation_behind_a_convolution_is_vmapped(affine):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4, affine=affine), nn.Flatten())
    x = torch.randn(CLIENTS, 5, 2, 6, 6)
    params = {n: torch.randn(CLIENTS, *p.shape) for n, p in network.named_parameters()}

    def total(params, x):
        return functional_call(network, params, (x,)).sin().square().sum()

    with CohortConvolutions():
        got = vmap(grad(total))(params, x)
    for k in range(CLIENTS):
        want = grad(total)({n: p[k] for n, p in params.items()}, x[k])
        for name in params:
            torch.testing.assert_close(got[name][k], want[name], rtol=1e-4, atol=1e-4)


def test_activations_stay_in_the_memory_that_the_next_convolution_wants():
    weights = [torch.randn(CLIENTS, 6, 6, 3, 3) for _ in range(2)]

    def two(first, second, x):
        x = nn.functional.conv2d(nn.functional.conv2d(x, first, padding=1).tanh(), second)
        return x

    with CohortConvolutions():
        out = vmap(two)(*weights, torch.randn(CLIENTS, 4, 6, 8, 8))
    # Clients and channels innermost: what a copy for each layer would not leave behind.
    assert out.stride()[0] == 6
    assert out.stride()[2] == 1


def cohort(width=5, size=8, clients=CLIENTS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(clients, width, 1, size, size, generator=generator),
        torch.randint(10, (clients, width), generator=generator),
        torch.ones(clients, width),
        torch.full((clients,), float(width)),
        torch.ones(clients, dtype=torch.bool),
    )


def stacked(network):
    return {
        n: torch.stack([p.detach() * (1 + k / 7) for k in range(CLIENTS)])
        for n, p in network.named_parameters()
    }


NETWORKS = [
    MLP(),
    CNN(channels=[4, 6], kernel_sizes=[4, 4], strides=[2, 2]),
    nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 10)),
]


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_replays_have_the_bits_of_the_function(network):
    plain = CohortGradient(network, cross_entropy, vectorize=True)
    recorded = CohortGradient(network, cross_entropy, vectorize=True, record=True)
    params = stacked(network)
    for turn in range(SEEN_BEFORE + 4):
        batch = cohort(seed=turn)
        results = []
        for gradient in (plain, recorded):
            torch.manual_seed(turn)
            results.append(
                (gradient(params, batch, shared=False, weight=1 / batch.divisor)[0], torch.rand(1))
            )
        (want, after), (have, same_after) = results
        assert torch.equal(after, same_after)  # random numbers were used up alike
        assert all(torch.equal(want[n], have[n]) for n in want)
    (function,) = recorded._recorded.values()
    (replay,) = function._replays.values()
    assert isinstance(replay, torch.fx.GraphModule)


@torch.no_grad()
def test_other_shapes_have_recordings_of_their_own_up_to_a_number():
    calls = []

    def double(x):
        calls.append(len(x))
        return [2 * x]

    function = Recorded(double)
    for _ in range(SEEN_BEFORE + 3):
        for width in range(1, MOST + 3):
            assert torch.equal(function(torch.ones(width))[0], 2 * torch.ones(width))
    assert len(function._replays) == MOST
    # Called as often as seen before, then to record and to compare; the last widths always.
    assert calls.count(1) == SEEN_BEFORE + 2
    assert calls.count(MOST + 2) == SEEN_BEFORE + 3


@torch.no_grad()
def test_a_recording_that_gives_other_bits_is_not_used():
    state = random.Random(0)
    function = Recorded(lambda x: [x * state.random()])
    found = [float(function(torch.ones(1))[0]) for _ in range(SEEN_BEFORE + 6)]
    assert len(set(found)) == len(found)


def test_only_networks_that_hold_all_they_depend_on_are_recorded():
    class Mine(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    assert can_record(CNN(), cross_entropy)
    assert can_record(nn.Sequential(nn.Linear(2, 2), nn.GELU()), nn.CrossEntropyLoss())
    assert not can_record(nn.Sequential(Mine(2, 2)), cross_entropy)
    assert not can_record(MLP(), lambda outputs, labels: outputs.sum(1))
    assert not can_record(nn.BatchNorm1d(3, affine=False), cross_entropy)
    frozen = MLP()
    next(iter(frozen.parameters())).requires_grad_(False)
    assert not can_record(frozen, cross_entropy)
    hooked = MLP()
    hooked.register_forward_hook(lambda *_: None)
    assert not can_record(hooked, cross_entropy)


@pytest.mark.parametrize("stride", [2, (2, 1), 3])
@pytest.mark.parametrize("clients", [1, 3])
def test_kernels_of_one_pixel_never_reach_torch_with_a_stride(clients, stride, monkeypatch):
    """torch 2.13's backward of these writes past its memory in channels_last."""
    seen = []
    backward = convolutions._gradients

    def noted(g, x, weight, stride, *rest):
        seen.append((tuple(weight.shape[2:]), stride))
        return backward(g, x, weight, stride, *rest)

    monkeypatch.setattr(convolutions, "_gradients", noted)
    torch.manual_seed(0)
    x, weight = torch.randn(clients, 6, 4, 8, 8), torch.randn(clients, 8, 4, 1, 1)

    def loss(weight, x):
        return torch.conv2d(x, weight, None, stride).square().sum()

    with CohortConvolutions():
        found = vmap(grad(loss))(weight, x)
    assert seen == [((1, 1), (1, 1))]
    for k in range(clients):
        torch.testing.assert_close(found[k], grad(loss)(weight[k], x[k]), rtol=1e-4, atol=1e-4)
