"""What `ledger verify` finds in a ledger that was edited and sealed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_lightning.accounting.sum_costs import spent_digest
from fl_lightning.ledger import verify
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
    "cutoff": (facts(tail_cutoff=3.0), "tail_cutoff is 3.0"),
    "votes": (facts(vote_share=0.0), "vote_share is 0.0"),
    "a client too many": (lines(2, client=3), "client 3 is not among the 3 clients"),
    "a line of everybody": (lines(2, client=-1), "is a sum, the setting is record+local"),
    "a fact removed": (lambda e: e[0]["facts"].pop("noise_multiplier") and None, "is missing"),
    "nonsense": (facts(noise_multiplier="much"), "make no sense"),
    "a newer schema": (facts(schema=2), "is of schema 2: this version reads schemas 0 to 1"),
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
