"""Audits of small runs: what is proven is not passed, and every fault of a mechanism is."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fl_lightning.accounting.risk import Risk
from fl_lightning.audit import last_model
from fl_lightning.audit.audit import judge
from fl_lightning.audit.finished import Finished
from fl_lightning.models import MLP
from fl_lightning.privacy import clipping, mechanism, noised_sum
from fl_lightning.release import one_by_one, summed

CONFIDENCE = 0.99


@pytest.fixture
def finished(federation, fit):
    """A finished run of few parameters, as an audit reads it."""

    def make(setting="record+local", *, clients=3, rounds=2, module=None, **privacy):
        torch.manual_seed(0)
        data = federation(clients=clients, num_records=12 * clients)
        options = {"local_steps": 2} if setting == "record+local" else {}
        options = {"sampling_rate": 1.0, **options, **(module or {})}
        privacy = {"epsilon": 8.0, "delta": 1e-5, "setting": setting, **privacy}
        run = fit(data, MLP(8, 3, (4,)), rounds=rounds, module_kwargs=options, **privacy)
        run.ledger.close()
        return Finished(
            run, data, run.trainer, run.ledger.header, run.ledger.releases, rounds, True
        )

    return make


def found(finished, canaries=200, seed=3, minutes=5.0):
    return judge(finished, canaries=canaries, confidence=CONFIDENCE, minutes=minutes, seed=seed)


LOCAL = [
    ("record+local", {}),
    pytest.param(
        "record+local", {"module": {"sampling_rate": 0.5, "local_steps": 3}}, marks=pytest.mark.slow
    ),
    ("record+local", {"adjacency": "replace_one", "thresholds": "fixed"}),
    ("record+local", {"mechanism": "laplace", "delta": 1e-5}),
    pytest.param("record+local", {"clipping": "joint"}, marks=pytest.mark.slow),
    pytest.param(
        "record+local", {"clipping": "flat", "noise_form": "fast"}, marks=pytest.mark.slow
    ),
    ("client+local", {}),
    ("client+local", {"mechanism": "laplace", "delta": 0.0, "noise_form": "grid"}),
]


@pytest.mark.parametrize(("setting", "options"), LOCAL)
def test_less_is_shown_than_is_proven_and_half_of_it_at_least(finished, setting, options):
    audit = found(finished(setting, **options), 400)
    assert audit.passed
    assert audit.main.shown < audit.main.at_most
    # Coins keep a canary out of all steps now and then: fewer right guesses say less.
    assert audit.main.shown >= (0.4 if "module" in options else 0.5) * audit.proven
    assert audit.seen.charged == pytest.approx(audit.proven, rel=1e-6)
    noise = [value for value in audit.noise_seen if value is not None]
    assert noise == pytest.approx([1.0] * len(noise), abs=0.1)


@pytest.mark.parametrize("options", [{}, {"adjacency": "replace_one", "thresholds": "fixed"}])
def test_the_last_model_shows_less_than_all_releases_and_more_than_nothing(finished, options):
    audit = found(finished(**options), 800)
    black_box = audit.bounds[-1]
    assert (black_box.name, black_box.guesses) == ("last model, black box", 600)
    assert 0.2 * audit.proven <= black_box.shown <= audit.main.at_most
    assert black_box.shown <= audit.proven


def test_a_last_model_is_the_first_one_with_its_own_releases(finished):
    """Scores by hand, of a copy whose noised gradients are listened to."""
    run = finished(rounds=2)
    heard: dict[int, list] = {}
    add = last_model.LastModels.add

    def listen(self, clients, update):
        for i, k in enumerate(clients.tolist()):
            heard.setdefault(k, []).append({n: v[i].clone() for n, v in update.items()})
        heard["models"] = self
        add(self, clients, update)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(last_model.LastModels, "add", listen)
        audit = found(run, 20)
    models = heard.pop("models")
    assert {k: len(steps) for k, steps in heard.items()} == dict.fromkeys(range(20), 4)
    canary, network = models.canary, run.module.network
    factor = -run.rules.client_lr / int(run.data.client_sizes[audit.client])
    label = torch.zeros(1)
    for k in (0, 7):
        moved = {n: p + factor * sum(s[n] for s in heard[k]) for n, p in canary.params.items()}
        before, after = (
            float(canary.loss(torch.func.functional_call(network, p, canary.record[None]), label))
            for p in (canary.params, moved)
        )
        assert audit.seen.last[k] == pytest.approx((before - after) / 2**30, rel=1e-4, abs=1e-9)


# Faults of the code that an audit shares with the run --------------------------------------------


def less_noise(original, layer=None):
    """Noise of two thirds of its scale; or none at all in one layer."""

    def sample(*args, **options):
        noise = original(*args, **options)
        if layer is None:
            return noise * (2 / 3)
        return noise * (options["layer"] != layer)

    return sample


def changed_privatize(original, clip=lambda c: c, scale=lambda s: s):
    def privatize(*args, **options):
        options |= {"clip": clip(options["clip"]), "scale": scale(options["scale"])}
        return original(*args, **options)

    return privatize


def changed_sum(original, clip=lambda c: c, scale=lambda s: s):
    def run(values, **kwargs):
        found = kwargs["scale"]
        kwargs |= {"clip": clip(kwargs["clip"]), "scale": found if found is None else scale(found)}
        return original(values, **kwargs)

    return run


def without_first(value):
    value = value.clone()
    value[..., 0] = 1e30
    return value


def without_noise(value):
    value = value.clone()
    value[..., 0] = 0.0
    return value


def half_the_steps(original):
    """Ledger lines that charge for half of the steps."""

    def line_writer(*args):
        write = original(*args)

        def charged(row, **facts):
            line = write(row, **facts)
            return replace(line, steps=line.steps // 2)

        return charged

    return line_writer


OF_RECORDS = {
    "noise cut to two thirds": lambda m: m.setattr(
        mechanism, "sample_noise", less_noise(mechanism.sample_noise)
    ),
    "clip doubled": lambda m: m.setattr(clipping, "round_down", lambda c: 2 * c.float()),
    "layer without noise": lambda m: m.setattr(
        mechanism, "sample_noise", less_noise(mechanism.sample_noise, 0)
    ),
    "layer without clipping": lambda m: m.setattr(
        clipping, "round_down", lambda c: without_first(c.float())
    ),
}
OF_UPDATES = {
    "noise cut to two thirds": {"scale": lambda s: s * 2 / 3},
    "clip doubled": {"clip": lambda c: c * 2},
    "layer without noise": {"scale": without_noise},
    "layer without clipping": {"clip": without_first},
}


@pytest.mark.parametrize("fault", OF_RECORDS)
def test_an_audit_catches_faults_in_the_releases_of_records(finished, monkeypatch, fault):
    run = finished()
    OF_RECORDS[fault](monkeypatch)
    assert not found(run).passed


@pytest.mark.parametrize("fault", OF_UPDATES)
def test_an_audit_catches_faults_in_the_releases_of_updates(finished, monkeypatch, fault):
    run = finished("client+local")
    changed = changed_privatize(mechanism.privatize_, **OF_UPDATES[fault])
    monkeypatch.setattr(mechanism, "privatize_", changed)
    assert not found(run).passed


def test_an_audit_catches_a_client_that_was_charged_for_half(finished, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(one_by_one, "line_writer", half_the_steps(one_by_one.line_writer))
        run = finished()
    audit = found(run, 400)
    assert not audit.passed
    assert audit.seen.charged > audit.proven


SUMS = [
    {"cohort_sampling": "fixed"},
    {"module": {"clients_per_round": 2}, "thresholds": "released"},
    {"mechanism": "laplace", "noise_form": "grid", "cohort_sampling": "fixed", "delta": 0.0},
    {"cohort_sampling": "fixed", "correlation": "banded", "module": {"clients_per_round": 1}},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", SUMS)
def test_sums_show_less_than_is_proven_and_a_third_of_it_at_least(finished, options):
    audit = found(finished("client+aggregator", rounds=4, **options), 300)
    assert audit.passed
    assert audit.main.shown >= 0.3 * audit.proven


@pytest.mark.parametrize("fault", OF_UPDATES)
def test_an_audit_catches_faults_in_sums(finished, monkeypatch, fault):
    run = finished("client+aggregator", rounds=1, cohort_sampling="fixed", thresholds="fixed")
    changed = changed_sum(noised_sum.clip_sum_noise, **OF_UPDATES[fault])
    monkeypatch.setattr(noised_sum, "clip_sum_noise", changed)
    assert not found(run, 120).passed


def test_an_audit_catches_sums_that_were_charged_for_half(finished, monkeypatch):
    """By twice the noise's energy in the ledger than in the sum."""
    event = summed.noise_event
    with monkeypatch.context() as patch:
        patch.setattr(summed, "noise_event", lambda p, z, rate: event(p, 2**0.5 * z, rate))
        run = finished("client+aggregator", rounds=1, cohort_sampling="fixed", thresholds="fixed")
    audit = found(run, 120)
    assert not audit.passed
    assert audit.seen.charged > audit.proven


