"""Accounting of a record that is replaced by another."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fl_lightning.accounting import composition as accounting
from fl_lightning.accounting.composition import calibrate, compose_epsilon
from fl_lightning.values.event import NoiseEvent

DELTA = 1e-5


def gaussian(z: float, q: float = 1.0) -> NoiseEvent:
    return NoiseEvent("gaussian", z, q)


# --- replace_one under Poisson sampling ---


def test_sampled_replace_one_is_not_a_doubled_zero_out() -> None:
    # sigma = 2 C: multiplier 1 relative to the difference of two records.
    event = NoiseEvent("gaussian", 1.0, 0.2, "replace_one")
    exact = compose_epsilon({event: 60}, DELTA)
    assert exact == pytest.approx(7.24, abs=0.01)
    doubled = compose_epsilon({NoiseEvent("gaussian", 1.0, 0.2): 60}, DELTA)
    assert doubled == pytest.approx(11.10, abs=0.01)
    single = compose_epsilon({NoiseEvent("gaussian", 2.0, 0.2): 60}, DELTA)
    assert single < exact < doubled


def test_sampled_replace_one_tends_to_the_unsampled_one() -> None:
    near = compose_epsilon({NoiseEvent("gaussian", 2.0, 1 - 1e-9, "replace_one"): 10}, DELTA)
    whole = compose_epsilon({NoiseEvent("gaussian", 2.0, 1.0, "replace_one"): 10}, DELTA)
    assert near == pytest.approx(whole, rel=2e-3)


@pytest.mark.parametrize(("m", "q", "steps"), [(1.0, 0.2, 60), (3.0, 0.05, 400), (0.7, 0.5, 5)])
def test_renyi_bound_of_sampled_replace_one_is_above_and_close(
    m: float, q: float, steps: int
) -> None:
    event = NoiseEvent("gaussian", m, q, "replace_one")
    tight = compose_epsilon({event: steps}, DELTA)
    loose = compose_epsilon({event: steps}, DELTA, accountant="rdp")
    assert tight <= loose <= 1.35 * tight + 0.3


def test_replacement_divergence_by_direct_integration() -> None:
    from scipy import integrate, stats

    from fl_lightning.accounting.composition import _ORDERS, _replacement_rdp

    q, shift, order = 0.3, 0.8, 3.0

    def mixture(x: float, s: float) -> float:
        return (1 - q) * stats.norm.pdf(x) + q * stats.norm.pdf(x - s)

    moment, _ = integrate.quad(
        lambda x: mixture(x, shift) ** order * mixture(x, -shift) ** (1 - order), -20, 20
    )
    got = _replacement_rdp(q, shift)[list(_ORDERS).index(order)]
    assert got == pytest.approx(math.log(moment) / (order - 1), rel=1e-8)


def test_calibration_under_sampled_replace_one() -> None:
    m = calibrate(
        mechanism="gaussian", sampling_rate=0.2, steps=60, epsilon=4.0, delta=DELTA,
        adjacency="replace_one",
    )  # fmt: skip
    event = NoiseEvent("gaussian", m, 0.2, "replace_one")
    assert 3.96 <= compose_epsilon({event: 60}, DELTA) <= 4.0
    mixed = {event: 1, NoiseEvent("gaussian", m, 1.0, "replace_one"): 1}
    with pytest.raises(ValueError, match="must not mix"):
        compose_epsilon(mixed, DELTA)


@pytest.mark.parametrize("z", [0.3, 0.77, 1.0, 2.9, 40.0])
def test_gaussian_divergences_are_those_of_the_library(z):
    """Known in closed form without sampling, so that such runs need no accounting package."""
    from dp_accounting.rdp import rdp_privacy_accountant as rdp

    accountant = rdp.RdpAccountant(accounting._ORDERS.tolist())
    accountant.compose(gaussian(z).dp_event())
    np.testing.assert_array_equal(accounting._rdp(gaussian(z)), accountant.rdp)
