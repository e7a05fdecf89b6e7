"""Simulated failures: pure functions of the public seed."""

from __future__ import annotations

import numpy as np
import pytest

from fl_lightning.server.faults import Faults

EVERYONE = np.arange(4000)


def test_failures_have_their_rate_and_differ_by_round_and_seed() -> None:
    faults = Faults(dropout=0.3, seed=1)
    failing = faults.failing(EVERYONE, 2)
    # 0.3 within five standard errors of 0.0072.
    assert abs(failing.mean() - 0.3) < 0.036
    assert (failing == faults.failing(EVERYONE, 2)).all()
    assert (failing != faults.failing(EVERYONE, 3)).any()
    assert (failing != Faults(dropout=0.3, seed=2).failing(EVERYONE, 2)).any()
    assert not Faults().failing(EVERYONE, 0).any()


def test_a_client_fares_the_same_whoever_else_is_in_the_cohort() -> None:
    faults = Faults(dropout=0.5, deadline=1.0, seed=3)
    for method in (faults.failing, faults.late, faults.virtual_time):
        assert (method(EVERYONE, 5)[[7, 90]] == method(np.array([7, 90]), 5)).all()


def test_half_of_the_clients_are_slower_than_the_median_and_stay_slow() -> None:
    faults = Faults(deadline=1.0, spread=0.5)
    assert abs(faults.late(EVERYONE, 0).mean() - 0.5) < 0.04
    assert not Faults().late(EVERYONE, 0).any()
    one, two = (np.log(faults.virtual_time(EVERYONE, r)) for r in (0, 1))
    # Half of the variance is the client's own.
    assert abs(np.corrcoef(one, two)[0, 1] - 0.5) < 0.06
    assert abs(one.std() - 0.5 * 2**0.5) < 0.05


@pytest.mark.parametrize(
    "bad", [{"dropout": 1.0}, {"dropout": -0.1}, {"deadline": 0.0}, {"deadline": float("inf")}]
)
def test_out_of_range(bad: dict[str, float]) -> None:
    name, value = next(iter(bad.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Faults(**bad)
