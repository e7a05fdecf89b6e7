"""One norm over all layers: clipping of whole records."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import nn

from aadp_kernels import Layout
from fl_lightning import PrivacyConfig
from fl_lightning.local.batches import Batch
from fl_lightning.module import cross_entropy
from fl_lightning.privacy.clipping import joint_sample_sums, per_sample_sums
from fl_lightning.privacy.one_factor import AUTOMATIC_GAMMA, flat_sums, layer_units
from fl_lightning.values.round import LayerPolicy
from tests.fl_lightning.flat_networks import (
    by_layer,
    flat_layout,
    make_network,
    parameters,
    records_of,
    some_batch,
)

NAN = float("nan")


def policy_of(clip: float, votes_at: float | None = None, clients: int = 2) -> LayerPolicy:
    column = torch.ones(clients, 1, dtype=torch.float64)
    at = None if votes_at is None else votes_at * column
    return LayerPolicy(clip * column, column, column, 0 * column, at)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_sums_and_counts_are_those_of_per_sample_gradients(p, shared):
    network, batch = make_network(), some_batch()
    layout = flat_layout(network)
    params = parameters(network)
    if not shared:
        params = {n: torch.stack([v, 1.5 * v]) for n, v in params.items()}
    # Between the records' norms, so that some are clipped and some are not.
    clip, votes_at = (45.0, 45.0) if p == 1 else (1.8, 45.0)
    fast = flat_sums(network, cross_entropy, layout, example=torch.zeros(1, 8), p=p)
    slow = per_sample_sums(network, cross_entropy, layout, p=p, vectorize=True, max_examples=100)
    (sums, counts), (expected, known) = (
        run(params, shared, batch, policy_of(clip, votes_at)) for run in (fast, slow)
    )
    assert 0 < float(counts[..., 1].sum()) < 12, "the test needs both kinds"
    torch.testing.assert_close(counts, known)
    for name in sums:
        torch.testing.assert_close(sums[name], expected[name].float(), rtol=2e-5, atol=2e-6)


def joint_policy(mechanism: str, scale: float = 1.0, votes_at: float | None = None) -> LayerPolicy:
    """Unequal clip norms and shares for two clients and three layers."""
    clip = scale * torch.tensor([[2.0, 0.5, 1.0], [1.0, 1.0, 3.0]], dtype=torch.float64)
    shares = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]], dtype=torch.float64)
    at = None if votes_at is None else torch.full_like(clip, votes_at)
    return LayerPolicy(clip, shares, shares, 0 * clip, at)


@pytest.mark.parametrize(("mechanism", "p"), [("gaussian", 2), ("gaussian", 1), ("laplace", 1)])
@pytest.mark.parametrize("dense", [True, False])
def test_joint_clipping_scales_whole_records_by_the_norm_of_the_noise(mechanism, p, dense):
    network, batch = make_network(), some_batch()
    layout = Layout.build(dict(network.named_parameters()))
    policy = joint_policy(mechanism, 1.5 if p == 2 else 25.0, votes_at=9.0)
    if dense:
        run = flat_sums(
            network,
            cross_entropy,
            layout,
            example=torch.zeros(1, 8),
            p=p,
            clipping="joint",
            mechanism=mechanism,
        )
    else:
        run = joint_sample_sums(
            network, cross_entropy, layout, p=p, mechanism=mechanism, vectorize=True, max_examples=3
        )
    sums, counts = run(parameters(network), True, batch, policy)
    some = []
    for k in range(2):
        total = {n: torch.zeros_like(v) for n, v in records_of(network, batch, k)[0].items()}
        votes, clipped = torch.zeros(3), 0
        for record in records_of(network, batch, k):
            # By hand: sigma_l = z C_l / sqrt(pi_l), so the norm in units of sigma / z is N.
            part = policy.shares[k].sqrt() if mechanism == "gaussian" else policy.shares[k]
            units = by_layer(record, layout, p) * part / policy.clip_norm[k]
            size = float(units.norm() if mechanism == "gaussian" else units.sum())
            clipped += size > 1
            some.append(size > 1)
            votes += (by_layer(record, layout, 1) <= 9.0).float() - 0.5
            for n in total:
                total[n] += record[n] * min(1.0, 1 / size)
        assert counts[k].tolist() == [[float(v), clipped, 0] for v in votes]
        for n in total:
            torch.testing.assert_close(sums[n][k].double(), total[n], rtol=2e-5, atol=2e-6)
    assert 0 < sum(some) < len(some), "the test needs both kinds"


@pytest.mark.parametrize(("mechanism", "p"), [("gaussian", 2), ("laplace", 1)])
def test_joint_clipping_holds_every_record_and_what_layers_would_hold(mechanism, p):
    """A record's part is in the bound that the noise is for; what lies in the box is left alone."""
    network, whole = make_network(), some_batch(2, 1)
    whole.mask[:] = 1
    layout = Layout.build(dict(network.named_parameters()))
    run = flat_sums(
        network,
        cross_entropy,
        layout,
        example=torch.zeros(1, 8),
        p=p,
        clipping="joint",
        mechanism=mechanism,
    )
    plain = records_of(network, whole, 0)[0]
    norms = by_layer(plain, layout, p)
    for scale in (1e-3, 0.1, 1.0):
        policy = joint_policy(mechanism, scale)
        sums, _ = run(parameters(network), True, whole, policy)
        held = by_layer({n: v[0].double() for n, v in sums.items()}, layout, p)
        units = held / layer_units(policy, "joint", mechanism)[0]
        size = float(units.norm() if mechanism == "gaussian" else units.sum())
        assert size <= 1
        assert size > 0.999
    policy = joint_policy(mechanism)
    policy.clip_norm[0] = 1.001 * norms
    sums, counts = run(parameters(network), True, whole, policy)
    assert float(counts[0, :, 1].sum()) == 0
    for n, v in plain.items():
        torch.testing.assert_close(sums[n][0].double(), v, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_joint_clipping_drops_records_that_are_not_finite(bad, dense):
    network, batch = make_network(), some_batch()
    layout = Layout.build(dict(network.named_parameters()))
    options = {"p": 2, "mechanism": "gaussian"}
    if dense:
        run = flat_sums(
            network, cross_entropy, layout, example=torch.zeros(1, 8), clipping="joint", **options
        )
    else:
        run = joint_sample_sums(
            network, cross_entropy, layout, vectorize=False, max_examples=4, **options
        )
    without = Batch(batch.x, batch.y, batch.mask.clone(), batch.divisor, batch.active)
    without.mask[1, 3] = 0
    policy = joint_policy("gaussian", votes_at=12.0)
    expected, known = run(parameters(network), True, without, policy)
    batch.x[1, 3, 0] = bad
    sums, counts = run(parameters(network), True, batch, policy)
    assert counts[:, :, 2].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert torch.equal(counts[..., :2], known[..., :2])
    for name in sums:
        torch.testing.assert_close(sums[name], expected[name])


def test_joint_clipping_has_the_noise_of_clipping_by_layer(federation, population, global_params):
    network, data = make_network(), federation(72, clients=6)
    everyone, params = torch.arange(6), global_params(network)
    policies, released = {}, {}
    for clipping in ("layer", "joint"):
        for z in (0.0, 0.8):
            config = PrivacyConfig(
                clipping=clipping, thresholds="fixed", clip_norm=[0.3, 0.1, 0.2],
                allocation="contribution", epsilon=None, noise_multiplier=z, seed=3,
            )  # fmt: skip
            clients = population(data, network, config)
            released[clipping, z] = clients.release(everyone, params, 0, "x")
            policies[clipping, z] = released[clipping, z].policy
    noise_scale = policies["joint", 0.8].noise_scale
    torch.testing.assert_close(noise_scale, policies["layer", 0.8].noise_scale)
    silent, noisy = released["joint", 0.0], released["joint", 0.8]
    layout = Layout.build(dict(network.named_parameters()))
    for name, layer in zip(layout.names, layout.layer_of, strict=True):
        part = 12 * (noisy.update[name] - silent.update[name]).double().flatten()
        if len(part) > 1000:
            scale = float(noise_scale[0, layer])
            assert stats.kstest(part.numpy() / scale, stats.norm.cdf).pvalue > 1e-3
            for factor in (2 / 3, 3 / 2):
                wrong = part.numpy() / (factor * scale)
                assert stats.kstest(wrong, stats.norm.cdf).pvalue < 1e-6
    assert noisy.events[0].noise_multiplier == 0.8


def joint_norm(sums: dict, row: int = 0) -> float:
    return math.sqrt(sum(float(v[row].double().square().sum()) for v in sums.values()))


@pytest.mark.parametrize("automatic", [False, True])
def test_one_record_counts_for_the_clip_norm_and_not_more(automatic):
    network = make_network()
    run = flat_sums(
        network,
        cross_entropy,
        flat_layout(network),
        example=torch.zeros(1, 8),
        p=2,
        automatic=automatic,
    )
    whole = some_batch(1, 1)
    whole.mask[:] = 1

    def norm(clip: float, scale: float) -> float:
        batch = Batch(scale * whole.x, whole.y, whole.mask, whole.divisor, whole.active)
        return joint_norm(run(parameters(network), True, batch, policy_of(clip, clients=1))[0])

    unclipped = joint_norm(
        flat_sums(network, cross_entropy, flat_layout(network), example=torch.zeros(1, 8), p=2)(
            parameters(network), True, whole, policy_of(1e9, clients=1)
        )[0]
    )
    for clip in (0.05, 0.5):
        found = norm(clip, 1.0)
        expected = clip * unclipped / (unclipped + AUTOMATIC_GAMMA) if automatic else clip
        assert found <= clip
        assert found == pytest.approx(expected, rel=1e-5)
    big = norm(100 * unclipped, 1.0)
    expected = 100 * unclipped / (1 + AUTOMATIC_GAMMA / unclipped) if automatic else unclipped
    assert big == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("inputs", "slopes"), [(1e18, 1e-23), (1e-23, 1e18)])
