"""Sums of a cohort: one noise from a trusted server, or shares of it under secure aggregation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from aadp_kernels import Layout, NoiseKey, grid, tail_cutoff
from fl_lightning import PrivacyConfig
from fl_lightning.accounting.composition import compose_epsilon
from fl_lightning.accounting.exactness import inexact_noise, noise_streams
from fl_lightning.accounting.noise_part_tails import acceptance, missing_shares
from fl_lightning.accounting.sum_costs import client_multipliers
from fl_lightning.ledger.client_reports import report_clients, undercharged
from fl_lightning.models import MLP
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.privacy.noise_parts import noise_part
from fl_lightning.privacy.noised_sum import NoisedSum
from fl_lightning.privacy.weights import event_multiplier, sum_weights
from fl_lightning.values.event import NoiseEvent
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
    base = torch.tensor([10.0, 40.0, 20.0, 40.0])
    needed = torch.tensor([2.0, 2.0, 3.0, 5.0], dtype=torch.float64)
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
        joint = ((w * clip / (sums * clip)) ** 2 + (1 / votes) ** 2).rsqrt()
    else:
        votes = z / rho if rho else math.inf
        joint = 1 / (w * clip / (sums * clip) + 1 / votes)
    torch.testing.assert_close(got, joint)


def test_votes_that_cost_the_strictest_client_too_much_are_refused() -> None:
    needed = torch.tensor([1.0, 10.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"vote_share=0\.05"):
        sum_weights(torch.ones(2), needed, mechanism="gaussian", vote_share=0.05)
    z, w = sum_weights(torch.ones(2), 0 * needed, mechanism="gaussian", vote_share=0.05)
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
    bound = missing_shares(shares, 1, gaussian=cut_g, laplace=cut_l)
    seen = missed.sum((0, 1)).mean()
    assert 0.97 * bound < seen < 1.03 * bound


def test_what_shares_cost() -> None:
    gaussian, laplace = (NoiseEvent(m, 2.0) for m in ("gaussian", "laplace"))
    streams = (1000, 24, 2)
    for event in (gaussian, laplace):
        one = inexact_noise(event, "wide", streams=streams, delta=1e-3)
        few, many = (
            inexact_noise(event, "wide", streams=streams, delta=1e-3, shares=m) for m in (2, 50)
        )
        assert one.delta < few.delta < many.delta < 1e-12
        assert few.epsilon == many.epsilon == 0
    # m shares are m times the draws of one noise, each in pairs of its own.
    assert inexact_noise(gaussian, "wide", streams=streams, delta=1e-3, shares=50) == inexact_noise(
        gaussian, "wide", streams=streams * 50, delta=1e-3
    )
    spread = inexact_noise(laplace, "wide", streams=streams, delta=0.0, shares=50).delta
    missing = missing_shares(
        50, 1026, gaussian=tail_cutoff("gaussian", "wide"), laplace=tail_cutoff("laplace", "wide")
    )
    assert spread == pytest.approx(math.exp(0.5) * missing, rel=1e-6, abs=0)
    silent = NoiseEvent("laplace", 0.0)
    assert inexact_noise(silent, "wide", streams=streams, delta=1e-3, shares=5).delta == 0


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
    want = inexact_noise(releases[0].event, "wide", streams=streams, delta=0.01, shares=4)
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
