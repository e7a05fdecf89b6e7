"""Clip norms and shares: optimal where they claim it, and functions of releases alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_lightning import PrivacyConfig
from fl_lightning.models import MLP
from fl_lightning.privacy.allocation import division_ratio, layer_shares
from fl_lightning.privacy.contribution import MIN_CONTRIBUTION, contribution
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.privacy.thresholds import (
    MAX_CHANGE,
    clip_norm_from_l1,
    estimate_l1_norm,
    initial_clip_norms,
    l1_from_clip_norm,
    quantile_step,
    released_clip_norms,
)

RULES = ("uniform", "abstract", "mse", "contribution", "snr")
DIMS = torch.tensor([4000.0, 64.0, 650.0], dtype=torch.float64)
CLIP = torch.tensor([0.7, 2.0, 0.1], dtype=torch.float64)
PART = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
MECHANISMS = ("gaussian", "laplace")


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def shares(rule, mechanism="gaussian", floor=0.1, part=PART, clip=CLIP, dims=DIMS):
    return layer_shares(
        rule, contribution=part, clip_norm=clip, dims=dims, mechanism=mechanism, floor=floor
    )


# Shares ------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rule=st.sampled_from(RULES),
    mechanism=st.sampled_from(MECHANISMS),
    floor=st.floats(0.01, 1.0),
    sizes=st.lists(st.floats(0, 1e6), min_size=1, max_size=6),
)
def test_shares_sum_to_one_and_keep_the_floor(rule, mechanism, floor, sizes):
    count = len(sizes)
    got = shares(
        rule, mechanism, floor, contribution(tensor([sizes, sizes[::-1]])),
        clip=tensor([sizes, sizes]) + 1e-9, dims=torch.arange(1, count + 1).double(),
    )  # fmt: skip
    assert got.shape == (2, count)
    torch.testing.assert_close(got.sum(1), tensor([1.0, 1.0]), rtol=1e-9, atol=0)
    assert bool((got >= floor / count * (1 - 1e-12)).all())


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("rule", ["mse", "contribution"])
def test_shares_minimise_the_weighted_noise(rule, mechanism):
    weight = torch.ones(3).double() if rule == "mse" else PART / CLIP.square()
    power = 1 if mechanism == "gaussian" else 2

    def energy(pi):
        return float((weight * DIMS * CLIP.square() / pi.pow(power)).sum())

    best = shares(rule, mechanism, floor=0.0)
    rng = np.random.default_rng(0)
    for _ in range(200):
        step = torch.from_numpy(rng.normal(size=3)) * 10 ** rng.uniform(-3, -1)
        other = (best * step.exp()) / (best * step.exp()).sum()
        assert energy(other) > energy(best)
    others = [r for r in RULES if r != rule]
    assert all(energy(best) < energy(shares(r, mechanism, floor=0.0)) for r in others)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_snr_shares_give_every_layer_the_same_signal_to_noise(mechanism):
    pi = shares("snr", mechanism, floor=0.0)
    noise = CLIP / (pi.sqrt() if mechanism == "gaussian" else pi)
    ratio = (PART.square() / DIMS) / (DIMS * noise.square())
    torch.testing.assert_close(ratio, ratio[:1].expand(3), rtol=1e-9, atol=0)


def test_the_division_ratio_is_that_of_the_energies():
    """Against the noise that a best division and one clip norm for all really have."""
    l1 = tensor([[3.0, 8.0, 0.5], [1.0, 1.0, 1.0]])
    norms = l1 / DIMS.sqrt()
    for row, ratio in zip(norms, division_ratio(l1, DIMS), strict=True):
        # C_l = n_l and π_l by mse: Σ d·σ² for z = 1.
        divided = (DIMS * row.square() / shares("mse", floor=0.0, clip=row)).sum()
        flat = DIMS.sum() * row.square().sum()
        torch.testing.assert_close(ratio, divided / flat)
        assert 0 < ratio < 1
    even = DIMS * 0.3  # the same norm per coordinate
    torch.testing.assert_close(division_ratio(even, DIMS), tensor(1.0))
    assert division_ratio(torch.zeros(3).double(), DIMS).isnan()


def test_uniform_and_abstract_shares_and_the_mixture_with_the_floor():
    torch.testing.assert_close(shares("uniform"), torch.full((3,), 1 / 3).double())
    torch.testing.assert_close(shares("abstract", floor=0.0), PART)
    torch.testing.assert_close(shares("abstract", floor=0.4), 0.6 * PART + 0.4 / 3)


def test_unknown_allocation_is_refused():
    with pytest.raises(ValueError, match="allocation='fair'"):
        shares("fair")


# Contribution ------------------------------------------------------------------------------------


def test_contribution_is_the_kindof_the_l1_norm():
    torch.testing.assert_close(contribution(tensor([[1.0, 3.0]])), tensor([[0.25, 0.75]]))


def test_contribution_of_nothing_is_even_and_a_zero_layer_keeps_a_minimum():
    got = contribution(tensor([[0.0, 0.0], [5.0, 0.0], [1e-300, 0.0]]))
    torch.testing.assert_close(got[0], tensor([0.5, 0.5]))
    assert bool((got >= MIN_CONTRIBUTION / 2).all())
    torch.testing.assert_close(got.sum(1), torch.ones(3).double())
    assert bool(
        (shares("contribution", floor=0.01, part=contribution(tensor([0.0, 1, 0]))) > 0).all()
    )


# Norms from releases -----------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("signal", [0.3, 1.0, 5.0])
def test_estimated_norms_invert_the_noise_of_alike_shapes(mechanism, signal):
    rng, size, noise = np.random.default_rng(3), 200_000, 1.3
    draw = rng.normal if mechanism == "gaussian" else rng.laplace
    update = draw(size=size, scale=signal)
    mean_abs = np.abs(update + draw(size=size, scale=noise)).mean()
    got = estimate_l1_norm(tensor([mean_abs]), tensor([noise]), tensor([size]), mechanism)
    assert float(got) == pytest.approx(np.abs(update).sum(), rel=0.1 if signal < 1 else 0.02)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_estimates_are_exact_in_expectation(mechanism):
    """The mean magnitude of signal plus noise, integrated exactly, gives the norm back."""
    signal, noise = 0.8, 1.1
    if mechanism == "gaussian":
        mean_abs = math.hypot(signal, noise) * math.sqrt(2 / math.pi)
        norm = signal * math.sqrt(2 / math.pi)
    else:
        # E|X + Y| of two Laplace variables.
        mean_abs = (signal**2 + signal * noise + noise**2) / (signal + noise)
        norm = signal
    got = estimate_l1_norm(tensor([mean_abs]), tensor([noise]), tensor([10.0]), mechanism)
    assert float(got) == pytest.approx(10 * norm, rel=1e-12)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_estimates_are_zero_below_the_noise_and_the_norm_without_noise(mechanism):
    below = estimate_l1_norm(tensor([0.3]), tensor([1.0]), tensor([10.0]), mechanism)
    exact = estimate_l1_norm(tensor([0.3]), tensor([0.0]), tensor([10.0]), mechanism)
    assert float(below) == 0
    assert float(exact) == pytest.approx(3.0)


@pytest.mark.parametrize("p", [1, 2])
def test_released_clip_norms_keep_the_total_and_the_proportions(p):
    norms = tensor([[30.0, 10.0, 20.0]])
    previous = tensor([[0.6, 0.6, 0.6]])
    got = released_clip_norms(norms, DIMS, p=p, total=tensor(1.0), previous=previous)
    assert bool((got <= MAX_CHANGE * previous).all())
    assert bool((got >= previous / MAX_CHANGE).all())
    for _ in range(20):
        previous, got = got, released_clip_norms(norms, DIMS, p=p, total=tensor(1.0), previous=got)
        ratio = got / previous
        assert bool((ratio <= MAX_CHANGE + 1e-12).all())
        assert bool((ratio >= 1 / MAX_CHANGE - 1e-12).all())
    size = norms if p == 1 else norms.square() / DIMS
    want = 0.9 * size / size.sum() + 0.1 / 3
    torch.testing.assert_close(got if p == 1 else got.square(), want)
    assert float(got.norm(p=p)) == pytest.approx(1.0)


def test_a_released_clip_norm_moves_by_at_most_two_from_the_last():
    """From norms that call for far more, and from the last round's value, not the first."""
    norms = tensor([[1.0, 1e6, 1e6]])
    previous = tensor([[0.5, 0.01, 0.02]])
    got = released_clip_norms(norms, DIMS, p=1, total=tensor(1.0), previous=previous)
    torch.testing.assert_close(got, tensor([[0.25, 0.02, 0.04]]))
    past = history(setting="client+local", clip_norm=[1.0, 1.0])
    ids = torch.tensor([1])
    for round in range(1, 4):
        past.observe_norms(ids, tensor([[1.0, 1e6]]))
        clip = past.policy(ids, torch.ones(1).double()).clip_norm
        assert float(clip[0, 0]) == pytest.approx(max(0.5**round, math.sqrt(0.05 * 2)))
        past.observe_clip_norms(ids, clip)


