"""What `ledger verify` finds in a ledger that was edited and sealed again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_lightning import ledger as ledgers
from fl_lightning._ledger_report import main, report_clients
from fl_lightning.ledger import Ledger, LedgerError, verify
from fl_lightning.privacy.statement import privacy_statement
from tests.fl_lightning.resealing import (
    Entries,
    both,
    edited,
    entries_of,
    facts,
    lines,
    reseal,
    tenfold,
    without,
)
from tests.fl_lightning.resuming import CLIENTS, go

# Without sampling, so that calibration has a closed form.
RUNS = {
    "records": {
        "privacy": {"epsilon": [2.0, 4.0], "delta": 1e-3},
        "sampling_rate": 1.0,
        "local_steps": 2,
    },
    "sums": {
        "privacy": {
            "setting": "client+secure_sum",
            "epsilon": [3.0, 4.0],
            "delta": 0.05,
            "thresholds": "fixed",
            "min_survivors": 2,
        },
        "dropout": 0.3,
    },
    "given": {
        "privacy": {
            "setting": "client+aggregator",
            "epsilon": 30.0,
            "delta": 0.05,
            "noise_multiplier": 2.0,
            "cohort_sampling": "fixed",
        },
    },
}
ROUNDS = 5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of short runs with all that the command line writes."""
    folders = {}
    for name, options in RUNS.items():
        folder = folders[name] = tmp_path_factory.mktemp(name) / "run"
        module = go(folder, ROUNDS, **options)
        reports = report_clients(module.ledger.header, module.ledger.releases)
        (folder / "privacy_statement.md").write_text(privacy_statement(module.ledger))
        summary = {
            "ledger_head": module.ledger.head_hash,
            "epsilon_max": max(r.epsilon for r in reports.values()),
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folders


@pytest.mark.parametrize("name", RUNS)
def test_an_honest_run_has_no_problems(
    runs: dict[str, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(runs[name]) == []
    entries = entries_of(runs[name])
    assert entries[0]["facts"]["schema"] == 1
    assert {e["kind"] for e in entries[1:]} == {"release" if name == "records" else "sum"}
    assert verify(reseal(entries, tmp_path)) == []
    assert main(["verify", str(runs[name])]) == 0
    assert f"schema 1, head {Ledger.open(runs[name]).head_hash}" in capsys.readouterr().out


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


def everywhere_tenfold(entries: Entries) -> None:
    header = entries[0]["facts"]
    header["noise_multiplier"] = [10 * z for z in header["noise_multiplier"]]
    lines(noise_multiplier=tenfold, vote_noise_scale=tenfold)(entries)


def fewer_steps(entries: Entries) -> None:
    half = [4] * CLIENTS
    facts(planned_steps=half, affordable_steps=4)(entries)


RECORDS: dict[str, tuple[Callable[[Entries], Any], str]] = {
    "multiplier of all lines": (lines(noise_multiplier=tenfold), "calibrated was"),
    "multiplier of one line": (lines(5, noise_multiplier=tenfold), "line 6: noise_multiplier"),
    "multiplier of the header": (facts(noise_multiplier=50.0), "far below the target"),
    "multiplier everywhere": (everywhere_tenfold, "far below the target"),
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
    "cutoff": (facts(tail_cutoff=3.0), "tail_cutoff is 3.0"),
    "votes": (facts(vote_share=0.0), "vote_share is 0.0"),
    "a client too many": (lines(2, client=7), "client 7 is not among the 3 clients"),
    "a fact removed": (lambda e: e[0]["facts"].pop("noise_multiplier") and None, "is missing"),
    "nonsense": (facts(noise_multiplier="much"), "make no sense"),
    "a newer schema": (facts(schema=2), "is of schema 2: this version reads schemas 0 to 1"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_an_edit_of_releases_is_found(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
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
def test_an_edit_of_sums_is_found(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    change, words = SUMS[name]
    problems = verify(edited(runs["sums"], tmp_path, change))
    assert problems, name
    assert words in problems[0], problems[:3]


def test_a_given_multiplier_must_allow_the_steps_it_is_said_to(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    change = both(
        facts(noise_multiplier=20.0), lines(noise_multiplier=tenfold, vote_noise_scale=tenfold)
    )
    (problem,) = verify(edited(runs["given"], tmp_path, change))
    assert "not what was calibrated" in problem


# The files beside the ledger --------------------------------------------------------------------


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    return folder


def test_rounds_dropped_at_the_end_contradict_the_other_files(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    whole = entries_of(runs["records"])
    assert verify(reseal(whole[:-CLIENTS], tmp_path / "alone")) == []
    for kept, words in (
        ("checkpoints", "lines are missing"),
        ("privacy_statement.md", "which no line of the ledger has"),
        ("summary.json", "which no line of the ledger has"),
    ):
        folder = copied(runs["records"], tmp_path / kept)
        for other in {"checkpoints", "privacy_statement.md", "summary.json"} - {kept}:
            gone = folder / other
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        (problem,) = verify(reseal(whole[:-CLIENTS], folder))
        if kept == "checkpoints":
            assert words in problem
        else:
            assert problem.startswith(kept)
            assert words in problem


def test_a_statement_and_a_summary_must_say_the_epsilon_of_the_ledger(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(runs["records"], tmp_path / "run")
    path = folder / "privacy_statement.md"
    text = path.read_text()
    epsilon = text.partition("**epsilon ")[2].partition(" ")[0]
    path.write_text(text.replace(epsilon, "0.5"))
    (problem,) = verify(folder)
    assert problem.startswith("privacy_statement.md does not say 'epsilon ")
    path.write_text(text)
    assert verify(folder) == []
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"epsilon_max": 0.5}))
    (problem,) = verify(folder)
    assert problem.startswith("summary.json: epsilon_max is 0.5, by the ledger ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(run_id="other"), "is of run_id other"),
        (lambda s: s["budget"]["multiplier"].mul_(2), "other noise multipliers"),
        (lambda s: s["promise"].update(setting="client+local"), "is of setting client+local"),
        (lambda s: s["promise"].update(epsilon=1.0), "another epsilon"),
        (lambda s: s["promise"].update(delta=1e-9), "another delta"),
        (lambda s: s.update(releases=3), "knows of 3 releases at line 16"),
        (lambda s: s.update(ledger_head="0" * 64), "which no line of the ledger has"),
    ],
)
def test_a_checkpoint_of_another_ledger_is_found(
    runs: dict[str, Path], tmp_path: Path, change: Callable[[Any], Any], words: str
) -> None:
    folder = copied(runs["records"], tmp_path / "run")
    path = folder / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    change(state["aadp_fl"])
    torch.save(state, path)
    (problem,) = verify(folder)
    assert words in problem


def test_a_ledger_may_be_ahead_of_the_other_files(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(runs["records"], tmp_path / "run")
    go(folder, ROUNDS + 1, resume=True, **RUNS["records"])
    assert main(["verify", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "privacy_statement.md is of line 16 of 19" in shown
    assert "summary.json is of line 16 of 19" in shown
    assert "last.ckpt" not in shown
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"torn")
    assert main(["verify", str(folder)]) == 0
    assert "last.ckpt was not compared" in capsys.readouterr().out


def test_a_run_does_not_go_on_with_a_ledger_of_another_history(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    folder = copied(runs["records"], tmp_path / "run")
    edited(folder, folder, lines(1, digest="other"))
    with pytest.raises(LedgerError, match="is not the one that the checkpoint was saved"):
        go(folder, ROUNDS + 1, resume=True, **RUNS["records"])


# A hash that was kept elsewhere -----------------------------------------------------------------


def test_a_head_names_its_line(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["sums"]
    text = (run / "ledger.jsonl").read_text().splitlines()
    hashes = [json.loads(line)["hash"] for line in text]
    last = len(hashes)
    for given, words in (
        (hashes[-1], f"is the last line, {last}"),
        (hashes[-1][:16].upper(), f"is the last line, {last}"),
        (hashes[1], f"is line 2; {last - 2} lines were written after it"),
    ):
        assert main(["verify", str(run), "--head", given]) == 0
        assert words in capsys.readouterr().out
    assert verify(run, hashes[0][:20]) == []
    other = reseal(entries_of(run)[:-1], tmp_path)
    (problem,) = verify(other, hashes[-1])
    assert "is not the ledger that it was taken from" in problem
    assert main(["verify", str(run), "--head", "0" * 64]) == 1
    for bad in ("abc", "x" * 16, hashes[-1] + "0"):
        with pytest.raises(ValueError, match="must be 16 to 64 hex digits"):
            verify(run, bad)
        assert main(["verify", str(run), "--head", bad]) == 1
        assert "must be 16 to 64 hex digits" in capsys.readouterr().err


def test_a_head_that_two_lines_begin_with_is_ambiguous() -> None:
    from fl_lightning._ledger_verdict import _named

    assert _named("ab", ["abc", "abd"]) == (False, "hash ab begins 2 lines: give more of it")


# Schema 0 ---------------------------------------------------------------------------------------

OLD = Path(__file__).with_name("ledgers")


@pytest.mark.parametrize("name", ["records", "sums", "survivors"])
def test_ledgers_of_schema_0_are_read_and_verified(tmp_path: Path, name: str) -> None:
    shutil.copytree(OLD / name, tmp_path / name)
    assert verify(tmp_path / name) == []
    header, releases = ledgers.read(tmp_path / name)
    assert "schema" not in header
    assert not any(r.is_sum for r in releases)
    stated = json.loads((OLD / name / "report.json").read_text())
    found = ledgers.report(tmp_path / name)
    assert {str(k): [r.epsilon, r.releases, r.steps] for k, r in found.items()} == {
        k: pytest.approx(v, rel=1e-9) for k, v in stated.items()
    }
    first = next(i for i, r in enumerate(releases) if r.first_step) + 1
    for change, words in (
        (without(first - 1), "lines were removed or repeated"),
        (facts(setting="abstract"), "privacy_unit is"),
        (lines(1, mechanism="laplace"), "mechanism is laplace"),
        (lines(-1, noise_multiplier=tenfold), "noise_multiplier" if name == "records" else None),
    ):
        if words:
            (problem, *_) = verify(edited(OLD / name, tmp_path / "edited", change))
            assert words in problem


def test_a_run_of_sums_of_schema_0_does_not_go_on(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(runs["sums"], tmp_path / "run")
    edited(folder, folder, lambda e: [{**e[0], "facts": {**e[0]["facts"], "schema": 0}}, *e[1:]])
    path = folder / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    state["aadp_fl"]["ledger_head"] = None
    torch.save(state, path)
    with pytest.raises(LedgerError, match="go on with the version that began the run"):
        go(folder, ROUNDS + 1, resume=True, **RUNS["sums"])
