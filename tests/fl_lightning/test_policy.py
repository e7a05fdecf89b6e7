"""Clip norms and shares: optimal where they claim it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_lightning.privacy.allocation import division_ratio
from fl_lightning.privacy.contribution import MIN_CONTRIBUTION, contribution
from fl_lightning.privacy.thresholds import (
    MAX_CHANGE,
    clip_norm_from_l1,
    estimate_l1_norm,
    initial_clip_norms,
    l1_from_clip_norm,
    released_clip_norms,
)
from tests.fl_lightning.policy_values import CLIP, DIMS, MECHANISMS, PART, history, shares, tensor

RULES = ("uniform", "abstract", "mse", "contribution", "snr")


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