@pytest.mark.parametrize("p", [1, 2])
def test_released_clip_norms_have_the_public_total(p):
    """A total of L2 norms is the norm of all layers together, not their sum."""
    past = history(setting="client+local", clip_norm=3.0, clip_order=p)
    ids = torch.tensor([0])
    past.observe_norms(ids, past.initial_l1_norm[None])
    clip = past.policy(ids, torch.ones(1).double()).clip_norm
    assert float(clip.norm(p=p)) == pytest.approx(3.0)


@pytest.mark.parametrize("p", [1, 2])
def test_released_clip_norms_of_nothing_are_even(p):
    even = initial_clip_norms(2.0, 3, p)
    got = released_clip_norms(
        tensor([[0.0] * 3]), DIMS, p=p, total=tensor(2.0), previous=even[None]
    )
    torch.testing.assert_close(got[0], even)


def test_initial_clip_norms_split_the_total():
    assert float(initial_clip_norms(3.0, 4, 2).norm()) == pytest.approx(3.0)
    assert float(initial_clip_norms(3.0, 4, 1).sum()) == pytest.approx(3.0)
    assert initial_clip_norms([1.0, 2.0], 2, 1).tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match=r"clip_norm=\[1.0\] has 1 numbers"):
        initial_clip_norms([1.0], 2, 1)


