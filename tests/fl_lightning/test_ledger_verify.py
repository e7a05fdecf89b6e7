"""What `ledger verify` finds in other files, by a hash kept elsewhere, and in old ledgers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_lightning import ledger as ledgers
from fl_lightning.ledger import Ledger, LedgerError, verify
from fl_lightning.ledger.__main__ import main
from tests.fl_lightning.resealing import (
    ROUNDS,
    RUNS,
    Runs,
    edited,
    entries_of,
    facts,
    lines,
    reseal,
    tenfold,
    without,
)
from tests.fl_lightning.resuming import CLIENTS, go


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp)


@pytest.mark.parametrize("name", RUNS)
def test_an_honest_run_has_no_problems(
    runs: Runs, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(runs[name]) == []
    entries = entries_of(runs[name])
    schema = 2 if name == "correlated" else 1
    assert entries[0]["facts"]["schema"] == schema
    single = name in ("records", "grid")
    assert {e["kind"] for e in entries[1:]} == {"release" if single else "sum"}
    assert verify(reseal(entries, tmp_path)) == []
    assert main(["verify", str(runs[name])]) == 0
    assert f"schema {schema}, head {Ledger.open(runs[name]).head_hash}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["records", "sums"])
def test_a_ledger_is_verified_and_shown_without_torch(runs: Runs, name: str) -> None:
    assert (runs[name] / "checkpoints" / "last.ckpt").is_file()
    code = (
        "import sys; from fl_lightning.ledger.__main__ import main; "
        "assert not any(main([do, sys.argv[1]]) for do in ('verify', 'show')); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(runs[name])], check=True)


@pytest.mark.parametrize("rng", ["chacha12", "philox7"])
def test_generators_of_older_versions_verify(runs: Runs, tmp_path: Path, rng: str) -> None:
    entries = entries_of(runs["records"])
    entries[0]["facts"]["rng"] = rng
    assert verify(reseal(entries, tmp_path)) == []


# The files beside the ledger --------------------------------------------------------------------


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    return folder


def test_rounds_dropped_at_the_end_contradict_the_other_files(runs: Runs, tmp_path: Path) -> None:
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
    runs: Runs, tmp_path: Path
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
    runs: Runs, tmp_path: Path, change: Callable[[Any], Any], words: str
) -> None:
    folder = copied(runs["records"], tmp_path / "run")
    path = folder / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    change(state["aadp_fl"])
    torch.save(state, path)
    (problem,) = verify(folder)
    assert words in problem


def test_a_ledger_may_be_ahead_of_the_other_files(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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


def test_a_run_does_not_go_on_with_a_ledger_of_another_history(runs: Runs, tmp_path: Path) -> None:
    folder = copied(runs["records"], tmp_path / "run")
    edited(folder, folder, lines(1, digest="other"))
    with pytest.raises(LedgerError, match="is not the one that the checkpoint was saved"):
        go(folder, ROUNDS + 1, resume=True, **RUNS["records"])


# A hash that was kept elsewhere -----------------------------------------------------------------


def test_a_head_names_its_line(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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


def test_a_head_does_not_hide_another_problem(runs: Runs, tmp_path: Path) -> None:
    other = edited(runs["records"], tmp_path, lines(-1, noise_multiplier=tenfold))
    head = json.loads((other / "ledger.jsonl").read_text().splitlines()[-1])["hash"]
    (problem,) = verify(other, head)
    assert "calibrated was" in problem


def test_a_head_that_two_lines_begin_with_is_ambiguous() -> None:
    from fl_lightning.ledger.verdict import _named

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


def test_a_run_of_sums_of_schema_0_does_not_go_on(runs: Runs, tmp_path: Path) -> None:
    folder = copied(runs["sums"], tmp_path / "run")
    edited(folder, folder, lambda e: [{**e[0], "facts": {**e[0]["facts"], "schema": 0}}, *e[1:]])
    path = folder / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    state["aadp_fl"]["ledger_head"] = None
    torch.save(state, path)
    with pytest.raises(LedgerError, match="go on with the version that began the run"):
        go(folder, ROUNDS + 1, resume=True, **RUNS["sums"])
