"""Noise of every mechanism and setting against the distribution that the formulas ask for."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fl_lightning import PrivacyConfig
from fl_lightning.models import MLP

ACCEPT, REJECT = 1e-3, 1e-6
NAN = float("nan")

CASES = [
    {"setting": "record+local", "mechanism": "gaussian", "thresholds": "quantile"},
    {"setting": "record+local", "mechanism": "gaussian", "thresholds": "fixed"},
    {"setting": "record+local", "mechanism": "gaussian", "thresholds": "released"},
    {"setting": "record+local", "mechanism": "gaussian", "clip_order": 1},
    {"setting": "record+local", "mechanism": "laplace", "thresholds": "quantile"},
    {"setting": "record+local", "mechanism": "laplace", "thresholds": "released"},
    {"setting": "client+local", "mechanism": "gaussian", "thresholds": "released"},
    {"setting": "client+local", "mechanism": "gaussian", "clip_norm": [0.2, 3.0, 1.0]},
    {"setting": "client+local", "mechanism": "laplace", "thresholds": "released"},
    {"setting": "client+local", "mechanism": "laplace", "allocation": "mse"},
    {"setting": "abstract", "mechanism": "gaussian"},
    {"setting": "abstract", "mechanism": "laplace", "clip_norm": [0.2, 3.0, 1.0]},
]
VOTING = [case for case in CASES if case.get("thresholds") == "quantile"]


def case_name(case):
    return "-".join(str(v) for v in case.values())


def assert_scale(sample, mechanism, scale):
    """KS test: the given scale is accepted; 2/3 and 3/2 of it are rejected."""
    exact = stats.norm if mechanism == "gaussian" else stats.laplace
    sample = np.asarray(sample, dtype=np.float64).ravel()
    assert stats.kstest(sample / scale, exact.cdf).pvalue > ACCEPT
    for factor in (2 / 3, 3 / 2):
        assert stats.kstest(sample / (factor * scale), exact.cdf).pvalue < REJECT


def formula_scales(config, z, clip, shares):
    """Noise scale of each layer [L] and of the votes, from the formulas, in plain floats."""
    layers, rho = len(clip), config.vote_share
    double = 1.0 if config.setting == "record+local" else 2.0
    votes = None
    if config.thresholds == "quantile" or (
        config.setting == "record+local"
        and config.mechanism == "gaussian"
        and config.thresholds == "default"
    ):
        if config.mechanism == "gaussian":
            votes = z * math.sqrt(layers) / (2 * math.sqrt(rho))
            z = z / math.sqrt(1 - rho)
        else:
            # 1/lambda_total = 1/lambda + L/(2 beta), with the votes' part rho.
            votes = layers * z / (2 * rho)
            z = 1 / (1 / z - layers / (2 * votes))
    power = 0.5 if config.mechanism == "gaussian" else 1.0
    return [double * z * c / p**power for c, p in zip(clip, shares, strict=True)], votes


def make_network():
    torch.manual_seed(0)
    return MLP(in_features=8, hidden=(30, 40), num_classes=3)


def joined(update, network, layer):
    """All coordinates of one layer, [clients, d]."""
    names = [n for n, _ in network.named_parameters()]
    layers = sorted({n.rpartition(".")[0] for n in names})
    mine = [n for n in names if n.startswith(layers[layer] + ".")]
    return torch.cat([update[n].double().flatten(1) for n in mine], 1)


def config_of(case, z=0.8):
    return PrivacyConfig(**case, epsilon=None, noise_multiplier=z, seed=3)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_releases_are_the_unnoised_update_plus_exactly_scaled_noise(
    federation, population, global_params, case
):
    """End to end through a release: the same run without noise gives the private part.

    Three rounds: policies of the later ones come from released history, and the smallest layer
    gives enough noise to tell its scale from two thirds of it.
    """
    config, lr, rate, z = config_of(case), 0.05, 0.5, 0.8
    network, everyone, data = make_network(), torch.arange(6), federation(72, clients=6)
    noisy = population(data, network, config, lr=lr, sampling_rate=rate)
    silent = population(data, network, config, lr=lr, sampling_rate=rate)
    params = global_params(network)
    noise = {layer: [] for layer in range(3)}
    for round in range(3):
        silent.books.history.load_state_dict(noisy.books.history.state_dict())
        # Coins hang on the multiplier too, so silence is put in where the noise is drawn.
        release = noisy.release(everyone, params, round, "x")
        with pytest.MonkeyPatch.context() as patch:
            policy = silent.books.history.policy

            def without_noise(ids, multiplier, policy=policy):
                made = policy(ids, multiplier)
                made.noise_scale.zero_()
                return made

            patch.setattr(silent.books.history, "policy", without_noise)
            private = silent.release(everyone, params, round, "x")
        lines = [noisy.books.ledger.find(k, round)[0] for k in range(6)]
        for layer in range(3):
            difference = joined(release.update, network, layer) - joined(
                private.update, network, layer
            )
            for k, line in enumerate(lines):
                scales, votes = formula_scales(config, z, line.clip_norm, line.shares)
                assert (line.vote_noise_scale is None) == (votes is None)
                if votes is not None:
                    assert line.vote_noise_scale == pytest.approx(votes)
                batch = rate * 12
                unit = lr / batch if config.setting == "record+local" else 1.0
                noise[layer].append(difference[k] / (unit * scales[layer]))
    for layer, parts in noise.items():
        sample = torch.cat(parts)
        assert_scale(sample, config.mechanism, 1.0)
        if layer == 1:
            rows = torch.stack(parts)[:, :500]
            apart = np.corrcoef(rows.numpy()) - np.eye(len(parts))
            assert np.abs(apart).max() < 5 / math.sqrt(500)


@pytest.mark.parametrize("case", VOTING, ids=case_name)
def test_released_votes_carry_exactly_scaled_noise(federation, population, global_params, case):
    """Records that are not finite vote 0, so what moves M is the noise alone."""
    clients, each, z, eta, lr = 1000, 4, 0.01, 0.2, 1.0
    data = federation(clients * each, clients=clients, fill=NAN)
    config, network = config_of(case, z), make_network()
    part = population(data, network, config, lr=lr)
    before = part.books.history.l1_norm.clone()
    update = part.release(torch.arange(clients), global_params(network), 0, "x")
    moved = (part.books.history.l1_norm / before).log()
    votes = -each * moved / eta
    clip, shares = update.policy.clip_norm[0].tolist(), update.policy.shares[0].tolist()
    scales, sigma = formula_scales(config, z, clip, shares)
    assert_scale(votes, config.mechanism, sigma)
    # Without a single finite record the sums are nothing but noise as well.
    for layer, scale in enumerate(scales):
        sums = -joined(update.update, network, layer) * each / lr
        assert_scale(sums[:40], config.mechanism, scale)
    assert update.sim_only["nonfinite"].tolist() == [float(each)] * clients


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_the_ledger_charges_what_the_noise_is_worth(
    federation, population, global_params, case, steps
):
    """One joint event: sensitivities over actual noise, votes included, come to 1/z."""
    expected_steps = steps if case["setting"] == "record+local" else 1
    config, network = config_of(case, 0.6), make_network()
    part = population(federation(), network, config, sampling_rate=0.5, local_steps=steps)
    params = global_params(network)
    for round in range(2):
        update = part.release(torch.arange(3), params, round, "x")
        for k in range(3):
            (line,) = part.books.ledger.find(k, round)
            assert line.steps == expected_steps
            assert line.first_step == round * expected_steps
            assert line.sampling_rate == (0.5 if config.unit == "record" else 1.0)
            assert line.guarantee == (config.setting != "abstract")
            assert line.clip_norm == tuple(update.policy.clip_norm[k].tolist())
            assert line.shares == tuple(update.policy.shares[k].tolist())
            double = 1.0 if config.setting == "record+local" else 2.0
            worth = [
                double * c / s
                for c, s in zip(line.clip_norm, update.policy.noise_scale[k].tolist(), strict=True)
            ]
            if line.vote_noise_scale is not None:
                worth += [0.5 / line.vote_noise_scale] * 3
            if config.mechanism == "gaussian":
                total = math.sqrt(sum(w * w for w in worth))
            else:
                total = sum(worth)
            assert total == pytest.approx(1 / line.noise_multiplier, rel=1e-9)
            assert line.noise_multiplier == 0.6
    assert part.books.budget.spent.tolist() == [2 * expected_steps] * 3


def test_personal_multipliers_scale_the_noise_of_their_own_clients(
    federation, population, global_params
):
    config = PrivacyConfig(
        setting="client+local", epsilon=None, noise_multiplier=[0.5, 2.0], thresholds="fixed",
        allocation="uniform", seed=1,
    )  # fmt: skip
    network = make_network()
    part = population(federation(fill=NAN), network, config)
    update = part.release(torch.arange(3), global_params(network), 0, "x").update
    for client, z in enumerate((0.5, 2.0, 0.5)):
        sample = joined(update, network, 1)[client]
        assert_scale(sample, "gaussian", 2 * z * (1 / math.sqrt(3)) * math.sqrt(3))


def test_noise_is_fresh_in_every_step_round_and_for_every_input(
    federation, population, global_params
):
    config = PrivacyConfig(epsilon=None, noise_multiplier=1.0, thresholds="fixed", seed=1)
    network, ids = make_network(), torch.arange(3)
    data = federation(fill=NAN)
    params = global_params(network)
    other = {n: v + 1e-6 for n, v in params.items()}
    samples = []
    for args in [(params, 0, "x"), (params, 1, "x"), (params, 0, "y"), (other, 0, "x")]:
        update = population(data, network, config).release(ids, *args).update
        samples += list(joined(update, network, 1))
    again = population(data, network, config).release(ids, params, 0, "x").update
    assert torch.equal(joined(again, network, 1)[0], samples[0])
    two = population(data, network, config, local_steps=2).release(ids, params, 0, "x").update
    samples.append(joined(two, network, 1)[0] - samples[0])
    apart = np.corrcoef(torch.stack(samples).numpy()) - np.eye(len(samples))
    assert np.abs(apart).max() < 5 / math.sqrt(len(samples[0]))


@pytest.mark.parametrize("setting", ["record+local", "client+local"])
def test_tensors_layers_and_clients_share_no_noise(federation, population, global_params, setting):
    """Beginnings of all tensors of all clients, and tails against beginnings, are unrelated."""
    config = PrivacyConfig(
        setting=setting, epsilon=None, noise_multiplier=1.0, thresholds="fixed", seed=1
    )
    network = make_network()
    part = population(federation(fill=NAN), network, config)
    update = part.release(torch.arange(3), global_params(network), 0, "x").update
    rows = [row[:30] for value in update.values() for row in value.flatten(1) if len(row) >= 30]
    rows += [row[-30:] for value in update.values() for row in value.flatten(1) if len(row) > 90]
    assert len(rows) >= 20
    apart = np.corrcoef(torch.stack(rows).numpy()) - np.eye(len(rows))
    assert np.abs(apart).max() < 0.8


@pytest.mark.parametrize("setting", ["record+local", "client+local", "abstract"])
def test_other_private_values_never_meet_the_same_noise(
    federation, population, global_params, setting
):
    """Even where the caller's context is the same, so that a difference would show the records."""
    config = PrivacyConfig(
        setting=setting, epsilon=None, noise_multiplier=50.0, thresholds="fixed", seed=1
    )
    network = make_network()
    datasets = [federation(), federation(change=lambda x, y: x.mul_(1.001))]
    rows = []
    for data in datasets:
        part = population(data, network, config)
        update = part.release(torch.arange(3), global_params(network), 0, "x").update
        rows += list(joined(update, network, 1))
    apart = np.corrcoef(torch.stack(rows).numpy()) - np.eye(len(rows))
    assert np.abs(apart).max() < 5 / math.sqrt(len(rows[0]))


