"""Without noise and clipping every setting is FedAvg."""

import copy
import math

import numpy as np
import pytest
import torch

from aadp_kernels import poisson_mask
from fl_lightning.module import cross_entropy
from tests.fl_lightning.small_networks import Normalised, build, cnn, mlp

OPEN = {"noise_multiplier": 0.0, "clip_norm": math.inf, "thresholds": "fixed"}
UNEQUAL = {"shape": (1, 8, 8), "clients": 4, "partition": "dirichlet", "min_client_size": 5}


def assert_same_model(got, want, **tolerance):
    tolerance = {"rtol": 1e-4, "atol": 2e-6, **tolerance}
    for (name, a), b in zip(got.named_parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda text, n=name: f"{n}: {text}")


def minibatches(data, k, round, *, batch_size, epochs, seed):
    """Public shuffles, written out once more."""
    rows = data.partition.client(k)
    generator = np.random.default_rng([seed, round, k])
    for _ in range(epochs):
        order = rows[generator.permutation(len(rows))]
        yield from (order[i : i + batch_size] for i in range(0, len(rows), batch_size))


def fedavg(data, network, *, rounds, lr, momentum, batches, cohorts=None, weight=None):
    """FedAvg with torch.optim.SGD at every client of a round's cohort; all by default.

    The mean is over the cohort, or a sum over the public `weight` of what was expected.
    """
    network = copy.deepcopy(network)
    for round in range(rounds):
        cohort = range(data.num_clients) if cohorts is None else cohorts[round]
        share = data.client_sizes / (weight or sum(data.client_sizes[k] for k in cohort))
        missing = 1 - sum(float(share[k]) for k in cohort)
        total = {n: missing * p.detach() for n, p in network.named_parameters()}
        for k in cohort:
            local = copy.deepcopy(network)
            optimizer = torch.optim.SGD(local.parameters(), lr=lr, momentum=momentum)
            for rows in batches(k, round):
                optimizer.zero_grad()
                cross_entropy(local(data.x[rows]), data.y[rows]).mean().backward()
                optimizer.step()
            for name, value in local.named_parameters():
                total[name] += share[k] * value.detach()
        network.load_state_dict(total)
    return network


