"""One norm over all layers: its noise, votes on the clipped norm, rules of histories."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from scipy import stats

from fl_lightning import PrivacyConfig
from fl_lightning.privacy.comparators import Comparator
from fl_lightning.privacy.history import ReleasedHistory
from tests.fl_lightning.flat_networks import make_network


def test_flat_noise_has_one_scale_for_all_layers(federation, population, global_params):
    network, data = make_network(), federation(72, clients=6)
    z, clip = 0.8, 0.3
    config = PrivacyConfig(
        clipping="flat",
        thresholds="fixed",
        clip_norm=clip,
        epsilon=None,
        noise_multiplier=z,
        seed=3,
    )
    noisy = population(data, network, config)
    silent = population(data, network, config)
    everyone, params = torch.arange(6), global_params(network)
    release = noisy.release(everyone, params, 0, "x")
    with pytest.MonkeyPatch.context() as patch:
        policy = silent.books.history.policy

        def without_noise(ids, multiplier):
            made = policy(ids, multiplier)
            made.noise_scale.zero_()
            return made

        patch.setattr(silent.books.history, "policy", without_noise)
        plain = silent.release(everyone, params, 0, "x")
    # lr 1 and sums divided by the 12 records of a client.
    parts = [12 * (release.update[n] - plain.update[n]).double().flatten() for n in params]
    for part in (*parts, torch.cat(parts)):
        if len(part) > 1000:
            assert stats.kstest(part.numpy() / (z * clip), stats.norm.cdf).pvalue > 1e-3
            for factor in (2 / 3, 3 / 2):
                wrong = part.numpy() / (factor * z * clip)
                assert stats.kstest(wrong, stats.norm.cdf).pvalue < 1e-6
    assert release.events[0].noise_multiplier == z
    per_client = 12 * torch.cat([v.flatten(1) for v in plain.update.values()], 1).norm(dim=1)
    assert bool((per_client <= 12 * clip).all())


def configured(**options) -> PrivacyConfig:
    """A configuration whose comparator's options stand among the others."""
    names = [f.name for f in fields(Comparator)]
    comparator = Comparator(**{name: options.pop(name) for name in names if name in options})
    return PrivacyConfig(**options, comparator=comparator)


def history(**kwargs) -> ReleasedHistory:
    return ReleasedHistory(configured(seed=1, **kwargs), 3, (4, 6))


def observed(rule: str, values: list[float], **kwargs) -> float:
    past = history(thresholds="released", history=4, history_rule=rule, **kwargs)
    for value in values:
        past.observe_norms(torch.tensor([1]), torch.tensor([[value, 1.0]]))
    assert past.l1_norm[0].tolist() == past.initial_l1_norm.tolist(), "only its own client"
    return float(past.l1_norm[1, 0])


def test_history_rules():
    assert observed("mean", [1, 2, 9]) == pytest.approx(4)
    assert observed("median", [1, 9, 2]) == pytest.approx(2)
    assert observed("median", [100, 1, 9, 2, 5]) == pytest.approx(2), "lower median of the last 4"
    # decay 1 - 2/(4 + 1) = 0.6, newest first.
    weights = [1, 0.6, 0.36, 0.216]
    expected = sum(w * v for w, v in zip(weights, [5, 2, 9, 1], strict=True)) / sum(weights)
    assert observed("ema", [100, 1, 9, 2, 5]) == pytest.approx(expected)


def test_the_cosine_of_the_last_two_updates_scales_the_norm():
    past = history(thresholds="released", history_rule="median", history_cosine=True)
    clients = torch.tensor([2])
    first = [torch.tensor([[1.0, 0, 0, 0]]), torch.ones(1, 6)]
    second = [torch.tensor([[1.0, 1, 0, 0]]), -torch.ones(1, 6)]
    for update in (first, second):
        past.observe_updates(clients, update)
        past.observe_norms(clients, torch.tensor([[8.0, 8.0]]))
    expected = [8 * (1 + math.sqrt(0.5)) / 2, 0.0]
    assert past.l1_norm[2].tolist() == pytest.approx(expected, abs=1e-6)
    other = history(thresholds="released", history_rule="median", history_cosine=True)
    other.load_state_dict(past.state_dict())
    assert torch.equal(other.last_update, past.last_update)
    assert "last_update" not in history().state_dict()


