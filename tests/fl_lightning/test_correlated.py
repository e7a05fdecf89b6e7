"""Rounds that share noise: what a whole run costs each client."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aadp_kernels import factorization
from fl_lightning import PrivacyConfig
from fl_lightning.accounting.budget import Budget
from fl_lightning.accounting.cohort import cohort_schedule
from fl_lightning.accounting.correlated import CorrelatedPlan, best_for, moves, whole_run
from fl_lightning.accounting.exactness import SamplerCost, charged_epsilon
from fl_lightning.server.optimizer import weights_in_last_model
from fl_lightning.values.event import NoiseEvent
from tests.fl_lightning.correlated_values import BANDED, dense

# --- what a run costs ---


@pytest.mark.parametrize("power", [0.5, 0.94])
@pytest.mark.parametrize("bands", [2, 4])
def test_moves_are_those_of_the_inverse_matrix(power: float, bands: int) -> None:
    horizon, generator = 40, np.random.default_rng(0)
    coefficients = factorization.power_coefficients(power, bands)
    there = generator.random((5, horizon)) < 0.2
    there[4] = False
    sizes = generator.random((5, horizon)) * there
    clients, rounds = np.nonzero(there)
    found = moves(
        coefficients, horizon, count=5, clients=clients, rounds=rounds, sizes=sizes[there]
    )
    exact = np.linalg.solve(dense(coefficients, horizon), sizes.T)
    np.testing.assert_allclose(found.whole, np.linalg.norm(exact, axis=0), rtol=1e-8)
    np.testing.assert_allclose(found.largest, exact.max(0), rtol=1e-8)
    plain = moves(coefficients, horizon, count=5, clients=clients, rounds=rounds)
    schedules = [np.flatnonzero(row).tolist() for row in there]
    known = factorization.sensitivities(coefficients, horizon, schedules)
    np.testing.assert_allclose(plain.whole, known, rtol=1e-8)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_leaving_terms_or_rounds_out_moves_nobody_further(data: st.DataObject) -> None:
    horizon = data.draw(st.integers(2, 12))
    power, bands = data.draw(st.floats(0.1, 0.95)), data.draw(st.integers(2, 6))
    draw_bits = st.lists(st.booleans(), min_size=horizon, max_size=horizon)
    there = np.array(data.draw(draw_bits))
    coefficients = factorization.power_coefficients(power, bands)
    d, rounds = dense(coefficients, horizon), np.flatnonzero(there)
    planned = moves(
        coefficients, horizon, count=1, clients=np.zeros(len(rounds), int), rounds=rounds
    ).whole[0]
    kept = np.random.default_rng(data.draw(st.integers(0, 99))).random(d.shape) < 0.6
    fewer = np.where(kept | np.eye(horizon, dtype=bool), d, 0)
    released = np.array(data.draw(draw_bits))
    fewer = fewer[np.ix_(released, released)]
    left = there[released].astype(float)
    assert np.linalg.norm(np.linalg.solve(fewer, left)) <= planned + 1e-12


def test_what_the_proof_does_not_cover_is_refused() -> None:
    one = np.zeros(1, dtype=np.int64)
    for wrong in ((), (2.0,), (1.0, 0.5), (1.0, math.nan), (1.0, -math.inf)):
        with pytest.raises(ValueError, match="coefficients must be 1"):
            moves(wrong, 3, count=1, clients=one, rounds=one)
    with pytest.raises(ValueError, match="round 3 is not one of the 3 planned"):
        moves((1.0,), 3, count=1, clients=one, rounds=one + 3)
    with pytest.raises(ValueError, match="client 1 is not one of 1"):
        moves((1.0,), 3, count=1, clients=one + 1, rounds=one)


def test_a_client_is_charged_for_the_rounds_after_its_last() -> None:
    event, nothing = NoiseEvent("gaussian", 1.0), lambda _: SamplerCost()
    one = np.zeros(1, dtype=np.int64)
    charged = []
    for horizon in (1, 5, 50):
        found = moves((1.0, -0.9), horizon, count=1, clients=one, rounds=one)
        run, _ = whole_run(event, found.whole[0], found.largest[0], horizon, nothing)
        charged.append(run.noise_multiplier)
    assert charged == sorted(charged, reverse=True)
    exact = [1 / math.sqrt(sum(0.81**t for t in range(n))) for n in (1, 5, 50)]
    assert charged == pytest.approx(exact, rel=1e-8)


def test_inexact_noise_costs_what_the_largest_move_does_in_every_planned_round() -> None:
    def cost(event: NoiseEvent) -> SamplerCost:
        return SamplerCost(1 / event.noise_multiplier, 2 / event.noise_multiplier)

    _, extra = whole_run(NoiseEvent("gaussian", 1.0), 5.0, 0.25, 7, cost)
    assert (extra.epsilon, extra.delta) == (7 * 0.25, 7 * 0.5)


@pytest.mark.parametrize("form", ["wide", "fast"])
def test_no_client_passes_its_own_target_and_the_strictest_reaches_it(form: str) -> None:
    config = PrivacyConfig(
        **BANDED | {"epsilon": [2.0, 0.7], "delta": 1e-3}, noise_form=form, thresholds="fixed"
    )
    schedule = cohort_schedule(12, 3, 24, seed=1, one_order=True)
    plan = CorrelatedPlan.of((1.0, -0.8, -0.05), schedule, 12)
    budget = Budget(config, [6] * 12, 1.0, (40, 3), None, plan)
    budget.calibrate(1)
    z = budget.multiplier.numpy()
    assert len(set(z.tolist())) == 2
    spent = []
    for k in range(12):
        sizes = plan.sizes_of_one
        run, extra = whole_run(
            NoiseEvent("gaussian", 1.0), sizes.whole[k] / z[k], sizes.largest[k] / z[k], 24,
            lambda e: budget.sampler_cost_at(e, 1e-3),
        )  # fmt: skip
        assert extra.delta > 0
        spent.append(charged_epsilon(run, 1, 1e-3, extra))
    for target, mine in ((2.0, spent[::2]), (0.7, spent[1::2])):
        assert max(mine) <= target
        assert max(mine) > 0.99 * target
    # Independent rounds of the same multiplier would be charged much less: a wrong account shows.
    assert plan.sizes_of_one.whole.min() > 2 * math.sqrt(6)


def test_coefficients_come_from_the_servers_optimizer_and_schedule() -> None:
    schedule = cohort_schedule(100, 5, 60, seed=0, one_order=True)

    def sgd(momentum: float):
        return lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=momentum)

    def decay(optimizer: torch.optim.Optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5)

    last = weights_in_last_model(sgd(0.9), decay, 60)
    rates = [0.5 * 0.5 ** (t // 10) for t in range(60)]
    np.testing.assert_allclose(last, factorization.last_of_sgd(rates, momentum=0.9))
    by = {
        name: best_for(2, weights_in_last_model(make, None, 60), schedule, 100)
        for name, make in (
            ("plain", sgd(0.0)),
            ("momentum", sgd(0.9)),
            ("adam", lambda parameters: torch.optim.Adam(parameters, lr=0.1)),
        )
    }
    assert by["momentum"][1] < by["plain"][1] < -0.5
    assert by["adam"] == by["momentum"]
    everyone = np.broadcast_to(np.arange(4), (10, 4))
    assert best_for(2, np.ones((1, 10)), everyone, 4) == (1.0,)


def test_one_order_gives_equal_gaps() -> None:
    schedule = cohort_schedule(20, 6, 23, seed=3, one_order=True)
    for client in range(20):
        gaps = np.diff(np.nonzero((schedule == client).any(1))[0])
        assert set(gaps.tolist()) <= {3, 4}
    assert all(len(set(row)) == 6 for row in schedule.tolist())
