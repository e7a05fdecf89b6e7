"""The ε that is shown while a run goes on is its ledger's, and never less."""

import csv
import math
from types import SimpleNamespace

import numpy as np
import pytest
from dp_accounting import gaussian_mechanism

from fl_lightning.accounting import running, step_curve
from fl_lightning.accounting.composition import compose_epsilon
from fl_lightning.accounting.gaussian import gaussian_epsilon, scaled_erfc
from fl_lightning.accounting.running import RunningEpsilon
from fl_lightning.accounting.step_curve import StepCurve
from fl_lightning.ledger import read
from fl_lightning.ledger.accounts import accounts
from fl_lightning.ledger.client_reports import headline, report_clients
from fl_lightning.values.event import NoiseEvent
from fl_lightning.values.rounding import round_up, round_up_to
from tests.fl_lightning.correlated_values import BANDED
from tests.fl_lightning.resuming import go

NOISED = {"noise_multiplier": 1.5, "epsilon": None, "clip_norm": 1.0}
CLIENT = NOISED | {"delta": 0.1}
SETTINGS = {
    "record+local, sampled": (NOISED, {"sampling_rate": 0.3, "local_steps": 2}),
    "record+local, whole": (NOISED | {"thresholds": "quantile"}, {"sampling_rate": 1.0}),
    "record+local, personal": (
        NOISED | {"noise_multiplier": None, "epsilon": [2.0, 4.0, 6.0]},
        {"sampling_rate": 0.5, "clients_per_round": 2},
    ),
    "record+local, grid": (NOISED | {"noise_form": "grid"}, {"sampling_rate": 1.0}),
    "record+local, replace_one": (NOISED | {"adjacency": "replace_one"}, {"sampling_rate": 0.3}),
    "client+local": (CLIENT | {"setting": "client+local"}, {"clients_per_round": 2}),
    "client+local, Laplace": (
        CLIENT | {"setting": "client+local", "mechanism": "laplace", "delta": 0.01},
        {},
    ),
    "client+local, fast": (CLIENT | {"setting": "client+local", "noise_form": "fast"}, {}),
    "client+aggregator": (
        CLIENT | {"setting": "client+aggregator", "cohort_sampling": "fixed"},
        {"clients_per_round": 2},
    ),
    "client+aggregator, sampled": (
        CLIENT | {"setting": "client+aggregator", "cohort_sampling": "poisson"},
        {"clients_per_round": 2},
    ),
    "client+secure_sum": (CLIENT | {"setting": "client+secure_sum"}, {}),
    "correlated": (BANDED | {"epsilon": 4.0, "bands": 3}, {"clients_per_round": 1}),
    "without noise": (CLIENT | {"setting": "client+local", "noise_multiplier": 0.0}, {}),
    "abstract": (NOISED | {"setting": "abstract"}, {}),
}


def shown(folder):
    with (folder / "rounds.csv").open() as file:
        return [float(row["epsilon_max"]) for row in csv.DictReader(file)]


def proven(folder, rounds):
    header, releases = read(folder)
    lines = [r for r in releases if r.round < rounds]
    return np.array([a.epsilon() for _, a in sorted(accounts(header, lines).items())])


STOPPED_EARLY = ("record+local, sampled", "client+local, Laplace", "correlated")


@pytest.mark.parametrize(
    ("setting", "rounds"), [*((s, 8) for s in SETTINGS), *((s, 5) for s in STOPPED_EARLY)]
)
def test_the_last_value_is_the_statements_and_none_is_below_the_ledgers(tmp_path, setting, rounds):
    privacy, options = SETTINGS[setting]
    module = go(tmp_path, rounds, privacy=privacy, **options)
    values = shown(tmp_path)
    end = proven(tmp_path, rounds)
    assert values[-1] == pytest.approx(end.max(), rel=1e-5)
    assert values[-1] >= end.max()
    assert module.result.epsilon_spent == pytest.approx(end, rel=1e-8)
    report = headline(report_clients(*read(tmp_path)))
    assert math.isinf(end.max()) or round_up(end.max()) in report
    running = RunningEpsilon(module.ledger.header)
    for line in module.ledger:
        running.add(line)
    for done in (1, 3, rounds):
        exact = proven(tmp_path, done).max()
        assert exact <= values[done - 1] <= exact * 1.01
    assert (running.epsilon() >= end * (1 - 1e-9)).all()


