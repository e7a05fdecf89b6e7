"""Targets that would need less noise than can be drawn: the least that can, and what it spends."""

from __future__ import annotations

import logging

import pytest

from fl_lightning.accounting.budget import Budget
from fl_lightning.accounting.exactness import SamplerCost, calibrate_charged, charged_epsilon
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.values.event import NoiseEvent


def calibrated(steps: int, rate: float = 1.0, **privacy) -> tuple[Budget, float]:
    """A budget for one layer, and what a client will have spent at the end."""
    config = PrivacyConfig(**privacy)
    budget = Budget(config, [steps] * 2, rate, [650, 100])
    budget.calibrate(1)
    multiplier = float(budget.multiplier[0])
    event = NoiseEvent(config.mechanism, multiplier, rate)
    assert budget.affordable.tolist() == [steps] * 2
    return budget, charged_epsilon(event, steps, float(budget.delta[0]), budget.extra(0))


@pytest.mark.parametrize(
    ("steps", "rate", "privacy"),
    [
        (1, 1.0, {"epsilon": 50.0}),
        (20, 1.0, {"epsilon": 500.0}),
        (20, 1.0, {"epsilon": 1e6}),
        (1, 1e-5, {"epsilon": 8.0}),
        (1, 1.0, {"epsilon": 50.0, "noise_form": "grid"}),
        (1, 1.0, {"epsilon": 50.0, "noise_form": "fast"}),
        (1, 1.0, {"epsilon": 100.0, "mechanism": "laplace"}),
    ],
)
def test_the_least_noise_that_can_be_proven(steps, rate, privacy, caplog):
    caplog.set_level(logging.INFO, logger="pytorch_lightning")
    budget, spent = calibrated(steps, rate, **privacy)
    assert spent <= 0.9 * privacy["epsilon"]
    assert f"epsilon={privacy['epsilon']:g} in {steps} steps" in caplog.text
    assert f"ε ≤ {spent:.3g} is spent" in caplog.text
    # With much less noise, what inexact noise costs would exceed half of delta.
    less = NoiseEvent(budget.config.mechanism, 0.97 * float(budget.multiplier[0]))
    assert steps * budget.sampler_cost_at(less, 1e-5).delta > 0.5e-5


@pytest.mark.parametrize(("steps", "epsilon"), [(20, 8.0), (20, 100.0), (1, 1.0)])
def test_a_target_that_can_be_met_is_met(steps, epsilon, caplog):
    caplog.set_level(logging.INFO, logger="pytorch_lightning")
    _, spent = calibrated(steps, epsilon=epsilon)
    assert 0.98 * epsilon <= spent <= epsilon
    assert not caplog.text


@pytest.mark.parametrize("extra", [SamplerCost(1.2, 0.0), SamplerCost(0.0, 1.2e-5)])
def test_extras_that_no_noise_lowers_are_named(extra):
    event = NoiseEvent("gaussian", 1.0)
    with pytest.raises(ValueError, match=r"epsilon=1\.0 with delta=1e-05 in 1 steps cannot be pro"):
        calibrate_charged(event, 1, 1.0, 1e-5, lambda _: extra)


def test_extras_that_leave_something_are_paid():
    event = NoiseEvent("gaussian", 1.0)
    for extra in (
        SamplerCost(0.4, 0.0),
        SamplerCost(0.0, 0.4e-5),
        SamplerCost(0.8, 0.0),
        SamplerCost(0.0, 0.8e-5),
    ):
        multiplier = calibrate_charged(event, 1, 1.0, 1e-5, lambda _, extra=extra: extra)
        found = NoiseEvent("gaussian", multiplier)
        assert 0.99 < charged_epsilon(found, 1, 1e-5, extra) <= 1.0


@pytest.mark.parametrize("factor", [1.05, 1.5])
def test_extras_never_take_more_than_half(factor):
    """Less noise could meet the target as well, and leave delta to the sampler alone."""
    delta, event = 1e-5, NoiseEvent("gaussian", 1.0)

    def extra(tried: NoiseEvent) -> SamplerCost:
        return SamplerCost(0.0, min(1.0, delta / 2 / tried.noise_multiplier**2))

    epsilon = factor * charged_epsilon(event, 1, delta, extra(event))
    assert calibrate_charged(event, 1, epsilon, delta, extra) == pytest.approx(1.0, rel=0.01)