@pytest.mark.parametrize("p", [1, 2])
def test_clip_norm_and_tracked_norm_are_inverse(p):
    there = l1_from_clip_norm(CLIP, DIMS, p=p, factor=1.3)
    torch.testing.assert_close(clip_norm_from_l1(there, DIMS, p=p, factor=1.3), CLIP)


def test_clip_norm_of_a_gaussian_layer_is_its_l2_norm():
    layer = torch.randn(4000, generator=torch.Generator().manual_seed(0)).double()
    got = clip_norm_from_l1(layer.abs().sum()[None], tensor([4000.0]), p=2, factor=1.0)
    assert float(got) == pytest.approx(float(layer.norm()), rel=0.03)
    double = clip_norm_from_l1(layer.abs().sum()[None], tensor([4000.0]), p=2, factor=2.0)
    torch.testing.assert_close(double, 2 * got)


# Votes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.5, 0.8])
def test_votes_lead_to_the_quantile(quantile):
    rng = np.random.default_rng(0)
    scale, batch = np.array([3.0, 0.02]), 200
    first = tensor([[0.1, 0.1]])
    tracked, late = first.clone(), []
    for step in range(400):
        norms = rng.lognormal(size=(batch, 2)) * scale
        votes = (norms <= tracked.numpy()).sum(0) - batch / 2 + rng.normal(size=2) * 5
        tracked = quantile_step(
            tracked, torch.from_numpy(votes)[None], tensor([float(batch)]),
            quantile=quantile, lr=0.2, initial=first,
        )  # fmt: skip
        if step >= 200:
            late.append(tracked.log())
    got = torch.stack(late).mean(0)[0].exp().numpy()
    want = scale * np.exp({0.5: 0.0, 0.8: 0.8416}[quantile])
    np.testing.assert_allclose(got, want, rtol=0.05)


def test_one_vote_moves_by_the_formula_and_noise_cannot_move_it_further():
    first = tensor([[1.0, 2.0]])

    def step(votes, batch=10.0, tracked=first):
        return quantile_step(
            tracked, tensor([votes]), tensor([batch]), quantile=0.5, lr=0.2, initial=first
        )

    torch.testing.assert_close(step([2.0, -3.0]), first * tensor([-0.04, 0.06]).exp())
    torch.testing.assert_close(step([1e9, -1e9]), first * tensor([-0.1, 0.1]).exp())
    far = first * tensor([1e-6, 1e6])
    torch.testing.assert_close(step([5.0, -5.0], tracked=far), far)


# History -----------------------------------------------------------------------------------------


def history(clients=4, dims=(30, 20), **kwargs):
    config = PrivacyConfig(**({"epsilon": None, "noise_multiplier": 1.0, "seed": 0} | kwargs))
    return ReleasedHistory(config, clients, dims)


