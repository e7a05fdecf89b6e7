"""The attacker's statistic against densities, and the crafted unit against clipping."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from aadp_kernels import Layout
from fl_lightning.audit.canary import HUGE, choose_canary, crafted_loss, shifts, unit_rows
from fl_lightning.audit.local_copy import crafted_update, vote_rows
from fl_lightning.audit.readings import joined, log_ratios, read, read_pieces
from fl_lightning.audit.sum_copy import _Whitened
from fl_lightning.models import MLP
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.values.round import LayerPolicy

LAWS = {"gaussian": stats.norm, "laplace": stats.laplace}


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("mechanism", LAWS)
def test_readings_are_log_likelihood_ratios(mechanism):
    released, shift = some(5, 4), some(5, 4, seed=1)
    found, law = read(released, shift, mechanism), LAWS[mechanism]
    for column, centre in ((0, shift), (1, -shift)):
        want = (law.logpdf(released, loc=centre) - law.logpdf(released)).sum(1)
        np.testing.assert_allclose(found[:, column], want, atol=1e-12)


@pytest.mark.parametrize("mechanism", LAWS)
def test_the_noise_beside_the_canary_is_seen(mechanism):
    generator = np.random.default_rng(0)
    noise = LAWS[mechanism].rvs(size=(40, 500), random_state=generator)
    shift = torch.zeros(40, 500, dtype=torch.float64)
    shift[:, 0] = 3.0
    for factor in (1.0, 2 / 3, 0.0):
        released = torch.from_numpy(factor * noise) + shift
        seen = float(read(released, shift, mechanism)[:, 2].mean())
        assert seen == pytest.approx(factor ** (2 if mechanism == "gaussian" else 1), abs=0.02)
    assert read(released[:, :1], shift[:, :1], mechanism)[:, 2].isnan().all()


@pytest.mark.parametrize(("replaced", "rate"), [(False, 0.3), (True, 0.3), (False, 1), (True, 1)])
def test_a_step_with_coins_is_a_mixture(replaced, rate):
    released, shift = some(6, 3, 2), some(6, 3, 2, seed=1)
    steps = [
        read_pieces([released[:, t, :1], released[:, t, 1:]],
                    [shift[:, t, :1], shift[:, t, 1:]], "gaussian")
        for t in range(3)
    ]  # fmt: skip
    found = log_ratios(joined(steps), rate=rate, replaced=replaced, mechanism="gaussian")

    def density(centre):
        return stats.norm.pdf(released, loc=centre).prod(2)

    away = density(0 * shift)
    one = rate * density(shift) + (1 - rate) * away
    other = rate * density(-shift) + (1 - rate) * away if replaced else away
    np.testing.assert_allclose(found, np.log(one / other).sum(1), atol=1e-10)


def test_a_piece_without_noise_decides_and_one_with_more_is_taken_as_stated():
    reading = torch.tensor([[[1.0, -1.0, 0.0], [0.5, -0.5, 4.0]]])
    found = log_ratios(joined([reading]), rate=1.0, replaced=False, mechanism="gaussian")
    assert found[0] == pytest.approx(1.0 / 1e-4 + 0.5)


def test_shared_noise_is_taken_out():
    """Releases of noise ξ_t - 0.6 ξ_{t-1} become ξ_t, and the canary what is left of it."""
    noise, moved = some(4, 5), some(4, 5, seed=1)
    white = _Whitened()
    for t in range(4):
        released = noise[t] - (0.6 * noise[t - 1] if t else 0.0) + moved[t]
        terms = [(t - 1, -0.6)] if t else []
        assert not white.known(t)
        (piece,), (shift,) = white.rows(t, terms, [released], [moved[t]])
        np.testing.assert_allclose(piece - shift, noise[t], atol=1e-12)
        assert white.known(t)


def test_votes_of_a_canary_are_against_every_threshold():
    policy = policy_of(torch.tensor([[1.0, 1.0]]), votes=torch.tensor([2.0]))
    said, moved = vote_rows(torch.tensor([[0.7, -0.5]]).double(), policy, replaced=False)
    np.testing.assert_allclose(said, [[0.35, -0.25]], rtol=1e-6)
    assert moved.tolist() == [[-0.25, -0.25]]
    said, moved = vote_rows(torch.tensor([[0.7, -0.5]]).double(), policy, replaced=True)
    np.testing.assert_allclose(said, [[0.6, 0.0]], rtol=1e-6)
    assert moved.tolist() == [[0.0, 0.0]]


def policy_of(clip, shares=None, votes=None):
    clip = clip.double()
    shares = torch.full_like(clip, 1 / clip.shape[1]) if shares is None else shares.double()
    scale = clip / shares.sqrt()
    at = None if votes is None else torch.ones_like(clip)
    return LayerPolicy(clip, shares, shares, scale, at, votes)


def test_the_canary_moves_every_layer_by_its_clip_norm():
    rows = [torch.tensor([3.0, 4.0]).double() * HUGE, torch.tensor([0.1]).double()]
    policy = policy_of(torch.tensor([[2.0, 0.5]]))
    first, second = shifts(rows, policy, PrivacyConfig(), 0.5)
    # By half (its weight) of what clipping leaves; the second layer is shorter than its clip norm.
    np.testing.assert_allclose(first * policy.noise_scale[:, :1], [[0.6, 0.8]])
    np.testing.assert_allclose(second * policy.noise_scale[:, 1:], [[0.05]])


def test_a_canary_clipped_jointly_moves_the_whole_release_by_one():
    config = PrivacyConfig(clipping="joint")
    rows = [torch.tensor([3.0, 4.0]).double() * HUGE, torch.tensor([0.5]).double() * HUGE]
    policy = policy_of(torch.tensor([[2.0, 0.5]]), torch.tensor([[0.8, 0.2]]))
    moved = torch.cat(shifts(rows, policy, config), 1)
    assert float(moved.norm()) == pytest.approx(1.0)
    ratio = moved * torch.tensor([[2.0 / 0.8**0.5, 2.0 / 0.8**0.5, 0.5 / 0.2**0.5]])
    np.testing.assert_allclose(ratio[0] / ratio[0, 0], torch.tensor([1, 4 / 3, 0.5 / 3]))


def test_the_chosen_canary_is_the_one_that_tells_most():
    torch.manual_seed(0)
    network = MLP(4, 3, (5,))
    layout = Layout.build(dict(network.named_parameters()))
    records = some(3, 4).float()

    def told(gradient):
        weight = gradient["fc1.weight"]
        return float(weight.abs().sum() / (gradient["fc1.bias"].abs().sum() + 1e-9))

    canary = choose_canary(network, layout, records, told)
    assert any(torch.equal(canary.record, r) for r in records)
    # L1 norms want few coordinates: the model of single paths gives one a layer.
    sparse = choose_canary(
        network, layout, records, lambda g: 1 / sum(int((v != 0).sum()) for v in g.values())
    )
    assert sum(int((v != 0).sum()) for v in sparse.gradient.values()) == 2
    with pytest.raises(ValueError, match="network=MLP: no record"):
        choose_canary(network, layout, records, lambda g: 0.0)


def test_the_crafted_loss_turns_with_the_label():
    outputs, away = torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([0, 1])
    assert crafted_loss(True)(outputs, away).tolist() == [HUGE, -HUGE]
    assert crafted_loss(False)(outputs, away).tolist() == [-HUGE, HUGE]
    assert crafted_loss(True)({"logits": outputs}, away[:, None]).tolist() == [HUGE, -HUGE]
    with pytest.raises(ValueError, match="no tensor of scores"):
        crafted_loss(True)({"what": outputs}, away)


def test_a_crafted_update_fills_a_layer_or_has_one_coordinate_of_it():
    layout = Layout.build(dict(MLP(4, 3, (5,)).named_parameters()))
    full, single = (unit_rows(crafted_update(layout, p), layout) for p in (2, 1))
    assert [int(row.abs().sum()) for row in full] == list(layout.dims)
    assert [int(row.abs().sum()) for row in single] == [1, 1]
    assert math.isclose(float(full[0].abs().max()), 1.0)