def test_replaying_a_release_gives_the_same_bytes_and_costs_nothing(
    federation, population, global_params
):
    config = PrivacyConfig(epsilon=None, noise_multiplier=1.0, seed=1)
    network, ids = make_network(), torch.arange(3)
    part, params = population(federation(), network, config), global_params(network)
    start = part.books.history.state_dict()
    first = part.release(ids, params, 0, "x")
    after = part.books.history.state_dict()
    part.books.history.load_state_dict(start)
    again = part.release(ids, params, 0, "x")
    assert len(part.books.ledger) == 3
    assert part.books.budget.spent.tolist() == [1] * 3
    for name, value in first.update.items():
        assert torch.equal(again.update[name], value)
    for name, value in after.items():
        assert torch.equal(part.books.history.state_dict()[name], value)
    part.books.history.load_state_dict(start)
    part.release(ids, {n: v + 1e-6 for n, v in params.items()}, 0, "x")
    assert len(part.books.ledger) == 6
    assert part.books.budget.spent.tolist() == [2] * 3
    assert [line.attempt for line in part.books.ledger.find(0, 0)] == [0, 1]


def test_a_client_that_cannot_pay_releases_nothing_and_keeps_its_history(
    federation, population, global_params
):
    config = PrivacyConfig(epsilon=None, noise_multiplier=1.0, seed=1)
    network = make_network()
    part = population(federation(), network, config)
    part.books.budget.affordable[1] = 0
    start = part.books.history.state_dict()
    update = part.release(torch.arange(3), global_params(network), 0, "x")
    assert update.clients.tolist() == [0, 2]
    assert all(len(v) == 2 for v in update.update.values())
    assert len(update.events) == len(update.policy.clip_norm) == 2
    assert [line.client for line in part.books.ledger] == [0, 2]
    now = part.books.history.state_dict()
    for name in start:
        assert torch.equal(now[name][1], start[name][1])
    assert not torch.equal(now["l1_norm"][0], start["l1_norm"][0])
    assert part.can_take_part(np.arange(2), 1).tolist() == [True, False]