def moved_history(**kwargs):
    past = history(**kwargs)
    ids = torch.tensor([2, 0])
    for i in range(3):
        past.observe_release(ids, tensor([[1.0 + i, 2.0], [0.5, 3.0]]), tensor([[0.1] * 2] * 2))
        past.observe_clip_norms(ids, tensor([[0.6, 0.7], [0.5, 0.6]]))
    return past


def policy_values(past, ids):
    return [
        v for v in vars(past.policy(ids, torch.ones(len(ids)).double())).values() if v is not None
    ]


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_state_dict_restores_the_policy_exactly(mechanism):
    past = moved_history(mechanism=mechanism, setting="client+local")
    state = past.state_dict()
    again = history(mechanism=mechanism, setting="client+local")
    again.load_state_dict(state)
    everyone = torch.arange(4)
    before = policy_values(past, everyone)
    for a, b in zip(before, policy_values(again, everyone), strict=True):
        assert torch.equal(a, b)
    past.observe_norms(everyone, torch.ones(4, 2).double())
    for a, b in zip(before, policy_values(again, everyone), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="number of clients or layers changed"):
        history(clients=5).load_state_dict(state)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("setting", ["record+local", "client+local"])
def test_a_checkpoint_holds_the_clients_with_a_history_alone(mechanism, setting):
    past = history(mechanism=mechanism, setting=setting, clients=1000)
    assert past.checkpoint()["l1_norm"].shape[0] == 0
    ids = torch.tensor([3, 700])
    past.observe_votes(ids[:1], torch.ones(1, 2).double(), torch.ones(1))
    past.observe_norms(ids[1:], torch.full((1, 2), 7.0).double())
    past.observe_clip_norms(torch.tensor([5]), torch.full((1, 2), 0.3).double())
    kept = past.checkpoint()
    assert kept["clients"].tolist() == [3, 5, 700]
    assert sum(value.numel() for value in kept.values()) < 100
    again = history(mechanism=mechanism, setting=setting, clients=1000)
    again.observe_norms(torch.tensor([8]), torch.ones(1, 2).double())
    again.load_checkpoint(kept)
    for name, value in past.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with pytest.raises(ValueError, match="number of clients or layers changed"):
        history(mechanism=mechanism, setting=setting, clients=999).load_checkpoint(kept)


def test_restore_takes_back_a_release_of_some_clients():
    past = moved_history()
    ids = torch.tensor([2, 3])
    rows, whole = past.rows(ids), past.state_dict()
    past.observe_votes(torch.arange(4), torch.ones(4, 2).double(), torch.ones(4))
    past.observe_norms(ids, torch.ones(2, 2).double())
    past.observe_clip_norms(ids, torch.ones(2, 2).double())
    past.restore(ids, rows)
    now = past.state_dict()
    for name, value in whole.items():
        assert torch.equal(now[name][ids], value[ids]), name
    assert not torch.equal(now["l1_norm"][0], whole["l1_norm"][0])


def test_releases_move_only_their_own_clients_and_the_window_forgets():
    past = history(setting="client+local", history=2)
    ids = torch.tensor([1])
    for norm in (5.0, 7.0, 9.0):
        past.observe_norms(ids, tensor([[norm, 1.0]]))
    assert past.l1_norm[1].tolist() == [8.0, 1.0]
    assert torch.equal(past.l1_norm[[0, 2, 3]], past.initial_l1_norm.repeat(3, 1))
    policy = past.policy(torch.arange(4), torch.ones(4).double())
    first = past.initial_clip_norm.repeat(3, 1)
    torch.testing.assert_close(policy.clip_norm[[0, 2, 3]], first)
    assert policy.clip_norm[1, 0] > policy.clip_norm[1, 1]


def test_raw_thresholds_are_the_mean_of_the_last_five_norms():
    past = history(setting="abstract", mechanism="laplace")
    ids = torch.tensor([0])
    torch.testing.assert_close(past.policy(ids, torch.ones(1)).clip_norm[0], tensor([0.5, 0.5]))
    for norm in range(1, 8):
        past.observe_norms(ids, tensor([[float(norm), 2.0]]))
    policy = past.policy(ids, torch.ones(1).double())
    assert policy.clip_norm[0].tolist() == [5.0, 2.0]
    torch.testing.assert_close(policy.shares[0], 0.9 * tensor([5 / 7, 2 / 7]) + 0.05)


