"""Sums of a cohort: one noise from a trusted server, or shares of it under secure aggregation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from aadp_kernels import Layout, NoiseKey, grid
from fl_lightning import PrivacyConfig
from fl_lightning.keys import binding, run_key
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.privacy.noise_parts import noise_part
from fl_lightning.privacy.noised_sum import NoisedSum
from fl_lightning.privacy.weights import event_multiplier, sum_weights
from fl_lightning.values.release import ALL_CLIENTS

REFERENCE = {"gaussian": stats.norm, "laplace": stats.laplace}
SUMMED = ("client+aggregator", "client+secure_sum")


def accepts(sample: torch.Tensor, mechanism: str, scale: float) -> bool:
    return stats.kstest(sample.numpy().ravel(), REFERENCE[mechanism](scale=scale).cdf).pvalue > 1e-4


# --- shares ---


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize("survivors", [1, 2, 7])
def test_enough_shares_are_the_whole_noise(mechanism: str, survivors: int) -> None:
    shares = noise_part(
        (20_000,), mechanism=mechanism, scale=0.7, survivors=survivors, key=NoiseKey.from_seed(1),
        clients=torch.arange(survivors), layer=3,
    )  # fmt: skip
    total = shares.sum(0)
    assert accepts(total, mechanism, 0.7)
    assert not accepts(total, mechanism, 0.7 * 2 / 3)
    assert not accepts(total, mechanism, 0.7 * 3 / 2)
    if survivors > 1:
        assert not accepts(shares[1:].sum(0), mechanism, 0.7)
        assert abs(float(np.corrcoef(shares[0], shares[1])[0, 1])) < 0.04


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_more_shares_are_more_noise_and_layers_are_independent(mechanism: str) -> None:
    key = NoiseKey.from_seed(2)
    arguments = {"mechanism": mechanism, "scale": 1.0, "survivors": 4, "key": key}
    shares = noise_part((20_000,), clients=torch.arange(8), layer=0, **arguments).sum(0)
    whole = 2.0 if mechanism == "laplace" else 1.0
    assert abs(float(shares.var()) / (2 * whole) - 1) < 0.06
    other = noise_part((20_000,), clients=torch.arange(8), layer=1, **arguments).sum(0)
    assert abs(float(np.corrcoef(shares, other)[0, 1])) < 0.04


def test_no_noise_and_no_survivors() -> None:
    arguments = {"mechanism": "laplace", "key": NoiseKey.from_seed(1), "layer": 0}
    none = noise_part((3,), scale=0.0, survivors=2, clients=torch.arange(2), **arguments)
    assert not none.any()
    with pytest.raises(ValueError, match="survivors=0"):
        noise_part((3,), scale=1.0, survivors=0, clients=torch.arange(2), **arguments)


# --- weights ---


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_weights_keep_every_client_within_its_own_multiplier(mechanism: str, rho: float) -> None:
    base = np.array([10.0, 40.0, 20.0, 40.0])
    needed = np.array([2.0, 2.0, 3.0, 5.0])
    z, w = sum_weights(base, needed, mechanism=mechanism, vote_share=rho)
    assert z == 2.0
    assert w[:2].tolist() == [0.25, 1.0]
    got = event_multiplier(w, z, mechanism=mechanism, vote_share=rho)
    assert (got >= needed).all()
    assert float(got[3]) == pytest.approx(5.0, rel=1e-9)
    assert float(got[0]) > 4.0
    # The definition, from sensitivities: the sum moves by w·C, the votes by their whole half.
    clip, sums, votes = 1.7, z / (1 - rho), math.inf
    if mechanism == "gaussian":
        sums = z / math.sqrt(1 - rho)
        votes = z / math.sqrt(rho) if rho else math.inf
        joint = ((w * clip / (sums * clip)) ** 2 + (1 / votes) ** 2) ** -0.5
    else:
        votes = z / rho if rho else math.inf
        joint = 1 / (w * clip / (sums * clip) + 1 / votes)
    np.testing.assert_allclose(got, joint, rtol=1e-7)


def test_votes_that_cost_the_strictest_client_too_much_are_refused() -> None:
    needed = np.array([1.0, 10.0])
    with pytest.raises(ValueError, match=r"vote_share=0\.05"):
        sum_weights(np.ones(2), needed, mechanism="gaussian", vote_share=0.05)
    z, w = sum_weights(np.ones(2), 0 * needed, mechanism="gaussian", vote_share=0.05)
    assert (z, w.tolist()) == (0.0, [1.0, 1.0])


# --- the sum ---


def pooled_sum(setting: str, mechanism: str, *, clients: int, multiplier: float, **options: object):
    config = PrivacyConfig(
        setting=setting, mechanism=mechanism, epsilon=None, noise_multiplier=multiplier,
        clip_norm=[0.5, 2.0], allocation="uniform", **options,
    )  # fmt: skip
    layout = Layout.build({"a.w": torch.empty(4000), "b.w": torch.empty(3, 2000)})
    history = ReleasedHistory(config, 1, layout.dims)
    total = NoisedSum(
        history,
        layout,
        multiplier=multiplier,
        survivors=clients if setting == "client+secure_sum" else None,
        key=NoiseKey.from_seed(4),
    )
    return total, layout, history


@pytest.mark.parametrize("setting", SUMMED)
@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize("thresholds", ["fixed", "quantile"])
@pytest.mark.parametrize("form", ["wide", "fast", "grid"])
def test_the_noise_of_a_sum_has_the_scale_that_is_charged(
    setting: str, mechanism: str, thresholds: str, form: str
) -> None:
    if (setting, form) == ("client+secure_sum", "grid"):
        with pytest.raises(ValueError, match=r"noise_form='grid' with setting='client\+secure"):
            PrivacyConfig(setting=setting, noise_form=form)
        return
    multiplier, rho = 1.5, 0.05 if thresholds == "quantile" else 0.0
    total, layout, history = pooled_sum(
        setting, mechanism, clients=3, multiplier=multiplier, thresholds=thresholds, noise_form=form
    )
    clip = total.policy.clip_norm[0]
    update = {n: torch.zeros(3, *s) for n, s in zip(layout.names, layout.shapes, strict=True)}
    before = history.l1_norm.clone()
    total.add(update, torch.arange(3), torch.ones(3))
    release = total.release(divisor=2.0, expected_votes=3.0)
    for layer, name in enumerate(layout.names):
        if mechanism == "gaussian":
            scale = multiplier / math.sqrt(1 - rho) * float(clip[layer]) * math.sqrt(2)
        else:
            scale = multiplier / (1 - rho) * float(clip[layer]) * 2
        noise = release.update[name] * 2.0
        assert accepts(noise, mechanism, scale)
        assert not accepts(noise, mechanism, scale * 2 / 3)
        assert not accepts(noise, mechanism, scale * 3 / 2)
    assert (history.l1_norm != before).all()
    assert release.clients.tolist() == [ALL_CLIENTS]


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize("weight", [1.0, 0.37])
def test_on_the_grid_a_client_moves_whole_numbers_by_at_most_its_share(
    mechanism: str, weight: float
) -> None:
    """The sum of integers moves by w·C quanta at most, and by nearly that."""
    total, layout, _ = pooled_sum(
        "client+aggregator", mechanism, clients=2, multiplier=0.6, thresholds="quantile",
        noise_form="grid",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    update = {
        n: 50 * torch.randn(2, *s, generator=generator)
        for n, s in zip(layout.names, layout.shapes, strict=True)
    }
    update["a.w"][1], update["b.w"][1, 0, 0] = 1e-9, math.inf
    raw = {n: v[0].double().flatten() for n, v in update.items()}
    total.add(update, torch.arange(2), torch.tensor([weight, 1.0]))
    p, scale = total.history.config.p, total.policy.noise_scale[0]
    quanta = grid.quantum(scale, mechanism)
    for layer, (name, sums) in enumerate(zip(layout.names, total.total, strict=True)):
        assert sums.dtype == torch.int64
        most = weight * float(total.policy.clip_norm[0, layer]) / float(quanta[layer])
        moved = sums.flatten().double()
        if layer == 0:  # the other client moves this layer too, by next to nothing
            moved = moved - int(1e-9 / float(quanta[0]))
        norm = float(moved.norm(p=p))
        assert norm <= most * (1 + (1e-12 if layer else 1e-5))
        assert norm >= most * (1 - 1e-4)
        assert float(nn.functional.cosine_similarity(moved, raw[name], dim=0)) > 0.9999
    assert total.votes.tolist() == [0.0, -0.5]
    assert total.nonfinite.tolist() == [0, 1]
    release = total.release(divisor=1.0, expected_votes=2.0)
    offset = 0.5 if mechanism == "laplace" else 0.0
    for layer, name in enumerate(layout.names):
        steps = release.update[name].double() / float(quanta[layer]) - offset
        near = steps.abs() < 2**20  # beyond, float32 rounds whole numbers
        torch.testing.assert_close(steps[near], steps[near].round(), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("setting", SUMMED)
def test_without_noise_a_sum_is_clipped_weighted_and_divided(setting: str) -> None:
    total, layout, _ = pooled_sum(
        setting, "gaussian", clients=3, multiplier=0.0, thresholds="fixed"
    )
    generator = torch.Generator().manual_seed(0)
    update = {
        n: torch.randn(3, *s, generator=generator)
        for n, s in zip(layout.names, layout.shapes, strict=True)
    }
    update["a.w"][2] *= 1e-4  # below its clip norm
    weights = torch.tensor([1.0, 0.5, 0.25])
    want = {}
    for name, clip in zip(layout.names, (0.5, 2.0), strict=True):
        norm = update[name].flatten(1).double().norm(dim=1)
        factor = (clip / norm).clamp(max=1) * weights
        want[name] = (update[name].double() * factor.view(-1, *[1] * (update[name].ndim - 1))).sum(
            0
        ) / 1.75
    for part in (slice(0, 2), slice(2, 3)):
        total.add(
            {n: v[part].clone() for n, v in update.items()}, torch.arange(3)[part], weights[part]
        )
    release = total.release(divisor=1.75, expected_votes=3.0)
    for name, value in want.items():
        torch.testing.assert_close(release.update[name][0].double(), value, rtol=1e-5, atol=1e-7)
    assert release.sim_only["clipped_fraction"][0].tolist() == pytest.approx([2 / 3, 1.0])


@pytest.mark.parametrize("setting", SUMMED)
def test_the_noise_of_a_sum_is_bound_to_every_number_in_it(setting: str, monkeypatch) -> None:
    names, derive = [], binding.step_key

    def kept(*given):
        names.append(run_key.public_name(key := derive(*given)))
        return key

    monkeypatch.setattr(binding, "step_key", kept)
    for what in ("nothing", "nothing", "first", "last", "vote"):
        total, layout, _ = pooled_sum(
            setting, "gaussian", clients=2, multiplier=1.0, thresholds="quantile"
        )
        total.key = NoiseKey.from_bytes(bytes(32))
        update = {n: torch.ones(2, *s) for n, s in zip(layout.names, layout.shapes, strict=True)}
        total.add(update, torch.arange(2), torch.ones(2))
        if what in ("first", "last"):
            total.total[0 if what == "first" else -1].view(-1)[-1] += 2.0**-40
        if what == "vote":
            total.votes[1] += 1
        total.release(divisor=2.0, expected_votes=2.0)
    assert names[0] == names[1]
    assert len(set(names)) == 4


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_the_noise_of_votes_in_a_sum_has_the_scale_that_is_charged(monkeypatch, mechanism) -> None:
    """Drawn in one call with that of the layers, for hundreds of sums with keys of their own."""
    z, rho, seen = 1.5, 0.05, []
    for number in range(300):
        total, layout, history = pooled_sum(
            "client+aggregator", mechanism, clients=3, multiplier=z, thresholds="quantile"
        )
        total.key = NoiseKey.from_seed(number)
        monkeypatch.setattr(history, "observe_votes", lambda _, votes, __: seen.append(votes))
        total.release(divisor=2.0, expected_votes=3.0)
    layers = layout.num_layers
    scale = z / math.sqrt(rho) * math.sqrt(layers) / 2
    if mechanism == "laplace":
        scale = z / rho * layers / 2
    noise = torch.cat(seen)
    assert accepts(noise, mechanism, scale)
    assert not accepts(noise, mechanism, scale * 2 / 3)
    assert not accepts(noise, mechanism, scale * 3 / 2)
