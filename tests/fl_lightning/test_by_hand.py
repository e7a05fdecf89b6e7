"""With noise and clipping every step is hand-written DP-SGD, whatever way computes it."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from aadp_kernels import Layout, NoiseKey, sample_noise
from fl_lightning import PrivacyConfig
from fl_lightning.local.batches import gather
from fl_lightning.local.training import train_cohort
from fl_lightning.module import cross_entropy
from fl_lightning.privacy.clipping import clip_in_backward_sums, clipped_sums, per_sample_sums
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.privacy.mechanism import PrivateRecordGradient
from fl_lightning.values.round import LayerPolicy
from tests.fl_lightning.small_networks import Normalised, build, cnn, mlp

CPU = torch.device("cpu")


class Foreign(Normalised):
    """A network for which clipping in backward is not made."""

    def __init__(self):
        super().__init__()
        self.act = nn.PReLU()

    def forward(self, x):
        return self.act(super().forward(x))


def params_of(network):
    return {name: p.detach().clone() for name, p in network.named_parameters()}


# One step, by hand -------------------------------------------------------------------------------


def record_gradients(network, x, y):
    """Gradient of each record, float64, one backward a record: {name: [B, ...]}."""
    network = copy.deepcopy(network).double()
    rows = []
    for i in range(len(x)):
        loss = cross_entropy(network(x[i : i + 1].double()), y[i : i + 1]).sum()
        rows.append(torch.autograd.grad(loss, list(network.parameters())))
    names = [name for name, _ in network.named_parameters()]
    return {
        n: torch.stack(column) for n, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def layers_of(network):
    grouped = {}
    for name, _ in network.named_parameters():
        grouped.setdefault(name.rpartition(".")[0], []).append(name)
    return list(grouped.values())


def flat_layer(grads, names):
    return torch.cat([grads[n].flatten(1) for n in names], 1)


def hand_clipped_sum(network, x, y, clip, p):
    """(clipped sums, clipped count [L], L1 norms [B, L])."""
    grads = record_gradients(network, x, y)
    sums, clipped, l1 = {}, [], []
    for names, c in zip(layers_of(network), clip, strict=True):
        norm = flat_layer(grads, names).norm(p=p, dim=1)
        factor = (c / norm).clamp(max=1)
        clipped.append(int((factor < 1).sum()))
        l1.append(flat_layer(grads, names).abs().sum(1))
        for name in names:
            sums[name] = torch.einsum("b,b...->...", factor, grads[name])
    return sums, clipped, torch.stack(l1, 1)


def median_clips(network, x, y, p):
    grads = record_gradients(network, x, y)
    # A little above the median record, which would be clipped or not by rounding.
    return [
        1.001 * float(flat_layer(grads, n).norm(p=p, dim=1).median()) for n in layers_of(network)
    ]


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize("make", [mlp, cnn, Normalised])
def test_one_step_is_hand_written_dp_sgd(federation, fit, make, mechanism):
    data = federation(30, shape=(1, 8, 8), clients=1)
    network, p = build(make), 1 if mechanism == "laplace" else 2
    clip = median_clips(network, data.x, data.y, p)
    sums, clipped, _ = hand_clipped_sum(network, data.x, data.y, clip, p)
    assert all(0 < c < 30 for c in clipped)
    module = fit(
        data,
        copy.deepcopy(network),
        rounds=1,
        module_kwargs={"sampling_rate": 1.0, "client_lr": 0.5},
        mechanism=mechanism,
        noise_multiplier=0.0,
        clip_norm=clip,
        thresholds="fixed",
    )
    trained = dict(module.network.named_parameters())
    for name, start in network.named_parameters():
        want = start.double() - 0.5 * sums[name] / 30
        torch.testing.assert_close(trained[name].double(), want, rtol=1e-4, atol=1e-6)
    assert module.result.clipped_fraction[0].tolist() == pytest.approx([c / 30 for c in clipped])


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize("execution", ["vmap", "loop"])
def test_one_noised_round_is_hand_written_dp_sgd(
    federation, fit, monkeypatch, mechanism, execution
):
    """A whole run of one client and one step: clip each record, add noise of z·C/√π, divide."""
    drawn = {}

    def listen(*args, **kwargs):
        noise = sample_noise(*args, **kwargs)
        drawn[kwargs["layer"], kwargs["offset"]] = float(kwargs["scale"].max()), noise
        return noise

    monkeypatch.setattr("fl_lightning.privacy.mechanism.sample_noise", listen)
    data = federation(30, shape=(1, 8, 8), clients=1)
    network, p, z = build(cnn), 1 if mechanism == "laplace" else 2, 0.8
    clip = median_clips(network, data.x, data.y, p)
    sums, _, _ = hand_clipped_sum(network, data.x, data.y, clip, p)
    module = fit(
        data, copy.deepcopy(network), rounds=1, mechanism=mechanism, noise_multiplier=z,
        clip_norm=clip, thresholds="fixed", allocation="uniform",
        module_kwargs={"sampling_rate": 1.0, "client_lr": 0.5, "execution": execution},
    )  # fmt: skip
    layout, trained = module.layout, dict(module.network.named_parameters())
    for name, layer, offset in zip(layout.names, layout.layer_of, layout.offsets, strict=True):
        scale, noise = drawn[layer, offset]
        assert scale == pytest.approx(z * clip[layer] * (2 if p == 1 else math.sqrt(2)))
        assert noise.all()
        start = dict(network.named_parameters())[name].double()
        want = start - 0.5 * (sums[name] + noise[0]) / 30
        torch.testing.assert_close(trained[name].double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_two_noised_steps_with_votes_are_hand_written(federation, mechanism, monkeypatch):
    """Clip, sum, noise, votes, and the clip norms that the votes give to the next step."""
    keys = {}

    def listen(*args, **kwargs):
        key = kwargs["key"]  # an equal one may draw the same noise once more
        keys[kwargs["step"], kwargs["layer"]] = NoiseKey.from_bytes(key._secret, key.rng)
        return sample_noise(*args, **kwargs)

    monkeypatch.setattr("fl_lightning.privacy.mechanism.sample_noise", listen)
    data = federation(24, shape=(1, 8, 8), clients=1)
    network, p = build(cnn), 1 if mechanism == "laplace" else 2
    layout = Layout.build(params_of(network))
    dims, z, lr, rho, eta = torch.tensor(layout.dims), 0.7, 0.1, 0.05, 0.2
    config = PrivacyConfig(
        mechanism=mechanism,
        epsilon=None,
        noise_multiplier=z,
        thresholds="quantile",
        clip_norm=median_clips(network, data.x, data.y, p),
        seed=0,
    )
    history = ReleasedHistory(config, 3, layout.dims)
    client = torch.tensor([2])
    hook = PrivateRecordGradient(
        clipped_sums(
            network, cross_entropy, layout,
            p=p, vectorize=True, max_examples=10**6, example=data.x[:1],
        ),
        history, layout, key=NoiseKey.from_seed(9), clients=client,
        multiplier=torch.tensor([z]).double(),
    )  # fmt: skip
    batch = gather(
        data.x, data.y, [np.arange(20)], divisor=torch.tensor([17.0]), device=CPU
    )  # the expected batch need not be the realised one
    update = train_cohort(params_of(network), iter([batch] * 2), hook, lr=lr)

    local, clip = copy.deepcopy(network).double(), torch.tensor(config.clip_norm).double()
    root = (math.pi / 2 / dims.double()).sqrt() if p == 2 else torch.ones(2).double()
    tracked = clip / root
    for step in range(2):
        clip = tracked * root
        s = tracked / tracked.sum()
        size = (s * dims) ** (1 / 2 if p == 2 else 1 / 3)
        shares = 0.9 * size / size.sum() + 0.1 / 2
        if p == 2:
            sigma = z / math.sqrt(1 - rho) * clip / shares.sqrt()
            vote_scale = z * math.sqrt(2) / (2 * math.sqrt(rho))
        else:
            sigma = z / (1 - rho) * clip / shares
            vote_scale = 2 * z / (2 * rho)
        draw = {"mechanism": mechanism, "step": step, "client": 2, "dtype": torch.float64}
        sums, _, l1 = hand_clipped_sum(local, data.x[:20], data.y[:20], clip.tolist(), p)
        for name, layer, offset in zip(layout.names, layout.layer_of, layout.offsets, strict=True):
            noise = sample_noise(
                sums[name].shape, scale=float(sigma[layer]), layer=layer, offset=offset,
                key=keys[step, layer], **draw,
            )  # fmt: skip
            parameter = dict(local.named_parameters())[name]
            parameter.data -= lr * (sums[name] + noise) / 17
        votes = torch.where(l1 <= tracked, 0.5, -0.5).sum(0)
        noise = sample_noise((2,), scale=vote_scale, layer=2, key=keys[step, 2], **draw)
        fraction = ((votes + noise) / 17 + 0.5).clamp(0, 1)
        tracked = tracked * torch.exp(-eta * (fraction - 0.5))
    assert keys.keys() == {(step, layer) for step in range(2) for layer in range(3)}
    torch.testing.assert_close(history.l1_norm[2], tracked, rtol=1e-6, atol=0)
    for name, value in local.named_parameters():
        want = value.detach() - dict(network.named_parameters())[name].detach().double()
        torch.testing.assert_close(update[name][0].double(), want, rtol=1e-3, atol=1e-5)
    assert torch.equal(history.l1_norm[:2], history.initial_l1_norm.repeat(2, 1))


# Ways to compute the same clipped sums -----------------------------------------------------------


def padded_batch(data, counts=(9, 1, 5)):
    rows = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    batch = gather(data.x, data.y, rows, divisor=torch.ones(len(counts)), device=CPU)
    # Whatever stands in padding must neither count nor vote.
    batch.x[batch.mask == 0] = 5.0
    return batch


def policy_for(network, data, p, k=3):
    clip = torch.tensor(median_clips(network, data.x, data.y, p), dtype=torch.float64)
    grads = record_gradients(network, data.x, data.y)
    l1 = [float(flat_layer(grads, n).abs().sum(1).median()) for n in layers_of(network)]
    votes_at = torch.tensor(l1, dtype=torch.float64) * 1.001
    factor = torch.tensor([1.0, 0.6, 1.7], dtype=torch.float64)[:k, None]
    clip, votes_at = clip * factor, votes_at * factor
    ones = torch.ones_like(clip)
    return LayerPolicy(clip, ones / len(l1), ones / len(l1), 0 * ones, votes_at, ones[:, 0])


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("max_examples", [10**6, 4, 1])
@pytest.mark.parametrize("way", ["backward", "per_sample"])
@pytest.mark.parametrize("shared", [True, False])
def test_all_ways_to_clip_agree_with_the_hand(federation, p, vectorize, max_examples, way, shared):
    data = federation(15, shape=(1, 8, 8), clients=1)
    network = build(cnn)
    layout = Layout.build(params_of(network))
    policy, batch = policy_for(network, data, p), padded_batch(data)
    options = {"p": p, "vectorize": vectorize, "max_examples": max_examples}
    if way == "backward":
        run = clipped_sums(network, cross_entropy, layout, example=data.x[:1], **options)
        assert run.__qualname__.startswith(clip_in_backward_sums.__name__)
    else:
        run = per_sample_sums(network, cross_entropy, layout, **options)
    params = params_of(network)
    if not shared:
        params = {n: v.expand(3, *v.shape).clone() for n, v in params.items()}
    sums, counts = run(params, shared, batch, policy)
    start = 0
    for k, size in enumerate((9, 1, 5)):
        rows = slice(start, start + size)
        want, clipped, l1 = hand_clipped_sum(
            network, data.x[rows], data.y[rows], policy.clip_norm[k].tolist(), p
        )
        for name, value in want.items():
            torch.testing.assert_close(sums[name][k].double(), value, rtol=1e-4, atol=2e-5)
        votes = torch.where(l1 <= policy.votes_at[k], 0.5, -0.5).sum(0)
        assert counts[k, :, 0].tolist() == votes.tolist()
        assert counts[k, :, 1].tolist() == clipped
        assert not counts[k, :, 2].any()
        start += size


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(
    ("make", "way"), [(Normalised, clip_in_backward_sums), (Foreign, per_sample_sums)]
)
def test_other_networks_fall_back_to_per_sample_gradients(federation, make, way, vectorize):
    data = federation(15, shape=(1, 8, 8), clients=1)
    network = build(make)
    layout = Layout.build(params_of(network))
    run = clipped_sums(
        network, cross_entropy, layout,
        p=2, vectorize=vectorize, max_examples=4, example=data.x[:1],
    )  # fmt: skip
    assert run.__qualname__.startswith(way.__name__)
    policy = policy_for(network, data, 2)
    sums, _ = run(params_of(network), True, padded_batch(data), policy)
    want, clipped, _ = hand_clipped_sum(
        network, data.x[:9], data.y[:9], policy.clip_norm[0].tolist(), 2
    )
    assert any(clipped)
    for name, value in want.items():
        torch.testing.assert_close(sums[name][0].double(), value, rtol=1e-4, atol=1e-6)


def test_coins_do_not_depend_on_vmap_or_micro_batches(federation, population, global_params):
    """One client key, three ways to compute: the same Poisson batches, up to float sums."""
    data = federation(40, shape=(1, 8, 8), clients=2)
    config = PrivacyConfig(epsilon=None, noise_multiplier=0.0, seed=4)
    updates = []
    for kwargs in ({}, {"vectorize": False}, {"max_examples": 3}):
        network = build(cnn)
        clients = population(data, network, config, sampling_rate=0.5, local_steps=2, **kwargs)
        updates.append(clients.release(torch.arange(2), global_params(network), 0, "x").update)
    for other in updates[1:]:
        for name, value in updates[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)