# Policies see releases alone ----------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["record+local", "client+local", "abstract"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_private_records_of_this_round_do_not_move_its_policy(
    federation, population, global_params, setting, mechanism
):
    """Two populations with the same released history and other records use one policy.

    The second round follows from releases: it is the same once the histories are made equal.
    """
    config = PrivacyConfig(
        setting=setting, mechanism=mechanism, epsilon=None, noise_multiplier=0.5, seed=0
    )
    datasets = [
        federation(),
        federation(change=lambda x, y: x.mul_(30)),
        federation(change=lambda x, y: x[:7].fill_(float("nan"))),
    ]
    torch.manual_seed(0)
    network, everyone = MLP(in_features=8, hidden=(5,), num_classes=3), torch.arange(3)
    parts = [population(data, network, config, lr=0.5) for data in datasets]
    params = global_params(network)
    for round in range(3):
        released = [part.release(everyone, params, round, "same") for part in parts]
        for other in released[1:]:
            for name in ("clip_norm", "shares", "contribution", "noise_scale"):
                want = getattr(released[0].policy, name)
                assert torch.equal(getattr(other.policy, name), want), name
            if released[0].policy.votes_at is not None:
                assert torch.equal(other.policy.votes_at, released[0].policy.votes_at)
            assert not torch.equal(other.update["fc1.weight"], released[0].update["fc1.weight"])
        histories = [part.books.history.l1_norm for part in parts]
        if config.resolved_thresholds != "fixed":
            assert not torch.equal(histories[0], histories[1])
        for part in parts[1:]:
            part.books.history.load_state_dict(parts[0].books.history.state_dict())


def test_policy_of_a_step_follows_from_votes_of_the_steps_before(
    federation, population, global_params
):
    """M of the last of three steps, replayed from the released votes alone."""
    config = PrivacyConfig(epsilon=None, noise_multiplier=0.2, seed=0)
    torch.manual_seed(0)
    network = MLP(in_features=8, hidden=(5,), num_classes=3)
    part = population(federation(), network, config, local_steps=3)
    seen = []
    observe = part.books.history.observe_votes
    part.books.history.observe_votes = lambda ids, votes, batch: (
        seen.append((votes.clone(), batch.clone())), observe(ids, votes, batch)
    )  # fmt: skip
    update = part.release(torch.arange(3), global_params(network), 0, "x")
    assert len(seen) == 3
    tracked = part.books.history.initial_l1_norm.repeat(3, 1)
    for votes, batch in seen[:-1]:
        fraction = (votes / batch[:, None].double() + 0.5).clamp(0, 1)
        tracked = tracked * (-0.2 * (fraction - 0.5)).exp()
    torch.testing.assert_close(update.policy.votes_at, tracked)
    want = math.sqrt(math.pi / 2) * tracked / part.books.history.dims.sqrt()
    torch.testing.assert_close(update.policy.clip_norm, want)


@pytest.mark.parametrize("setting", ["record+local", "client+local"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_history_is_computed_from_the_released_bytes_alone(
    federation, population, global_params, setting, mechanism
):
    """The tracked norms, recomputed by anyone who sees the uploads and the public policy."""
    config = PrivacyConfig(
        setting=setting, mechanism=mechanism, epsilon=None, noise_multiplier=0.003, seed=0,
        thresholds="released",
    )  # fmt: skip
    torch.manual_seed(0)
    network = MLP(in_features=8, hidden=(5,), num_classes=3)
    part = population(federation(), network, config, lr=1.0)
    params, estimates = global_params(network), []
    for round in range(2):
        update = part.release(torch.arange(3), params, round, "x")
        divisor = 20 if setting == "record+local" else 1
        rows = []
        for i, name in enumerate(("fc1", "fc2")):
            sent = [update.update[f"{name}.{kind}"] for kind in ("weight", "bias")]
            sent = torch.cat([v.double().flatten(1) for v in sent], 1) * divisor
            mean, scale, d = sent.abs().mean(1), update.policy.noise_scale[:, i], sent.shape[1]
            if mechanism == "gaussian":
                rows.append(d * (mean**2 - 2 * scale**2 / math.pi).clamp(min=0).sqrt())
            else:
                v = (mean - scale).clamp(min=0)
                rows.append(d * (v + (v * (mean + 3 * scale)).sqrt()) / 2)
        estimates.append(torch.stack(rows, 1))
        want = torch.stack(estimates).mean(0)
        assert bool((want > 0).all())
        torch.testing.assert_close(part.books.history.l1_norm, want, rtol=1e-3, atol=1e-5)
