"""`aadp audit`: what it writes, what it says, and what it refuses in one line."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

from fl_lightning import fit
from fl_lightning.__main__ import main as aadp
from fl_lightning.audit import audit as of_audit
from fl_lightning.audit import report
from fl_lightning.audit.audit import Audit
from fl_lightning.audit.family import Family
from fl_lightning.audit.findings import Bound, roc
from fl_lightning.audit.local_copy import Seen
from fl_lightning.audit.readings import Readings
from fl_lightning.values.event import NoiseEvent


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """One round of two clients by the command line."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        fit.main([
            *("--run_dir", str(folder), "--trainer.max_epochs", "1", "--trainer.logger", "false"),
            *("--data.num_clients", "2"),
            *("--model.network", "fl_lightning.models.LogisticRegression"),
        ])  # fmt: skip
    return folder


@pytest.mark.parametrize("setting", ["record+local", "client+aggregator"])
def test_a_run_with_private_evaluations_is_audited_without_them(tmp_path, setting, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    fit.main([
        *("--run_dir", str(tmp_path), "--trainer.max_epochs", "1", "--trainer.logger", "false"),
        *("--data.num_clients", "2", "--privacy.evaluate_every", "1"),
        *("--privacy.setting", setting, "--privacy.delta", "1e-3"),
        *("--model.network", "fl_lightning.models.LogisticRegression"),
    ])  # fmt: skip
    assert aadp(["audit", str(tmp_path), "--canaries", "20", "--seed", "3"]) == 0
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["passed"] is True
    if setting == "record+local":  # held-out records are apart
        assert found["epsilon_of_copy"] == pytest.approx(found["epsilon_proven"])
    else:
        assert found["epsilon_of_copy"] < found["epsilon_proven"]


def made(shown=5.0):
    """An audit of four canaries with a given ε shown."""
    noise = np.ones((4, 1, 1))
    seen = Seen(np.array([1, 1, 0, 0], bool), Readings(noise, noise, noise), 1.0, 6.0, 1.0)
    family = Family({NoiseEvent("gaussian", 0.8): 1}, 1e-5, 0.0, 0.0)
    bounds = [Bound("independent canaries", "noise", shown, 7.0, 3, 4, 4)]
    bounds += [Bound("one run, curve", "less", 1.0, None, 1, 1, 4)]
    return Audit(
        setting="record+local", mechanism="gaussian", client=0, proven=6.0, family=family,
        seen=seen, scores=np.array([2.0, -1.0, 0.5, -2.0]), bounds=bounds, confidence=0.99,
        seed=None, seconds=1.0,
    )  # fmt: skip


def test_a_run_is_audited_from_its_folder(finished_run, capsys, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    ledger = finished_run / "ledger.jsonl"
    before = ledger.read_bytes()
    assert aadp(["audit", str(finished_run), "--canaries", "60", "--seed", "3"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "passed: the attack shows ε ≥" in said
    assert "The run itself, its ledger and its model were only read." in said
    assert ledger.read_bytes() == before
    found = json.loads((finished_run / "audit.json").read_text())
    summary = json.loads((finished_run / "summary.json").read_text())
    assert found["epsilon_proven"] == pytest.approx(summary["epsilon_max"])
    assert found["epsilon_of_copy"] == pytest.approx(found["epsilon_proven"])
    assert 0 < found["epsilon_shown"] < found["epsilon_proven"]
    assert found["tightness"] == found["epsilon_shown"] / found["epsilon_proven"]
    assert found["simulated"] is True
    assert "copies of the run" in found["canaries"]
    assert (finished_run / "plots" / "audit.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(finished_run.rglob("*.partial"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--canaries", "19"], "canaries=19 must be at least 20"),
        (["--confidence", "1"], "confidence=1.0 must be in [0.5, 1)"),
        (["--minutes", "0"], "minutes=0.0 must be positive"),
        (["--seed", "-1"], "seed=-1 must be at least 0"),
        ([], "there is no summary.json: is it the folder of a run"),
    ],
)
def test_what_cannot_be_audited_is_one_line(tmp_path, capsys, options, says):
    assert aadp(["audit", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_run_without_a_ledger_or_with_a_damaged_summary_is_refused(tmp_path, capsys):
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("")
    assert aadp(["audit", str(tmp_path)]) == 2
    assert "it has no ledger, so nothing is proven there" in capsys.readouterr().err
    (tmp_path / "ledger.jsonl").write_text("")
    assert aadp(["audit", str(tmp_path)]) == 2
    assert "summary.json cannot be read" in capsys.readouterr().err


def test_more_shown_than_proven_is_said_and_is_exit_status_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(of_audit, "audit", lambda run, **options: made(6.1))
    assert aadp(["audit", str(tmp_path)]) == 1
    assert "FAILED: the attack shows ε ≥ 6.1" in capsys.readouterr().out
    assert json.loads((tmp_path / "audit.json").read_text())["passed"] is False


def test_an_audit_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    report.write(made(), tmp_path)
    before = (tmp_path / "audit.json").read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        report.write(made(1.0), tmp_path)
    assert (tmp_path / "audit.json").read_bytes() == before
    assert not list(tmp_path.rglob("*.partial"))


def test_equal_to_what_is_proven_is_not_more():
    assert made(6.0).passed
    assert not made(6.0 + 1e-9).passed


def test_rates_of_the_attack_are_counted_by_falling_threshold():
    false, true = roc(np.array([2.0, -1.0, 0.5, -2.0]), np.array([1, 1, 0, 0], bool))
    assert false.tolist() == [0, 0, 0.5, 0.5, 1]
    assert true.tolist() == [0, 0.5, 0.5, 1, 1]


def test_noise_that_could_not_be_seen_is_no_number():
    audit = made()
    nothing = Readings(np.ones((4, 1, 1)), np.ones((4, 1, 1)), np.full((4, 1, 1), np.nan))
    assert audit.noise_seen == [1.0]
    blind = SimpleNamespace(seen=SimpleNamespace(readings=nothing), mechanism="laplace")
    assert Audit.noise_seen.fget(blind) == [None]
