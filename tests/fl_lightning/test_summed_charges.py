"""What sums of a cohort cost: amplification, weights, dropouts, tails of shares."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from aadp_kernels import tail_cutoff
from fl_lightning import PrivacyConfig
from fl_lightning.accounting.composition import compose_epsilon
from fl_lightning.accounting.exactness import inexact_noise, noise_streams
from fl_lightning.accounting.noise_part_tails import acceptance, missing_parts
from fl_lightning.accounting.sum_costs import client_multipliers
from fl_lightning.ledger.client_reports import report_clients, undercharged
from fl_lightning.models import MLP
from fl_lightning.values.event import NoiseEvent
from fl_lightning.values.release import ALL_CLIENTS

SUMMED = ("client+aggregator", "client+secure_sum")


# --- runs ---


def network() -> MLP:
    torch.manual_seed(0)
    return MLP(8, 3, hidden=(4,))


def test_a_poisson_cohort_is_charged_to_everyone_with_amplification(federation, fit) -> None:
    data = federation(60, clients=10)
    module = fit(
        data, network(), rounds=4, setting="client+aggregator", noise_multiplier=1.3, delta=0.01,
        module_kwargs={"clients_per_round": 3, "weighting": "uniform"},
    )  # fmt: skip
    assert len(module.ledger) == 4
    assert {line.client for line in module.ledger} == {ALL_CLIENTS}
    event = NoiseEvent("gaussian", 1.3, 0.3, "zero_out")
    reports = report_clients(module.ledger.header, module.ledger.releases)
    want = compose_epsilon({event: 4}, 0.01 - sum(r.tail_delta for r in module.ledger))
    assert [r.epsilon for r in reports.values()] == pytest.approx([want] * 10)
    assert module.run.budget.spent.tolist() == [4] * 10
    assert module.result.participants == 3


def test_a_fixed_cohort_is_charged_without_amplification(federation, fit) -> None:
    data = federation(60, clients=6)
    for setting in SUMMED:
        module = fit(
            data, network(), rounds=3, setting=setting, noise_multiplier=2.0, delta=0.01,
            cohort_sampling="fixed", module_kwargs={"clients_per_round": 2},
        )  # fmt: skip
        assert {line.sampling_rate for line in module.ledger} == {1.0}
        charged = np.bincount(np.concatenate([r.members(6) for r in module.ledger]), minlength=6)
        assert charged.tolist() == np.bincount(module.run.schedule.ravel(), minlength=6).tolist()
        assert module.run.budget.spent.tolist() == charged.tolist()


def test_personal_epsilons_become_weights(federation, fit) -> None:
    data = federation(80, clients=4)
    module = fit(
        data, network(), rounds=2, setting="client+aggregator", epsilon=[2.0, 4.0], delta=0.01,
        thresholds="fixed", module_kwargs={"weighting": "uniform"},
    )  # fmt: skip
    reports = report_clients(module.ledger.header, module.ledger.releases)
    spent = [reports[k].epsilon for k in range(4)]
    assert spent[0] == pytest.approx(2.0, rel=0.02)
    assert spent[1] == pytest.approx(4.0, rel=0.02)
    assert max(spent[0], spent[2]) <= 2.0
    assert max(spent) <= 4.0


def test_small_clients_of_a_weighted_sum_spend_less(federation, fit) -> None:
    data = federation(80, clients=3, partition="quantity", alpha=0.5, min_client_size=4)
    module = fit(
        data, network(), rounds=2, setting="client+secure_sum", noise_multiplier=3.0, delta=0.01,
        thresholds="fixed", module_kwargs={"weighting": "records"},
    )  # fmt: skip
    sizes = data.client_sizes.double()
    assert len(set(sizes.tolist())) > 1
    for line in module.ledger:
        own = client_multipliers(module.ledger.header, line)
        assert own.tolist() == pytest.approx((3.0 * sizes.max() / sizes).tolist())


def test_dropouts_are_not_charged_and_too_few_survivors_reveal_nothing(federation, fit) -> None:
    data = federation(60, clients=6)
    options = {"setting": "client+secure_sum", "noise_multiplier": 2.0, "delta": 0.01}
    module = fit(
        data, network(), rounds=8, min_survivors=4, **options,
        module_kwargs={"dropout": 0.4, "seed": 2},
    )  # fmt: skip
    survivors = [
        int((~module.rules.faults.failing(np.arange(6), round)).sum()) for round in range(8)
    ]
    assert min(survivors) < 4 <= max(survivors)
    per_round = np.bincount([line.round for line in module.ledger], minlength=8)
    assert per_round.tolist() == [int(s >= 4) for s in survivors]
    assert [len(line.members(6)) for line in module.ledger] == [s for s in survivors if s >= 4]
    with pytest.raises(ValueError, match="min_survivors=null needs the whole cohort"):
        fit(data, network(), **options, module_kwargs={"dropout": 0.4})
    with pytest.raises(ValueError, match="min_survivors=7 is more than the 6 clients"):
        fit(data, network(), min_survivors=7, **options)


def test_late_uploads_are_charged_and_not_used(federation, fit) -> None:
    data = federation(60, clients=6)
    options = {"setting": "client+local", "noise_multiplier": 0.0, "clip_norm": math.inf}
    options |= {"thresholds": "fixed"}
    patient = fit(data, network(), rounds=1, **options)
    hurried = fit(data, network(), rounds=1, **options, module_kwargs={"deadline": 1.0})
    late = hurried.rules.faults.late(np.arange(6), 0)
    assert 0 < late.sum() < 6
    assert len(hurried.ledger) == 6
    assert hurried.result.participants == 6
    a, b = (torch.cat([p.flatten() for p in m.network.parameters()]) for m in (patient, hurried))
    assert not torch.allclose(a, b)


def test_all_late_leaves_the_model_alone(federation, fit) -> None:
    data, start = federation(60, clients=3), network()
    module = fit(data, network(), rounds=1, setting="none", module_kwargs={"deadline": 1e-9})
    for name, value in start.state_dict().items():
        assert torch.equal(module.network.state_dict()[name], value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cohort_sampling": "poisson", "setting": "client+secure_sum"}, "cohort_sampling='poi"),
        ({"cohort_sampling": "poisson", "setting": "client+local"}, "cohort_sampling='poisson'"),
        ({"adjacency": "replace_one", "setting": "client+aggregator"}, "adjacency='replace_one'"),
        ({"min_survivors": 2, "setting": "client+aggregator"}, "min_survivors=2 with setting"),
        ({"min_survivors": 0, "setting": "client+secure_sum"}, "min_survivors=0"),
    ],
)
def test_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrivacyConfig(**options)


def test_a_client_that_paid_a_round_cannot_be_in_another_sum_of_it(federation, fit) -> None:
    data = federation(60, clients=3)
    module = fit(
        data, network(), rounds=2, setting="client+aggregator", epsilon=2.0, delta=0.01,
        cohort_sampling="fixed", module_kwargs={"weighting": "uniform"},
    )  # fmt: skip
    releases, ledger = module.run.releases, module.ledger
    everyone = torch.arange(3)
    params = {n: p.detach() for n, p in module.network.named_parameters()}
    assert not module.run.budget.can_pay_each(np.arange(3), 1).any()
    assert releases.can_take_part(np.arange(3), 1).all()
    lines = len(ledger)
    update = releases.release(everyone, params, 1, "other inputs")
    assert len(update.clients) == 0
    assert len(ledger) == lines


# --- what inexact noise costs ---


@pytest.mark.parametrize("survivors", [1, 2, 3, 10, 1000])
def test_the_acceptance_of_gamma_draws_is_the_integral(survivors: int) -> None:
    shape = 1 + 1 / survivors
    d = shape - 1 / 3
    x, c = np.linspace(-9, 9, 200_001), (9 * d) ** -0.5
    v = np.maximum((1 + c * x) ** 3, 1e-300)
    test = np.where(v > 1e-300, np.exp(0.5 * x**2 + d - d * v + d * np.log(v)), 0.0)
    assert test.max() <= 1 + 1e-12
    assert acceptance(shape) == pytest.approx(np.trapezoid(test * stats.norm.pdf(x), x), rel=1e-6)
    assert acceptance(shape) > 0.95


def test_shares_that_lose_their_tails_show_as_the_bound_says() -> None:
    """A coarse sampler, by simulation: how often ideal draws are beyond its cutoffs."""
    rng, elements, shares = np.random.default_rng(0), 40_000, 2
    cut_g, cut_l = 2.5, 4.0
    d = 1 + 1 / shares - 1 / 3
    c, missed = (9 * d) ** -0.5, np.zeros((2, shares, elements), dtype=bool)
    waiting = np.ones_like(missed)
    while waiting.any():
        x, y = rng.standard_normal((2, *missed.shape))
        e = rng.exponential(size=missed.shape)
        missed |= waiting & ((np.hypot(x, y) > cut_g) | (e > cut_l))
        v = np.maximum((1 + c * x) ** 3, 1e-300)
        waiting &= -e >= 0.5 * x**2 + d - d * v + d * np.log(v)
    missed |= rng.exponential(size=missed.shape) > cut_l
    bound = missing_parts(shares, 1, gaussian=cut_g, laplace=cut_l)
    seen = missed.sum((0, 1)).mean()
    assert 0.97 * bound < seen < 1.03 * bound


def test_what_shares_cost() -> None:
    gaussian, laplace = (NoiseEvent(m, 2.0) for m in ("gaussian", "laplace"))
    streams = (1000, 24, 2)
    for event in (gaussian, laplace):
        one = inexact_noise(event, "wide", streams=streams, delta=1e-3)
        few, many = (
            inexact_noise(event, "wide", streams=streams, delta=1e-3, noise_parts=m)
            for m in (2, 50)
        )
        assert one.delta < few.delta < many.delta < 1e-12
        assert few.epsilon == many.epsilon == 0
    # m shares are m times the draws of one noise, each in pairs of its own.
    assert inexact_noise(
        gaussian, "wide", streams=streams, delta=1e-3, noise_parts=50
    ) == inexact_noise(gaussian, "wide", streams=streams * 50, delta=1e-3)
    spread = inexact_noise(laplace, "wide", streams=streams, delta=0.0, noise_parts=50).delta
    missing = missing_parts(
        50, 1026, gaussian=tail_cutoff("gaussian", "wide"), laplace=tail_cutoff("laplace", "wide")
    )
    assert spread == pytest.approx(math.exp(0.5) * missing, rel=1e-6, abs=0)
    silent = NoiseEvent("laplace", 0.0)
    assert inexact_noise(silent, "wide", streams=streams, delta=1e-3, noise_parts=5).delta == 0


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_the_tails_of_every_share_are_charged_and_verified(federation, fit, mechanism) -> None:
    data = federation(60, clients=6)
    module = fit(
        data, network(), rounds=2, setting="client+secure_sum", mechanism=mechanism, epsilon=8.0,
        delta=0.01, min_survivors=4, thresholds="fixed",
    )  # fmt: skip
    header, releases = module.ledger.header, module.ledger.releases
    assert header["min_survivors"] == 4
    assert undercharged(header, releases) == []
    streams = noise_streams(header["dims"], votes=False)
    want = inexact_noise(releases[0].event, "wide", streams=streams, delta=0.01, noise_parts=4)
    assert releases[0].tail_delta == want.delta > 0
    alone = inexact_noise(releases[0].event, "wide", streams=streams, delta=0.01)
    assert alone.delta < want.delta
    (problem, *_) = undercharged(header, [replace(releases[0], tail_delta=alone.delta)])
    assert "tail_delta" in problem
    assert all(r.epsilon <= 8.0 for r in report_clients(header, releases).values())


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize("form", ["fast", "grid"])
def test_forms_of_a_trusted_sum_are_charged_and_verified(federation, fit, mechanism, form) -> None:
    data = federation(80, clients=5, partition="quantity", alpha=0.5, min_client_size=4)
    module = fit(
        data, network(), rounds=2, setting="client+aggregator", mechanism=mechanism, epsilon=8.0,
        delta=0.01, noise_form=form, module_kwargs={"weighting": "records"},
    )  # fmt: skip
    header, releases = module.ledger.header, module.ledger.releases
    assert undercharged(header, releases) == []
    name = "epsilon_inflation" if form == "grid" else "tail_delta"
    assert all(getattr(r, name) > 0 for r in releases)
    assert undercharged(header, [replace(releases[0], **{name: 0.0})])
    assert all((r.quantum or 0) > 0 for r in releases) == (form == "grid")
    assert all(r.epsilon <= 8.0 for r in report_clients(header, releases).values())


def test_a_trusted_sum_on_the_grid_may_have_delta_zero(federation, fit) -> None:
    module = fit(
        federation(60, clients=6), network(), rounds=2, setting="client+aggregator", epsilon=8.0,
        mechanism="laplace", noise_form="grid", delta=0.0, cohort_sampling="fixed",
    )  # fmt: skip
    reports = report_clients(module.ledger.header, module.ledger.releases)
    assert {r.delta for r in reports.values()} == {0.0}
    assert 7.5 < max(r.epsilon for r in reports.values()) <= 8.0
