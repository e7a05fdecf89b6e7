"""What `ledger verify` finds in a ledger that was edited and sealed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_lightning.accounting.sum_costs import spent_digest
from fl_lightning.ledger import verify
from fl_lightning.ledger.correlated_checks import plan_of, schedule_of
from fl_lightning.values.client_set import decode
from tests.fl_lightning.resealing import (
    ROUNDS,
    Entries,
    Runs,
    both,
    edited,
    facts,
    half,
    lines,
    tenfold,
    two_thirds,
    without,
)
from tests.fl_lightning.resuming import CLIENTS


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp)


def repeated(entries: Entries) -> Entries:
    """The last round once more, as another attempt at it."""
    again = [{**e, "attempt": 1} for e in entries if e.get("round") == ROUNDS - 1]
    return [*entries, *again]


def endless(entries: Entries) -> Entries:
    """More rounds than the noise was calibrated for, each in its place."""
    more = list(entries)
    for round in range(ROUNDS, 12):
        for e in entries[-CLIENTS:]:
            more.append({**e, "round": round, "first_step": 2 * round})
    return more


def turned(setting: str, **more: Any) -> Callable[[Entries], None]:
    unit, _, trust = setting.partition("+")
    return facts(setting=setting, privacy_unit=unit, trust=trust, **more)


def everywhere(factor: float) -> Callable[[Entries], None]:
    """Other noise in the header and in every line."""

    def times(value: float) -> float:
        return factor * value

    def change(entries: Entries) -> None:
        header = entries[0]["facts"]
        header["noise_multiplier"] = [times(z) for z in header["noise_multiplier"]]
        lines(noise_multiplier=times, vote_noise_scale=times)(entries)

    return change


def fewer_steps(entries: Entries) -> None:
    facts(planned_steps=[4] * CLIENTS, affordable_steps=4)(entries)


RECORDS: dict[str, tuple[Callable[[Entries], Any], str]] = {
    "multiplier of all lines": (lines(noise_multiplier=tenfold), "calibrated was"),
    "multiplier of one line": (lines(5, noise_multiplier=tenfold), "line 6: noise_multiplier"),
    "multiplier of the header": (facts(noise_multiplier=50.0), "far below the target"),
    "less noise in one line": (lines(5, noise_multiplier=two_thirds), "line 6: noise_multiplier"),
    "multiplier everywhere": (everywhere(10), "far below the target"),
    "three halves of the noise": (everywhere(3 / 2), "far below the target"),
    "two thirds of the noise": (everywhere(2 / 3), "more than the target"),
    "noise of votes": (lines(3, vote_noise_scale=tenfold), "line 4: vote_noise_scale"),
    "a round dropped": (without(4, 5, 6), "line 5: begins at step 4, the lines before it end at 2"),
    "the first round dropped": (without(1, 2, 3), "line 2: begins at step 2"),
    "one client's line dropped": (without(5), "lines were removed or repeated"),
    "a round repeated": (repeated, "begins at step 8, the lines before it end at 10"),
    "a line repeated": (lambda e: [*e, e[-1]], "attempt 0 at round 4"),
    "attempts not counted": (lines(4, attempt=1), "line 5: attempt 1 at round 1"),
    "more steps than planned": (endless, "to 18 steps, its noise was calibrated for 16"),
    "header of another setting": (facts(setting="client+local"), "privacy_unit is 'record'"),
    "its unit too": (turned("client+local"), "adjacency 'zero_out' is not one"),
    "its adjacency too": (
        turned("client+local", adjacency="replace_one"),
        "thresholds are 'quantile' with setting client+local",
    ),
    "header of a sum": (turned("client+secure_sum"), "min_survivors is None"),
    "header of a sum with survivors": (
        turned("client+secure_sum", min_survivors=2, weights=1.0, weighting="uniform"),
        "is of one client, the setting is client+secure_sum",
    ),
    "nominal": (
        facts(setting="abstract", privacy_unit="none", trust="none"),
        "guarantee is True, by the header it is False",
    ),
    "no guarantee": (lines(2, guarantee=False), "line 3: guarantee is False"),
    "adjacency of the header": (facts(adjacency="replace_one"), "adjacency is zero_out"),
    "adjacency of lines": (lines(adjacency="replace_one"), "adjacency is replace_one"),
    "mechanism": (lines(mechanism="laplace"), "mechanism is laplace"),
    "rate of lines": (lines(sampling_rate=0.1), "sampling_rate is 0.1, by the header it is 1.0"),
    "rate of the header": (facts(sampling_rate=0.1), "far below the target"),
    "rate everywhere": (
        both(facts(sampling_rate=0.1), lines(sampling_rate=0.1)),
        "far below the target",
    ),
    "target": (facts(epsilon=[0.5] * CLIENTS), "more than the target 0.5"),
    "target raised": (facts(epsilon=[9.0] * CLIENTS), "far below the target 9"),
    "delta": (facts(delta=[1e-9] * CLIENTS), "more than the target"),
    "planned steps": (facts(planned_steps=[8] * CLIENTS), "planned were 8"),
    "fewer steps everywhere": (fewer_steps, "far below the target"),
    "no limit of steps": (facts(affordable_steps=None), "affordable_steps is None"),
    "layers": (facts(dims=[3]), "layers and 1 dims"),
    "a layer less": (facts(dims=[3], layers=["one"]), "num_layers is 2, by the header it is 1"),
    "no votes": (facts(thresholds="fixed", vote_share=0.0), "votes is True"),
    "a grid": (lines(2, quantum=0.5), "line 3: grid is True, by the header it is False"),
    "raw thresholds": (facts(thresholds="raw", vote_share=0.0), "thresholds are 'raw'"),
    "no setting with a ledger": (facts(setting="none"), "a run of setting 'none' has no ledger"),
    "deltas of fewer clients": (facts(delta=[1e-3] * 2), "delta is not a list of 3 numbers"),
    "noise of fewer clients": (facts(noise_multiplier=[1.0] * 2), "noise_multiplier is not a list"),
    "tails of one step": (lines(2, tail_delta=half), "line 3 charges tail_delta"),
    "tails of a later step": (lines(-1, tail_delta=half), "charges tail_delta"),
    "cutoff": (facts(tail_cutoff=3.0), "tail_cutoff is 3.0"),
    "votes": (facts(vote_share=0.0), "vote_share is 0.0"),
    "a client too many": (lines(2, client=3), "client 3 is not among the 3 clients"),
    "a line of everybody": (lines(2, client=-1), "is a sum, the setting is record+local"),
    "a fact removed": (lambda e: e[0]["facts"].pop("noise_multiplier") and None, "is missing"),
    "nonsense": (facts(noise_multiplier="much"), "make no sense"),
    "a newer schema": (facts(schema=4), "is of schema 4: this version reads schemas 0 to 3"),
}


def endless_sums(entries: Entries) -> Entries:
    """More sums than the noise was calibrated for, each in its place."""
    spent, more = np.zeros(CLIENTS, dtype=np.int64), list(entries)
    for entry in entries[1:]:
        spent[slice(None) if entry["clients"] is None else decode(entry["clients"])] += 1
    for number in range(len(entries) - 1, 12):
        place = {"round": 9 + number, "first_step": number, "spent": spent_digest(spent)}
        more.append({**entries[1], "clients": None, **place})
        spent += 1
    return more


@pytest.mark.parametrize("name", RECORDS)
def test_an_edit_of_releases_is_found(runs: Runs, tmp_path: Path, name: str) -> None:
    change, words = RECORDS[name]
    problems = verify(edited(runs["records"], tmp_path, change))
    assert problems, name
    assert words in problems[0], problems[:3]


def of_fewer(entries: Entries) -> None:
    """One client less in the first sum that everybody was in."""
    entry = next(e for e in entries[1:] if e["clients"] is None)
    entry["clients"] = "0-1"


def of_others(entries: Entries) -> None:
    """Another client, of the same weight and ε, in the place of one."""
    entry = next(e for e in entries[1:-1] if e["clients"] == "0-1")
    entry["clients"] = "1-2"


SUMS: dict[str, tuple[Callable[[Entries], Any], str]] = {
    "multiplier of a sum": (lines(2, noise_multiplier=tenfold), "calibrated was"),
    "largest weight": (lines(2, largest_weight=tenfold), "line 3: largest_weight"),
    "steps of a sum": (lines(2, steps=2), "line 3: steps is 2, by the header it is 1"),
    "more sums than planned": (endless_sums, "steps, its noise was calibrated for 8"),
    "a client too many": (lines(2, clients="0-3"), "client 3 is not among the 3 clients"),
    "no weight": (lines(2, largest_weight=None, clients=None, spent=None), "is a sum without"),
    "rate of the header": (facts(sampling_rate=0.5), "sampling_rate is 0.5, of the cohort it is 1"),
    "coins that nobody threw": (facts(cohort_rate=0.5), "cohort_rate is 0.5 with setting"),
    "a sum dropped": (without(2), "begins at step 2"),
    "the number of sums before": (lines(3, first_step=9), "line 4: begins at step 9"),
    "a sum twice": (lambda e: [*e, {**e[-1], "attempt": 1}], "begins at step 3"),
    "one client less": (of_fewer, "the clients of the sums before it"),
    "clients before": (lines(3, spent="0" * 32), "line 4: the clients of the sums before it"),
    "another client": (of_others, "the clients of the sums before it"),
    "too few survivors": (lines(2, clients="0"), "1 clients are in the sum, by the header 2 to 3"),
    "weights": (facts(weights=[1.0, 2.0, 3.0]), "weights are not those of weighting 'records'"),
    "weighting": (facts(weighting="uniform"), "weights are not those of weighting 'uniform'"),
    "sizes": (facts(client_sizes=[24, 24, 23]), "weights are not those"),
    "header of another sum": (
        turned("client+aggregator"),
        "min_survivors is 2 with setting client+aggregator",
    ),
    "header of releases": (
        turned("client+local", adjacency="replace_one", min_survivors=None),
        "weights are stated with setting client+local",
    ),
    "a cohort by coins": (
        turned("client+aggregator", min_survivors=None, cohort_rate=0.5),
        "cohort_rate is 0.5",
    ),
    "clients a round": (facts(clients_per_round=1), "clients are in the sum, by the header 2 to 1"),
    "tails": (lines(2, tail_delta=0.0), "line 3 charges tail_delta 0"),
    "no sums in schema 0": (lambda e: e[0]["facts"].pop("weights") and None, "line 2 is a sum"),
}


@pytest.mark.parametrize("name", SUMS)
def test_an_edit_of_sums_is_found(runs: Runs, tmp_path: Path, name: str) -> None:
    change, words = SUMS[name]
    problems = verify(edited(runs["sums"], tmp_path, change))
    assert problems, name
    assert words in problems[0], problems[:3]


COINS: dict[str, tuple[Callable[[Entries], Any], str]] = {
    "no coins in lines": (lines(2, sampling_rate=1.0), "line 3: sampling_rate is 1.0"),
    "no coins in the header": (facts(cohort_rate=None), "of the cohort it is 1.0"),
    "other coins": (facts(cohort_rate=0.5), "cohort_rate is 0.5, 2 of 3 clients a round are 0.66"),
    "another rate": (facts(sampling_rate=0.5), "sampling_rate is 0.5, of the cohort it is 0.66"),
}


@pytest.mark.parametrize("name", COINS)
def test_an_edit_of_secret_cohorts_is_found(runs: Runs, tmp_path: Path, name: str) -> None:
    change, words = COINS[name]
    problems = verify(edited(runs["coins"], tmp_path, change))
    assert problems, name
    assert words in problems[0], problems[:3]


def other_coefficients(entries: Entries) -> None:
    """Less noise taken back, hence less to charge; and sensitivities that belong to it."""
    header = entries[0]["facts"]
    header["coefficients"] = [1.0, -0.1, -0.05]
    header["sensitivity"] = plan_of(header).sizes_of_one.whole.tolist()


def charged_one_by_one(entries: Entries) -> None:
    """As if each round had noise of its own."""
    header = entries[0]["facts"]
    for name in ("coefficients", "horizon", "schedule_seed", "sensitivity"):
        del header[name]
    header["schema"] = 1
    header["affordable_steps"] = max(header["planned_steps"])
    for entry in entries[1:]:
        del entry["combined"]


def longer(entries: Entries) -> None:
    """Two more planned rounds throughout, for noise that was calibrated for fewer."""
    header = entries[0]["facts"]
    header["horizon"] = 10
    header["planned_steps"] = np.bincount(schedule_of(header).ravel()).tolist()
    header["affordable_steps"] = header["planned_steps"]
    header["sensitivity"] = plan_of(header).sizes_of_one.whole.tolist()


def of_a_stranger(entries: Entries) -> None:
    """Another client of the same ε in the last round."""
    entries[-1]["clients"] = {"0": "2", "2": "0", "1": "0"}[entries[-1]["clients"]]


CORRELATED: dict[str, tuple[Callable[[Entries], Any], str]] = {
    "a coefficient": (facts(coefficients=[1.0, -0.9, -0.05]), "sensitivity is not that of"),
    "a coefficient and sensitivities": (other_coefficients, "far below the target"),
    "a positive coefficient": (facts(coefficients=[1.0, 0.5]), "make no sense"),
    "horizon": (facts(horizon=6), "planned_steps are not those of horizon 6"),
    "horizon and steps": (longer, "more than the target"),
    "seed of the schedule": (facts(schedule_seed=5), "and schedule_seed 5"),
    "sensitivity": (facts(sensitivity=1.0), "sensitivity is not that of"),
    "affordable steps": (facts(affordable_steps=9), "affordable_steps are not planned_steps"),
    "a fact removed": (lambda e: e[0]["facts"].pop("horizon") and None, "horizon is missing"),
    "independent noise": (charged_one_by_one, "far below the target"),
    "an older schema": (facts(schema=1), "coefficients are stated in schema 1"),
    "coefficients removed": (facts(coefficients=None), "coefficients are missing in schema 2"),
    "another setting": (
        turned("client+secure_sum", min_survivors=1),
        "setting is client+secure_sum, noise that rounds share needs client+aggregator",
    ),
    "multiplier": (lines(2, noise_multiplier=tenfold), "calibrated was"),
    "two thirds of the noise": (
        both(
            lambda e: facts(noise_multiplier=[2 / 3 * z for z in noise_of(e)])(e),
            lines(noise_multiplier=two_thirds, vote_noise_scale=two_thirds),
        ),
        "more than the target",
    ),
    "a row dropped": (without(2), "line 3: combined is [1, 0], the rounds before it that were"),
    "a row dropped throughout": (
        both(
            lambda e: e.pop(3) and None,
            lines(3, combined=[1]),
            lines(4, combined=[3]),
        ),
        "begins at step 3, the lines before it end at 2",
    ),
    "a row more": (lines(4, combined=[2, 1, 0]), "line 5: combined is [2, 1, 0]"),
    "a band less": (lines(3, combined=[1]), "line 4: combined is [1], the rounds before it"),
    "nothing combined": (lines(3, combined=None), "line 4: combined is missing"),
    "a round beyond the plan": (lines(5, round=8), "line 6: round 8 is beyond the 8 planned"),
    "a round twice": (
        lambda e: [*e, {**e[-1], "attempt": 1, "first_step": 5}],
        "line 7: round 4 comes after round 4: a round is released once",
    ),
    "a client of another round": (of_a_stranger, "is not in the planned cohort of round 4"),
    "tails": (lines(2, tail_delta=half), "line 3 charges tail_delta"),
}


def noise_of(entries: Entries) -> list[float]:
    return np.ravel(entries[0]["facts"]["noise_multiplier"]).tolist()


@pytest.mark.parametrize("name", CORRELATED)
def test_an_edit_of_shared_noise_is_found(runs: Runs, tmp_path: Path, name: str) -> None:
    change, words = CORRELATED[name]
    problems = verify(edited(runs["correlated"], tmp_path, change))
    assert problems, name
    assert words in problems[0], problems[:3]


def test_combined_noise_without_coefficients_is_found(runs: Runs, tmp_path: Path) -> None:
    (problem,) = verify(edited(runs["sums"], tmp_path, lines(2, combined=[])))
    assert problem == "line 3: combined is stated, the header has no coefficients"


def test_a_given_multiplier_must_allow_the_steps_it_is_said_to(runs: Runs, tmp_path: Path) -> None:
    change = both(
        facts(noise_multiplier=20.0), lines(noise_multiplier=tenfold, vote_noise_scale=tenfold)
    )
    (problem,) = verify(edited(runs["given"], tmp_path, change))
    assert "not what was calibrated" in problem


@pytest.mark.parametrize("name", ["grid", "grid sums"])
def test_a_grid_follows_from_the_noise_of_its_line(runs: Runs, tmp_path: Path, name: str) -> None:
    assert verify(runs[name]) == []
    for i, change in enumerate((tenfold, half)):
        (problem,) = verify(edited(runs[name], tmp_path / str(i), lines(2, quantum=change)))
        assert problem.startswith("line 3: quantum is "), problem