def test_an_audit_of_sums_ends_in_time(finished):
    run = finished("client+aggregator", rounds=1, cohort_sampling="fixed")
    assert len(found(run, 400, minutes=1e-9).seen.coins) == 1


def test_rounds_are_counted_by_the_schedule_and_not_by_the_ledger(finished):
    run = finished(rounds=2, module={"clients_per_round": 1})
    client, account = run.worst()
    assert run.participations(client) * 2 == account.steps
    assert sum(run.participations(k) for k in range(3)) == 2


def test_nothing_is_audited_where_nothing_is_proven(finished):
    run = finished("abstract", rounds=1)
    with pytest.raises(ValueError, match="setting='abstract' with 3 releases: nothing is proven"):
        run.worst()
    run = finished(rounds=1, epsilon=None, noise_multiplier=0.0)
    with pytest.raises(ValueError, match="epsilon=inf"):
        run.worst()


def test_the_ledger_of_the_run_is_as_it_was(finished):
    run = finished(rounds=1)
    path = run.module.run_path / "ledger.jsonl"
    before = path.read_bytes(), sorted(p.name for p in run.module.run_path.iterdir())
    found(run, 20)
    assert before == (path.read_bytes(), sorted(p.name for p in run.module.run_path.iterdir()))


def test_equal_seeds_give_equal_audits_and_secret_ones_differ(finished):
    run = finished(rounds=1)
    one, other = found(run, 20), found(run, 20)
    np.testing.assert_array_equal(one.scores, other.scores)
    assert (found(run, 20, seed=None).scores[:20] != one.scores).any()


def test_the_curve_of_the_picture_is_the_proven_one(finished):
    audit = found(finished(rounds=1), 20)
    assert isinstance(audit.family.risk(1.0), Risk)
    assert audit.family.epsilon(1.0) == pytest.approx(audit.proven)
