"""What cut tails cost: against truncated noise itself, in calibration, refusal and ledger."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fl_lightning import PrivacyConfig
from fl_lightning.accounting.budget import Budget
from fl_lightning.accounting.composition import calibrate, compose_epsilon
from fl_lightning.accounting.exactness import (
    SamplerCost,
    affordable_charged,
    calibrate_charged,
    charged_epsilon,
    cut_tails,
    noise_streams,
)
from fl_lightning.models import MLP
from fl_lightning.values.event import NoiseEvent


def laplace_profile(shift: float, epsilon: float, cutoff: float) -> float:
    """Hockey-stick divergence of a Laplace cut at `cutoff` from itself moved by `shift`."""
    x = np.linspace(-cutoff, cutoff + shift, 400001)
    step = x[1] - x[0]
    mass = -math.expm1(-cutoff)

    def density(at):
        return np.where(np.abs(at) <= cutoff, np.exp(-np.abs(at)) / (2 * mass), 0.0)

    return float(np.maximum(density(x - shift) - math.exp(epsilon) * density(x), 0).sum() * step)


@pytest.mark.parametrize("cutoff", [2.0, 5.0])
@pytest.mark.parametrize("shift", [0.1, 0.5, 1.0])
def test_cut_laplace_costs_its_tail_and_no_more(cutoff, shift):
    """Beyond epsilon = shift an ideal Laplace has no delta at all: what is left is the cut's."""
    truth = laplace_profile(shift, shift, cutoff)
    event = NoiseEvent("laplace", 1 / shift)
    charge = cut_tails(event, cutoff=cutoff, streams=(1,), delta=truth)
    assert charge.epsilon == 0
    assert truth <= charge.delta * (1 + 1e-3)
    assert charge.delta <= truth * (1 + 1e-3) / (1 - math.exp(-cutoff))


def disk_profile(shift: float, epsilon: float, cutoff: float) -> tuple[float, float]:
    """Hockey-stick divergence of a Gaussian pair, cut at a radius and not, moved by `shift`."""
    side = np.linspace(-6, 6, 1501)
    cell = (side[1] - side[0]) ** 2
    x, y = np.meshgrid(side, side)
    with np.errstate(over="ignore"):
        here, there = (
            np.exp(-((x - move) ** 2 + y**2) / 2) / (2 * math.pi) for move in (shift, 0.0)
        )
    ideal = np.maximum(here - math.exp(epsilon) * there, 0).sum() * cell
    mass = -math.expm1(-(cutoff**2) / 2)
    here = np.where((x - shift) ** 2 + y**2 <= cutoff**2, here, 0) / mass
    there = np.where(x**2 + y**2 <= cutoff**2, there, 0) / mass
    return float(np.maximum(here - math.exp(epsilon) * there, 0).sum() * cell), float(ideal)


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("cutoff", [2.5, 4.0])
@pytest.mark.parametrize("shift", [0.2, 1.0])
def test_cut_gaussian_costs_at_most_the_charge(cutoff, shift, epsilon):
    """delta of the cut noise is at most that of the ideal noise and the charge together."""
    cut, ideal = disk_profile(shift, epsilon, cutoff)
    event = NoiseEvent("gaussian", 1 / shift)
    charge = cut_tails(event, cutoff=cutoff, streams=(2,), delta=cut)
    assert cut <= ideal + charge.delta + 1e-6
    if epsilon == 3.0 and ideal < 1e-9:
        # Nothing but the cut is left; the charge is of its order of magnitude.
        assert charge.delta < 8 * cut