def test_a_run_that_goes_on_shows_what_was_spent_before(tmp_path):
    privacy, options = SETTINGS["record+local, sampled"]
    go(tmp_path, 3, privacy=privacy, **options)
    go(tmp_path, 8, privacy=privacy, resume=True, **options)
    values = shown(tmp_path)
    assert values == sorted(values)
    assert values[-1] == float(round_up(proven(tmp_path, 8).max(), 6))


@pytest.mark.parametrize(
    ("event", "planned"),
    [
        (NoiseEvent("gaussian", 1.0, 0.1), 100),
        (NoiseEvent("gaussian", 0.6, 0.01), 2000),
        (NoiseEvent("gaussian", 8.0, 0.5), 500),
        (NoiseEvent("gaussian", 0.6, 0.1, "replace_one"), 30),
        (NoiseEvent("laplace", 20.0, 0.1), 20),
        (NoiseEvent("laplace", 20.0), 50),
    ],
)
def test_a_curve_is_the_accountants_and_never_below(event, planned):
    curve = StepCurve(event, planned, 1e-5)
    for steps in (1, planned // 3, planned - 1):
        exact = compose_epsilon({event: steps}, 1e-5)
        assert exact * (1 - 1e-9) <= curve.epsilon(steps, 1e-5) <= 1.01 * exact
    assert curve.epsilon(planned, 1e-5) == compose_epsilon({event: planned}, 1e-5)
    rdp = compose_epsilon({event: planned + 1}, 1e-5, accountant="rdp")
    assert curve.epsilon(planned + 1, 1e-5) == rdp
    assert curve.epsilon(0, 1e-5) == 0


def test_gaussians_in_closed_form():
    """As another implementation of the same equation has it."""
    multipliers = np.geomspace(0.01, 2000, 40)
    for delta in (1e-16, 1e-5, 0.3):
        found = gaussian_epsilon(multipliers, np.full(40, delta))
        for z, epsilon in zip(multipliers.tolist(), found.tolist(), strict=True):
            with np.errstate(all="ignore"):
                exact = gaussian_mechanism.get_epsilon_gaussian(z, delta)
            assert epsilon == pytest.approx(exact, rel=1e-8, abs=1e-9)
            composed = compose_epsilon({NoiseEvent("gaussian", 2 * z): 4}, delta)
            assert composed == pytest.approx(exact, rel=1e-8, abs=1e-9)
    edges = gaussian_epsilon(np.array([0.0, 1.0, 1.0]), np.array([0.1, 0.0, -1.0]))
    assert np.isinf(edges).all()


@pytest.mark.filterwarnings("error")
def test_next_to_no_noise_costs_what_it_moves_by():
    """ε is near move²/2 there, and e^ε no number."""
    tiny = np.array([1e-3, 1e-6, 1e-12, 1e-100, 1e-149, 1e-200, 5e-324])
    found = gaussian_epsilon(tiny, np.full(7, 1e-5))
    assert found[:5] == pytest.approx(1 / (2 * tiny[:5] ** 2), rel=0.01)
    assert found[0] == pytest.approx(504263.892920654, rel=1e-12)  # by numbers of 60 digits
    assert np.isinf(found[5:]).all()


def test_bounds_are_rounded_up():
    assert [round_up(v) for v in (1.87341, 8.0, 12345.1, 1.00001e-7, 0.0, math.inf)] == [
        "1.874", "8", "1.235e+04", "1.001e-07", "0", "inf",
    ]  # fmt: skip
    assert [round_up_to(v) for v in (1.87, 1.8701, 7.9999999, math.inf)] == [
        "1.87", "1.88", "8.00", "inf",
    ]  # fmt: skip


def test_what_lies_beyond_the_grid_is_paid():
    """Loss that the grid cannot hold counts as infinite: more of it is more ε."""
    event = NoiseEvent("gaussian", 1.0, 0.1)
    loss = step_curve._losses(event, 10, 1e-5)[0]
    found = loss.epsilon(5, 1e-5)
    loss.beyond = 1e-6
    more = loss.epsilon(5, 1e-5)
    assert found < more < 2 * found
    loss.beyond = 1e-5
    assert math.isinf(loss.epsilon(5, 1e-5))


def of_lines(monkeypatch, *lines):
    """The running ε of one client after lines of (multiplier, epsilon_inflation, tail_delta)."""
    monkeypatch.setattr(running, "num_clients", lambda header: 1)
    monkeypatch.setattr(
        running, "client_multipliers", lambda _, line: np.array([line.event.noise_multiplier])
    )
    found = RunningEpsilon({"delta": 1e-5, "planned_steps": [4]})
    for z, on_top, tail in lines:
        event = NoiseEvent("gaussian", z, 0.5)
        found.add(
            SimpleNamespace(
                client=0, noise_multiplier=z, event=event, steps=1, is_sum=False,
                members=lambda everyone: np.arange(everyone),
                epsilon_inflation=on_top, tail_delta=tail, evaluation=False,
            )
        )  # fmt: skip
    return float(found.epsilon()[0])


def test_what_a_line_costs_beyond_its_event_is_shown(monkeypatch):
    plain = of_lines(monkeypatch, (2.0, 0.0, 0.0), (2.0, 0.0, 0.0))
    on_top = of_lines(monkeypatch, (2.0, 0.1, 0.0), (2.0, 0.2, 0.0))
    assert on_top == pytest.approx(plain + 0.3)
    assert of_lines(monkeypatch, (2.0, 0.0, 4e-6), (2.0, 0.0, 4e-6)) > 1.01 * plain


def test_closed_forms_pay_for_cut_tails(monkeypatch):
    monkeypatch.setattr(running, "_closed", lambda event: True)
    plain = of_lines(monkeypatch, (2.0, 0.0, 0.0))
    assert of_lines(monkeypatch, (2.0, 0.0, 8e-6)) > 1.01 * plain


def test_what_is_known_from_the_call_before_is_what_it_was(monkeypatch):
    """Every client's ε has the bits of its account alone, whatever was asked for before."""
    everyone = 5
    monkeypatch.setattr(running, "num_clients", lambda header: everyone)
    found = RunningEpsilon({"delta": [1e-5, 1e-5, 1e-6, 0.0, 1e-5]})
    for round in range(6):
        for client in range(everyone - 1):
            if (round + client) % 2:
                z = 2.0 + client // 2
                event = NoiseEvent("gaussian", z, 1.0)
                line = SimpleNamespace(
                    client=client, noise_multiplier=z, event=event, steps=1, evaluation=False,
                    epsilon_inflation=0.0, tail_delta=0.0,
                )  # fmt: skip
                found.add(line)
        there = np.flatnonzero(found._precision)
        alone = [
            gaussian_epsilon(1 / np.sqrt(found._precision[[k]]), found._delta[[k]]) for k in there
        ]
        assert found.epsilon()[there].tolist() == np.concatenate(alone).tolist()
        assert found.epsilon()[-1] == 0


def test_accounts_without_a_delta_have_no_epsilon(monkeypatch):
    monkeypatch.setattr(running, "num_clients", lambda header: 3)
    found = RunningEpsilon({"delta": [None, None, 1e-5]})
    for client in range(3):
        event = NoiseEvent("gaussian", 2.0, 1.0)
        line = SimpleNamespace(
            client=client, noise_multiplier=2.0, event=event, steps=1, evaluation=False,
            epsilon_inflation=0.0, tail_delta=0.0,
        )  # fmt: skip
        found.add(line)
        values = found.epsilon()
    assert np.isinf(values[:2]).all()
    assert np.isfinite(values[2])


def test_steps_of_other_noise_count_as_the_one_with_least(monkeypatch):
    least = of_lines(monkeypatch, (1.0, 0.0, 0.0), (1.0, 0.0, 0.0))
    assert of_lines(monkeypatch, (1.0, 0.0, 0.0), (3.0, 0.0, 0.0)) == least
    assert of_lines(monkeypatch, (3.0, 0.0, 0.0), (1.0, 0.0, 0.0)) == least


def test_the_scaled_complement_of_the_error_function_is_scipys() -> None:
    special = pytest.importorskip("scipy.special")
    x = np.concatenate([np.linspace(0, 60, 20_001), 10.0 ** np.linspace(-12, 12, 500)])
    np.testing.assert_allclose(scaled_erfc(x), special.erfcx(x), rtol=1e-14)