@pytest.mark.parametrize(
    ("make", "execution"),
    [
        (cnn, "vmap"),
        pytest.param(mlp, "loop", marks=pytest.mark.slow),
        pytest.param(mlp, "vmap", marks=pytest.mark.slow),
        pytest.param(cnn, "loop", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "privacy",
    [
        {"setting": "none"},
        {"setting": "client+local", **OPEN},
        {"setting": "client+local", "mechanism": "laplace", **OPEN},
        {"setting": "client+aggregator", **OPEN},
        {"setting": "client+aggregator", "mechanism": "laplace", **OPEN},
        {"setting": "client+aggregator", "cohort_sampling": "fixed", **OPEN},
        {"setting": "client+secure_sum", **OPEN},
        {"setting": "client+secure_sum", "mechanism": "laplace", **OPEN},
        {"setting": "abstract", **OPEN},
        {"setting": "abstract", "mechanism": "laplace", **OPEN},
    ],
    ids=lambda p: "-".join(str(v) for n, v in p.items() if n not in OPEN),
)
def test_minibatch_settings_are_fedavg(federation, fit, privacy, make, execution):
    data = federation(**UNEQUAL)
    want = fedavg(
        data, build(make), rounds=3, lr=0.3, momentum=0.5,
        batches=lambda k, r: minibatches(data, k, r, batch_size=7, epochs=2, seed=11),
    )  # fmt: skip
    training = {
        "sampling_rate": None,
        "batch_size": 7,
        "local_steps": None,
        "local_epochs": 2,
        "client_lr": 0.3,
        "client_momentum": 0.5,
        "seed": 11,
        "execution": execution,
    }
    module = fit(data, build(make), rounds=3, module_kwargs=training, **privacy)
    assert_same_model(module.network, want)


SOME = {
    "sampling_rate": None, "batch_size": 7, "local_steps": None, "client_lr": 0.3, "seed": 11
}  # fmt: skip


def some(data, *, cohorts, weight=None):
    """FedAvg of `SOME` with cohorts of a round."""
    return fedavg(
        data, build(mlp), rounds=len(cohorts), lr=0.3, momentum=0.0, cohorts=cohorts, weight=weight,
        batches=lambda k, r: minibatches(data, k, r, batch_size=7, epochs=1, seed=11),
    )  # fmt: skip


@pytest.mark.parametrize(
    "privacy",
    [
        {"setting": "none"},
        {"setting": "client+local", **OPEN},
        {"setting": "client+aggregator", "cohort_sampling": "fixed", **OPEN},
        {"setting": "client+secure_sum", **OPEN},
        {"setting": "abstract", **OPEN},
    ],
    ids=lambda p: p["setting"],
)
def test_public_cohorts_are_fedavg(federation, fit, privacy):
    data = federation(**UNEQUAL)
    module = fit(
        data, build(mlp), rounds=4, module_kwargs=SOME | {"clients_per_round": 2}, **privacy
    )
    cohorts = module.run.schedule.tolist()
    assert len({tuple(sorted(c)) for c in cohorts}) > 1
    assert_same_model(module.network, some(data, cohorts=cohorts))


def test_secret_cohorts_are_fedavg_with_public_denominators(federation, fit, monkeypatch):
    """Whoever came, the sum is divided by the records that were expected."""
    data, cohorts = federation(**UNEQUAL), []

    def listen(*args, **kwargs):
        mask = poisson_mask(*args, **kwargs)
        cohorts.append(mask.nonzero()[:, 0].tolist())
        return mask

    monkeypatch.setattr("fl_lightning.release.summed.poisson_mask", listen)
    options = SOME | {"clients_per_round": 2}
    module = fit(
        data, build(mlp), rounds=8, module_kwargs=options, setting="client+aggregator", **OPEN
    )
    assert {len(c) for c in cohorts} - {2}, "the number of clients must vary"
    weight = float(data.client_sizes.sum()) / 2
    assert_same_model(module.network, some(data, cohorts=cohorts, weight=weight))


@pytest.mark.parametrize("setting", ["client+aggregator", "client+secure_sum"])
def test_survivors_of_a_round_are_fedavg(federation, fit, setting):
    data = federation(**UNEQUAL)
    privacy = OPEN | {"setting": setting, "cohort_sampling": "fixed"}
    if setting == "client+secure_sum":
        privacy |= {"min_survivors": 1}
    module = fit(data, build(mlp), rounds=4, module_kwargs=SOME | {"dropout": 0.4}, **privacy)
    everyone = np.arange(4)
    cohorts = [everyone[~module.rules.faults.failing(everyone, r)].tolist() for r in range(4)]
    assert 0 < min(map(len, cohorts)) < 4
    assert_same_model(module.network, some(data, cohorts=cohorts))


@pytest.mark.parametrize("make", [pytest.param(mlp, marks=pytest.mark.slow), cnn, Normalised])
@pytest.mark.parametrize(
    "privacy",
    [
        {"setting": "none"},
        {"setting": "record+local", **OPEN},
        {"setting": "record+local", "mechanism": "laplace", **OPEN},
        {"setting": "record+local", "adjacency": "replace_one", **OPEN},
        {"setting": "record+local", "noise_multiplier": 0.0, "clip_norm": 1e6},
        {"setting": "client+local", **OPEN},
        {"setting": "client+aggregator", **OPEN},
        {"setting": "client+aggregator", "noise_multiplier": 0.0, "clip_norm": 1e6},
        {"setting": "client+secure_sum", **OPEN},
    ],
    ids=[
        *("none", "gaussian", "laplace", "replace_one", "votes"),
        *("client", "aggregator", "aggregator-votes", "secure_sum"),
    ],
)
def test_full_batch_settings_are_fedavg_with_momentum(federation, fit, privacy, make):
    data = federation(**UNEQUAL)
    want = fedavg(
        data, build(make), rounds=2, lr=0.2, momentum=0.9,
        batches=lambda k, r: [data.partition.client(k)] * 3,
    )  # fmt: skip
    training = {
        "sampling_rate": 1.0,
        "local_steps": 3,
        "client_lr": 0.2,
        "client_momentum": 0.9,
    }
    module = fit(data, build(make), rounds=2, module_kwargs=training, **privacy)
    assert_same_model(module.network, want)
    if privacy["setting"] != "none":
        assert not module.result.clipped_fraction.any()
        assert np.isinf(module.result.epsilon_spent).all()


@pytest.mark.parametrize("setting", ["record+local", "client+local", "none"])
def test_memory_budget_does_not_change_the_model(federation, fit, setting):
    data = federation(28, **UNEQUAL)
    privacy = {"setting": setting, "noise_multiplier": 0.0, "clip_norm": 0.5}
    models = [
        fit(
            data,
            build(cnn),
            rounds=1,
            module_kwargs={"sampling_rate": 1.0, "local_steps": 2, "memory_budget": budget},
            **privacy,
        )
        for budget in (1.0, 1e-4, 1e-9)
    ]
    assert models[0].run.releases.clients.at_once >= 4
    assert models[-1].run.releases.clients.at_once == models[-1].run.max_examples == 1
    for small in models[1:]:
        assert_same_model(small.network, models[0].network, atol=1e-5)