def test_squares_that_float32_has_no_numbers_for_count_in_the_norm(inputs, slopes):
    network = nn.Sequential(nn.Linear(8, 3, bias=False))

    def loss(output, y):
        return slopes * output.sum(-1)

    x, one = torch.full((1, 1, 8), inputs), torch.ones(1, 1)
    batch = Batch(x, one.long(), one, torch.ones(1), torch.ones(1).bool())
    run = flat_sums(
        network, loss, flat_layout(network), example=torch.zeros(1, 8), p=2, automatic=False
    )
    norm = math.sqrt(24) * inputs * slopes
    for clip, expected in ((norm / 50, norm / 50), (50 * norm, norm)):
        sums, counts = run(parameters(network), True, batch, policy_of(clip, clients=1))
        assert joint_norm(sums) <= clip
        assert joint_norm(sums) == pytest.approx(expected, rel=1e-5)
        assert counts[0, 0, 1:].tolist() == [float(norm > clip), 0]


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_record_that_is_not_finite_contributes_nothing(bad):
    network, batch = make_network(), some_batch()
    run = flat_sums(network, cross_entropy, flat_layout(network), example=torch.zeros(1, 8), p=2)
    without = Batch(batch.x, batch.y, batch.mask.clone(), batch.divisor, batch.active)
    without.mask[1, 3] = 0
    expected, _ = run(parameters(network), True, without, policy_of(1.0, 12.0))
    batch.x[1, 3, 0] = bad
    sums, counts = run(parameters(network), True, batch, policy_of(1.0, 12.0))
    assert counts[:, 0, 2].tolist() == [0, 1]
    for name in sums:
        torch.testing.assert_close(sums[name], expected[name])
