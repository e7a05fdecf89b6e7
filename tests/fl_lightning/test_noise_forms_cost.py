"""What the forms of the noise cost, and what the ledger says of it."""

import math

import pytest
import torch
from scipy import stats

from aadp_kernels import grid_law
from fl_lightning import PrivacyConfig
from fl_lightning.accounting.budget import Budget
from fl_lightning.accounting.composition import calibrate, compose_epsilon
from fl_lightning.accounting.exactness import grid_errors, inexact_noise
from fl_lightning.ledger import report, verify
from fl_lightning.ledger.statement import privacy_statement
from fl_lightning.models import MLP
from fl_lightning.values.event import NoiseEvent

MECHANISMS = ("gaussian", "laplace")


# Cost ---------------------------------------------------------------------------------------------


def test_grid_errors_in_numbers():
    event = NoiseEvent("gaussian", 0.5)
    got = grid_errors(event, 1e-9, 3e-19, cutoff=10.0, elements=10_000, delta=1e-5)
    leaves = 100 * (stats.norm.sf(8.0) - stats.norm.sf(10.0))
    assert got.epsilon == 1e-9
    assert got.delta == pytest.approx(3e-19 + leaves + 1e-5 * 0.5e-9, rel=1e-6, abs=0)
    laplace = NoiseEvent("laplace", 0.5)
    got = grid_errors(laplace, 1e-9, 0.0, cutoff=math.inf, elements=10_000, delta=0.0)
    assert (got.epsilon, got.delta) == (1e-9, 0.0)
    got = grid_errors(laplace, 1e-9, 0.0, cutoff=math.inf, elements=10_000, delta=1e-5)
    assert got.delta == pytest.approx(0.5e-14, rel=1e-6, abs=0)
    assert (
        grid_errors(
            NoiseEvent("gaussian", 0.05), 0.0, 0.0, cutoff=10.0, elements=9, delta=0.0
        ).delta
        == 1
    )


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_inexactness_of_the_kernels_is_what_is_charged(mechanism):
    event = NoiseEvent(mechanism, 1.0)
    extra = inexact_noise(event, "grid", streams=(1000, 24), delta=1e-6)
    inflation, tail = grid_law.inexactness(mechanism, 1024)
    assert extra.epsilon == inflation > 0
    assert tail <= extra.delta < 1e-12


@pytest.mark.parametrize("setting", ["record+local", "client+local"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_epsilon_with_the_grid_is_the_continuous_one_plus_the_inflation(
    federation, population, global_params, setting, mechanism
):
    config = PrivacyConfig(
        setting=setting, mechanism=mechanism, noise_form="grid", epsilon=None,
        noise_multiplier=2.0, delta=1e-3, seed=1,
    )  # fmt: skip
    torch.manual_seed(0)
    network = MLP(in_features=8, hidden=(5,), num_classes=3)
    part = population(federation(), network, config, local_steps=2)
    for round in range(3):
        part.release(torch.arange(3), global_params(network), round, "x")
    steps = 6 if setting == "record+local" else 3
    votes = 2 if config.resolved_thresholds == "quantile" else 0
    inflation, _ = grid_law.inexactness(mechanism, 45 + 18 + votes)
    event = NoiseEvent(mechanism, 2.0, 1.0, config.resolved_adjacency)
    for line in part.books.ledger:
        assert line.epsilon_inflation == pytest.approx(line.steps * inflation, rel=1e-12, abs=0)
    (facts, *_) = report(part.books.ledger.path).values()
    charged = 1e-5 - math.fsum(line.tail_delta for line in part.books.ledger if line.client == 0)
    assert charged < 1e-5
    assert charged == pytest.approx(1e-5, rel=1e-6)
    exact = compose_epsilon({event: steps}, charged)
    assert facts.epsilon - exact == pytest.approx(steps * inflation, rel=1e-3, abs=2e-15)
    assert facts.epsilon >= compose_epsilon({event: steps}, 1e-5) + steps * inflation


def test_pure_epsilon_of_a_whole_run(federation, fit, tmp_path):
    """delta 0: the target is kept with the inflation, and the statement says in floating point."""
    torch.manual_seed(0)
    module = fit(
        federation(), MLP(in_features=8, hidden=(5,), num_classes=3), rounds=3,
        setting="client+local", mechanism="laplace", noise_form="grid", epsilon=4.0, delta=0.0,
    )  # fmt: skip
    plain = calibrate(mechanism="laplace", sampling_rate=1.0, steps=3, epsilon=4.0, delta=0.0)
    assert float(module.run.budget.multiplier[0]) > plain == 0.75
    assert verify(module.ledger.path) == []
    inflation, _ = grid_law.inexactness("laplace", 63)
    for client in report(module.ledger.path).values():
        assert client.delta == 0.0
        exact = 3 / float(module.run.budget.multiplier[0]) + 3 * inflation
        assert client.epsilon == pytest.approx(exact, rel=1e-15)
        assert 4.0 * (1 - 1e-11) <= client.epsilon <= 4.0
    text = privacy_statement(module.ledger)
    assert "Floating point: noise form `grid`" in text
    assert f"epsilon {3 * inflation:.4g} (largest client), delta 0 (largest client)" in text
    assert "Exact gradients" not in text
    assert "Real arithmetic" not in text


def test_calibration_leaves_room_for_the_inflation():
    config = PrivacyConfig(noise_form="grid", epsilon=1.0)
    dims = (3_000_000_000,)
    budget = Budget(config, [10], 1.0, dims)
    budget.calibrate(1)
    wide = Budget(PrivacyConfig(epsilon=1.0), [10], 1.0, dims)
    wide.calibrate(1)
    inflation, _ = grid_law.inexactness("gaussian", sum(budget.streams))
    assert inflation > 1e-4
    ratio = float(budget.multiplier[0] / wide.multiplier[0])
    assert 1 + 5 * inflation < ratio < 1 + 20 * inflation


def test_verify_finds_what_is_not_charged(federation, fit):
    import dataclasses
    from pathlib import Path

    from fl_lightning.ledger import Ledger, read

    module = fit(
        federation(), MLP(in_features=8, hidden=(5,), num_classes=3), rounds=2,
        noise_multiplier=1.0, noise_form="grid",
    )  # fmt: skip
    path = Path(module.ledger.path)
    assert verify(path) == []
    header, releases = read(path)
    for name in ("epsilon_inflation", "tail_delta"):
        cheap = [*releases[:-1], dataclasses.replace(releases[-1], **{name: 0.0})]
        with Ledger.create(path.parent / name, header) as ledger:
            ledger.append(cheap)
        (problem,) = verify(path.parent / name)
        assert problem.startswith(f"line {len(releases) + 1} charges {name} 0 for 1 steps of form")
