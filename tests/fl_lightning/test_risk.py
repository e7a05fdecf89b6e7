"""Bounds on attacks, against closed forms, and what a run's files say of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import laplace, norm

from fl_lightning import plots
from fl_lightning.accounting import pairs
from fl_lightning.accounting.risk import Risk, risk_of
from fl_lightning.ledger import Ledger, Release
from fl_lightning.ledger.risks import CURVE_COLUMNS, curve_rows, risk_figures, run_risks
from fl_lightning.ledger.statement import privacy_statement
from fl_lightning.values.event import NoiseEvent

RATES = np.array([0.0, 1e-4, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0])


def gaussian(z: float, rate: float = 1.0) -> NoiseEvent:
    return NoiseEvent("gaussian", z, rate, "zero_out")


def close_above(found: np.ndarray, exact: np.ndarray, by: float) -> bool:
    return bool((found >= exact - 1e-12).all() and (found <= exact + by).all())


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
def test_gaussian(mu: float) -> None:
    # Nine steps that are one Gaussian of mu together.
    risk = risk_of({gaussian(3 / mu): 9}, 1e-5)
    assert close_above(risk.power(RATES), 1 - norm.cdf(norm.ppf(1 - RATES) - mu), 2e-4)
    assert risk.advantage() == pytest.approx(2 * norm.cdf(mu / 2) - 1, abs=1e-9)
    assert risk.right_guesses(0.5) == pytest.approx(norm.cdf(mu / 2), abs=1e-9)
    # The best guess of a rare member: a threshold on the likelihood ratio.
    for prior in (0.1, 0.9):
        shift = math.log((1 - prior) / prior) / mu
        best = prior * norm.cdf(mu / 2 - shift) + (1 - prior) * norm.cdf(mu / 2 + shift)
        assert best <= risk.right_guesses(prior) <= best + 1e-3


def test_laplace_has_a_straight_beginning_and_end() -> None:
    scale = 0.8
    risk = risk_of({NoiseEvent("laplace", scale, 1.0, "zero_out"): 1}, 0.0)
    exact = laplace.sf(laplace.isf(RATES) - 1 / scale)
    assert close_above(risk.power(RATES), exact, 1e-3)
    assert risk.advantage() == pytest.approx(1 - math.exp(-1 / (2 * scale)), abs=1e-4)


def test_a_sampled_step_in_the_worse_direction() -> None:
    z, rate = 0.7, 0.3
    risk = risk_of({gaussian(z, rate): 1}, 1e-5)
    t = np.linspace(-12, 12, 4001)
    alone, with_unit = norm.sf(t), (1 - rate) * norm.sf(t) + rate * norm.sf(t - 1 / z)
    by_unit = np.interp(RATES, alone[::-1], with_unit[::-1])
    by_none = np.interp(RATES, 1 - with_unit, 1 - alone)
    # One bound for both directions lies over what connects their curves, too.
    assert close_above(risk.power(RATES), np.maximum(by_unit, by_none) - 1e-5, 1e-2)
    assert risk.advantage() == pytest.approx((with_unit - alone).max(), abs=1e-4)


def test_a_pair_alone() -> None:
    risk = Risk.of_pairs([(8.0, 1e-5)])
    assert risk.advantage() == pytest.approx((math.exp(8) - 1 + 2e-5) / (math.exp(8) + 1))
    assert risk.power(1e-4) == pytest.approx(1e-4 * math.exp(8) + 1e-5)
    assert risk.power(0.5) == pytest.approx(1 - math.exp(-8) * (0.5 - 1e-5))
    nothing, everything = Risk.of_pairs([(0.0, 0.0)]), Risk.of_pairs([(math.inf, 1.0)])
    assert nothing.power(RATES) == pytest.approx(RATES, abs=1e-15)
    assert (nothing.advantage(), everything.advantage()) == (0.0, 1.0)
    assert [nothing.right_guesses(p) for p in (0.1, 0.5, 0.8)] == pytest.approx([0.9, 0.5, 0.8])
    assert everything.power(RATES).tolist() == [1.0] * len(RATES)
    assert everything.right_guesses(0.01) == pytest.approx(1.0)


def test_what_inexact_noise_costs_is_in() -> None:
    plain, charged = (risk_of({gaussian(2.0): 1}, 1e-5, *extra) for extra in ((), (0.1, 4e-6)))
    assert charged.advantage() > plain.advantage() + 4e-6
    assert (charged.power(RATES[:-1]) > plain.power(RATES[:-1])).all()
    # Whatever (epsilon, delta) the account states is among the pairs.
    assert 1e-5 in plain.deltas
    assert 1e-5 in charged.deltas
    assert risk_of({gaussian(2.0): 1}, 1e-5, 0.0, 2e-5).advantage() == 1.0
    assert risk_of({gaussian(0.0): 1}, 1e-5).advantage() == 1.0


def test_many_steps_fall_back_to_a_coarser_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = risk_of({gaussian(4.0, 0.5): 20}, 1e-5)
    monkeypatch.setattr(pairs, "LARGEST_PLD_STEPS", 10)
    coarse = risk_of({gaussian(4.0, 0.5): 20}, 1e-5)
    assert fine.advantage() < coarse.advantage() < 2 * fine.advantage()
    assert (fine.power(RATES) <= coarse.power(RATES)).all()


HEADER = {
    "setting": "record+local", "privacy_unit": "record", "trust": "client", "mechanism": "gaussian",
    "adjacency": "zero_out", "delta": [1e-5] * 3, "epsilon": [8.0] * 3, "simulated": False,
}  # fmt: skip


def ledger_of(folder: Path, multipliers: list[float], **changes: object) -> Ledger:
    line = {
        "round": 0, "steps": 20, "mechanism": "gaussian", "sampling_rate": 1.0, "num_layers": 1,
        "adjacency": "zero_out", "clip_norm": (1.0,), "shares": (1.0,), "binding": "", "digest": "",
    }  # fmt: skip
    ledger = Ledger.create(folder, HEADER | changes)
    ledger.append(
        [Release(client=k, noise_multiplier=z, **line) for k, z in enumerate(multipliers)]
    )
    return ledger


def test_the_statement_takes_the_worst_and_the_median_client(tmp_path: Path) -> None:
    with ledger_of(tmp_path, [8.0, 20.0, 5.0]) as ledger:
        risks = run_risks(ledger.header, ledger.releases)
        assert risks is not None
        worst, median = (2 * norm.cdf(math.sqrt(20) / z / 2) - 1 for z in (5.0, 8.0))
        figures = risk_figures(risks)
        assert figures["attack_advantage_max"] == pytest.approx(worst, abs=1e-6)
        assert figures["attack_advantage_median"] == pytest.approx(median, abs=1e-6)
        text = privacy_statement(ledger)
        row = "| right alarms minus false alarms (advantage) | "
        assert (
            f"{row}{math.ceil(worst * 1000) / 10:g} % | {math.ceil(median * 1000) / 10:g} %" in text
        )
        assert "was this record of this client used" in text
        rows = np.array(curve_rows(risks))
        assert rows.shape == (122, len(CURVE_COLUMNS))
        assert (np.diff(rows, axis=0) >= -1e-12).all()
        assert (rows[:, 2] <= rows[:, 1] + 1e-12).all(), "the median client is the safer one"
        assert (rows[:, 1] <= rows[:, 3] + 1e-12).all(), "the pair alone says less"


@pytest.mark.parametrize(
    ("multipliers", "changes"),
    [([], {}), ([5.0], {"setting": "abstract"}), ([0.0, 3.0], {})],
)
def test_nothing_is_bounded_where_nothing_is_proven(tmp_path, multipliers, changes) -> None:
    with ledger_of(tmp_path, multipliers, **changes) as ledger:
        risks = run_risks(ledger.header, ledger.releases)
        assert risks is None
        assert set(risk_figures(risks).values()) == {None}
        assert "What an attack can find out" not in privacy_statement(ledger)


def test_the_picture_shows_the_curves() -> None:
    assert plots.attack_curves([]) is None
    rows = [
        dict(zip(CURVE_COLUMNS, map(str, row), strict=True)) for row in ((0, 0, 0, 0.5), (1,) * 4)
    ]
    figure = plots.attack_curves(rows)
    assert figure is not None
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()}
    assert list(lines["(ε, δ) read alone"]) == [0.5, 1.0]
    assert list(lines["worst client"]) == [0.0, 1.0]


@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_as_riskcal(rate: float) -> None:
    """Skipped where riskcal is not installed."""
    analysis = pytest.importorskip("riskcal.analysis")
    from dp_accounting.pld import privacy_loss_distribution as pld

    one = pld.from_gaussian_mechanism(
        2.0, sampling_prob=rate, value_discretization_interval=1e-4, use_connect_dots=True
    )
    theirs, ours = one.self_compose(10), risk_of({gaussian(2.0, rate): 10}, 1e-5)
    assert ours.advantage() == pytest.approx(analysis.get_advantage_from_pld(theirs), abs=2e-3)
    power = 1 - np.array([analysis.get_beta_from_pld(theirs, alpha=a) for a in (0.01, 0.1, 0.5)])
    assert ours.power(np.array([0.01, 0.1, 0.5])) == pytest.approx(power, abs=2e-3)
    wrong = analysis.get_bayes_risk_from_pld(theirs, 0.3)
    assert ours.right_guesses(0.3) == pytest.approx(1 - wrong, abs=2e-3)