# Records that are not finite ---------------------------------------------------------------------


SETTINGS = {
    "none": {},
    "record+local": {"noise_multiplier": 0.0, "clip_norm": 1e3, "thresholds": "fixed"},
    "client+local": {"noise_multiplier": 0.0, "clip_norm": 1e3, "thresholds": "fixed"},
    "abstract": {"noise_multiplier": 0.0, "clip_norm": 1e3},
}


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("execution", ["vmap", "loop"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_client_that_is_not_finite_contributes_nothing(federation, fit, setting, bad, execution):
    """Client 1 holds only bad records: the model is as if its update had been zero."""
    clean = federation(partition="dirichlet")
    rows = torch.from_numpy(clean.partition.client(1).copy())
    data = federation(partition="dirichlet", change=lambda x, y: x.index_fill_(0, rows, bad))
    torch.manual_seed(0)
    # Linear: an infinity comes through to the loss instead of vanishing in a saturated tanh.
    start = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3))
    module = fit(
        data, start, rounds=1, setting=setting, **SETTINGS[setting],
        module_kwargs={"sampling_rate": 1.0, "client_lr": 0.3, "execution": execution},
    )  # fmt: skip
    assert all(bool(p.isfinite().all()) for p in module.network.parameters())
    assert module.result.nonfinite >= 1
    if setting == "record+local":
        assert module.result.nonfinite == int(data.client_sizes[1])

    torch.manual_seed(0)
    want = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3))
    mean = {n: torch.zeros_like(p) for n, p in want.named_parameters()}
    share = data.client_sizes / data.client_sizes.sum()
    for k in (0, 2):
        own = torch.from_numpy(data.partition.client(k).copy())
        loss = nn.functional.cross_entropy(want(data.x[own]), data.y[own])
        grads = torch.autograd.grad(loss, list(want.parameters()))
        for total, g in zip(mean.values(), grads, strict=True):
            total -= 0.3 * share[k] * g
    for (name, value), got in zip(
        want.named_parameters(), module.network.parameters(), strict=True
    ):
        torch.testing.assert_close(
            got.detach(), value.detach() + mean[name], rtol=1e-4, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_one_bad_record_leaves_the_others_of_its_client(federation, fit, bad):
    """Under record+local the rest of the client still trains, also when record 0 is bad."""
    change = {"change": lambda x, y: x[0].fill_(bad)}
    data = federation(20, clients=1, **change)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 3))
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    module = fit(
        data, network, rounds=1, setting="record+local", noise_multiplier=0.0, clip_norm=100.0,
        thresholds="fixed", module_kwargs={"sampling_rate": 1.0, "client_lr": 1.0},
    )  # fmt: skip
    assert module.result.nonfinite == 1
    good = ~(data.x.isnan() | data.x.isinf()).any(1)
    weight = before["0.weight"].clone().requires_grad_()
    loss = nn.functional.cross_entropy(
        data.x[good] @ weight.T + before["0.bias"], data.y[good], reduction="sum"
    )
    (grad,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(
        module.network[0].weight.detach(), before["0.weight"] - grad / 20, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize("setting", ["record+local", "client+local", "abstract"])
@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_noised_rounds_stay_finite(federation, fit, setting, mechanism, bad):
    data = federation(change=lambda x, y: x[: len(x) // 2].fill_(bad))
    module = fit(
        data, make_network(), rounds=3, setting=setting, mechanism=mechanism,
        noise_multiplier=0.5, module_kwargs={"sampling_rate": 0.5, "local_steps": 2},
    )  # fmt: skip
    assert all(bool(p.isfinite().all()) for p in module.network.parameters())
    for value in module.run.history.state_dict().values():
        assert bool(value.isfinite().all())
    assert np.isfinite(module.result.clip_norm).all()
    assert module.result.nonfinite >= 1