def test_votes_on_the_clipped_norm(federation, population, global_params):
    """Without noise the tracked norm moves by the true share of records that are not clipped."""
    network, data = make_network(), federation(72, clients=6)
    rules = {"clipping": "flat", "thresholds": "quantile", "clip_norm": 1.8}
    found = {}
    for votes_on in ("clipped", "l1"):
        config = configured(**rules, votes_on=votes_on, epsilon=None, noise_multiplier=0.0, seed=3)
        clients = population(data, network, config)
        before = clients.books.history.l1_norm.clone()
        release = clients.release(torch.arange(6), global_params(network), 0, "x")
        unclipped = 1 - release.sim_only["clipped_fraction"].double()
        moved = (
            clients.books.history.l1_norm / before
        ).log() / -config.quantile_lr + config.quantile
        found[votes_on] = (moved, unclipped)
    moved, unclipped = found["clipped"]
    assert 0 < float(unclipped.mean()) < 1
    torch.testing.assert_close(moved, unclipped, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found["l1"][0], unclipped, atol=1e-3), "another norm, other votes"


def test_nominal_noise_of_records_is_less_by_their_number(federation, population, global_params):
    network, data = make_network(), federation(72, clients=6)
    scales = {}
    for kind in ("update", "records"):
        config = configured(
            setting="abstract",
            thresholds="fixed",
            nominal_sensitivity=kind,
            epsilon=None,
            noise_multiplier=0.5,
            seed=3,
        )
        clients = population(data, network, config)
        release = clients.release(torch.arange(6), global_params(network), 0, "x")
        scales[kind] = release.policy.noise_scale
        assert release.events[0].noise_multiplier == 0.5, "nominal all the same"
    torch.testing.assert_close(scales["records"], scales["update"] / 12)


def test_every_record_is_in_every_batch_of_rate_one(federation, population):
    network, data = make_network(), federation(60, clients=3)
    config = PrivacyConfig(thresholds="fixed", epsilon=None, noise_multiplier=1.0, seed=3)
    clients = population(data, network, config, local_steps=2)
    first, second = clients.clients._batches([0, 2], clients.key, 0)
    assert first is second
    assert first.divisor.tolist() == [20, 20]
    for row, client in enumerate((0, 2)):
        rows = torch.from_numpy(data.partition.client(client).copy())
        assert torch.equal(first.x[row], data.x[rows])
        assert torch.equal(first.y[row], data.y[rows])
    assert bool(first.mask.all())
    for _ in clients.clients._batches([1], clients.key, 0):
        pass
    assert len(clients.clients._whole) == 2
    for _ in clients.clients._batches([1, 2], clients.key, 0):
        pass
    assert list(clients.clients._whole) == [(1, 2)], "no record is held twice"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"clip_function": "automatic"}, "clip_function"),
        ({"clip_function": "automatic", "clipping": "flat"}, "thresholds='quantile'"),
        (
            {"clip_function": "automatic", "clipping": "flat", "thresholds": "fixed",
             "noise_form": "grid"},
            "noise_form='grid'",
        ),
        ({"setting": "client+local", "votes_on": "clipped"}, "votes_on='clipped'"),
        ({"nominal_sensitivity": "records"}, "nominal_sensitivity='records'"),
        ({"thresholds": "fixed", "history_cosine": True}, "history_cosine"),
        ({"clipping": "group"}, "clipping='group'"),
        ({"clipping": "joint", "setting": "client+local"}, "clipping='joint'"),
        ({"clipping": "joint", "noise_form": "grid"}, "noise_form='grid'"),
        ({"clipping": "joint", "votes_on": "clipped"}, "votes_on='clipped'"),
        ({"history_rule": "mode"}, "history_rule='mode'"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        configured(**options)