@pytest.mark.parametrize("pairs", [1, 7, 100])
def test_the_worst_split_of_a_gaussian_shift_is_covered(pairs):
    """P(a pair leaves the disk), by quadrature, summed over shifts of joint norm S."""
    shift, cutoff = 1.3, 4.0
    event = NoiseEvent("gaussian", 1 / shift)
    charge = cut_tails(event, cutoff=cutoff, streams=(2 * pairs,), delta=0.0).delta

    def leaves(s: float) -> float:
        """x in the disk and x + s outside, by polar quadrature."""
        r = np.linspace(0, cutoff, 4001)
        # Given the radius r, the angle leaves with probability arccos(a) / pi.
        a = np.clip((cutoff**2 - s**2 - r**2) / np.maximum(2 * s * r, 1e-12), -1, 1)
        return float(np.trapezoid(r * np.exp(-(r**2) / 2) * np.arccos(a) / math.pi, r))

    for count in {1, pairs, (pairs + 1) // 2}:
        total = count * leaves(shift / math.sqrt(count))
        assert total <= charge
    assert charge < 40 * pairs * leaves(shift / math.sqrt(pairs)) or pairs == 1


def test_the_charge_in_numbers():
    """Written out: 63 bits of Laplace, 64 bits of a Gaussian radius, 10 001 elements."""
    laplace = cut_tails(
        NoiseEvent("laplace", 0.5), cutoff=63 * math.log(2), streams=(10_000, 1), delta=0.25
    )
    want = 2.0**-63 * (math.e**2 - 1) / 2 + 0.25 * 10_001 * 2.0**-63
    assert laplace.delta == pytest.approx(want, rel=1e-12, abs=0)
    gaussian = cut_tails(
        NoiseEvent("gaussian", 2.0),
        cutoff=math.sqrt(128 * math.log(2)),
        streams=(9_999, 1),
        delta=0.5,
    )
    c = math.sqrt(128 * math.log(2))
    want = math.sqrt(5001) * (math.exp(-((c - 0.5) ** 2) / 2) - 2.0**-64) + 0.5 * 5001 * 2.0**-64
    assert gaussian.delta == pytest.approx(want, rel=1e-10, abs=0)
    assert stats.norm.sf(c) < gaussian.delta < 1e-15


def test_edges():
    for mechanism in ("gaussian", "laplace"):
        options = {"cutoff": 9.0, "streams": (100,), "delta": 1e-5}
        assert cut_tails(NoiseEvent(mechanism, 0.0), **options) == SamplerCost()
        assert cut_tails(NoiseEvent(mechanism, 1e-3), **options).delta == 1.0
    assert noise_streams((3, 4), votes=False) == (3, 4)
    assert noise_streams((3, 4), votes=True) == (3, 4, 2)


def test_calibration_includes_the_extras():
    event = NoiseEvent("gaussian", 1.0)

    def extra(at: NoiseEvent) -> SamplerCost:
        return SamplerCost(0.01, 2e-7 / at.noise_multiplier)

    plain = calibrate(mechanism="gaussian", sampling_rate=1.0, steps=10, epsilon=1.0, delta=1e-5)
    charged = calibrate_charged(event, 10, 1.0, 1e-5, extra)
    assert charged > 1.1 * plain
    exact = NoiseEvent("gaussian", charged)
    cost = extra(exact)
    spent = compose_epsilon({exact: 10}, 1e-5 - 10 * cost.delta) + 10 * cost.epsilon
    assert spent == charged_epsilon(exact, 10, 1e-5, cost)
    assert 0.97 <= spent <= 1.0
    assert calibrate_charged(event, 10, 1.0, 1e-5, lambda _: SamplerCost()) == plain
    # Negligible extras leave the multiplier as it is, to the last bit.
    assert calibrate_charged(event, 10, 1.0, 1e-5, lambda _: SamplerCost(0.0, 1e-17)) == plain
    with pytest.raises(ValueError, match="which alone costs epsilon 2 and delta 1"):
        calibrate_charged(event, 10, 1.0, 1e-5, lambda _: SamplerCost(0.2, 0.1))


def test_affordable_steps_include_the_extras():
    event = NoiseEvent("gaussian", 10.0)
    plain = affordable_charged(event, 1.0, 1e-5, SamplerCost())
    for extra in (SamplerCost(0.01, 0.0), SamplerCost(0.0, 5e-7), SamplerCost(0.02, 1e-6)):
        steps = affordable_charged(event, 1.0, 1e-5, extra)
        assert 0 < steps < plain
        assert charged_epsilon(event, steps, 1e-5, extra) <= 1.0
    assert affordable_charged(event, 1.0, 1e-5, SamplerCost(2.0, 0.0)) == 0
    assert (
        affordable_charged(NoiseEvent("gaussian", 1e9), 8.0, 1e-5, SamplerCost(0.0, 1e-13)) > 10**7
    )


@pytest.mark.parametrize("setting", ["record+local", "client+local"])
def test_releases_stand_in_the_ledger_with_what_their_tails_cost(
    federation, population, global_params, setting
):
    config = PrivacyConfig(setting=setting, epsilon=None, noise_multiplier=0.5, delta=1e-3, seed=1)
    torch.manual_seed(0)
    network = MLP(in_features=8, hidden=(5,), num_classes=3)
    part = population(federation(), network, config, local_steps=3)
    part.release(torch.arange(3), global_params(network), 0, "x")
    dims = (45, 18, 2) if setting == "record+local" else (45, 18)
    one = cut_tails(
        NoiseEvent("gaussian", 0.5), cutoff=math.sqrt(128 * math.log(2)), streams=dims, delta=1e-3
    )
    assert 1e-14 < one.delta < 1e-9
    for line in part.books.ledger:
        assert line.tail_delta == line.steps * one.delta
        assert line.epsilon_inflation == 0.0


def test_a_plan_is_refused_that_only_the_tails_break(monkeypatch):
    config = PrivacyConfig(epsilon=1.0, noise_multiplier=4.0, delta=1e-5)
    Budget(config, [10], 1.0, (100,)).calibrate(1)
    budget = Budget(config, [10], 1.0, (100,))
    monkeypatch.setattr(budget, "sampler_cost_at", lambda event, delta: SamplerCost(0.9, 0.0))
    with pytest.raises(ValueError, match="one release alone would spend more"):
        budget.calibrate(1)
