"""Terminals that cannot show a letter, and pipes that are closed: a run goes on all the same."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fl_lightning import plots
from fl_lightning.fit import main
from fl_lightning.output import finish
from fl_lightning.output.console import quietly, say, show
from fl_lightning.output.summary import final_table
from tests.fl_lightning.resuming import RECORD, go

SMALL = [
    *("--data.num_clients", "2", "--model.network", "fl_lightning.models.LogisticRegression"),
    *("--trainer.max_epochs", "2", "--model.execution", "loop", "--trainer.accelerator", "cpu"),
    *("--privacy.epsilon", "null", "--privacy.noise_multiplier", "2", "--run_dir", "run"),
]


class Gone(io.TextIOWrapper):
    """A pipe that nobody reads any more."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="utf-8")

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")

    def close(self):
        pass


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    return tmp_path


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "utf-8"])
def test_every_encoding_says_it_in_its_way(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    say("ε ≤ 2, δ = 1e-05, ∞ 日")
    stream.seek(0)
    shown = stream.read()
    if encoding == "ascii":
        assert shown == "epsilon <= 2, delta = 1e-05, infinity \\u65e5\n"
    if encoding == "utf-8":
        assert shown == "ε ≤ 2, δ = 1e-05, ∞ 日\n"
    assert "= 1e-05" in shown


def test_a_run_on_a_terminal_without_letters(cwd, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    main(SMALL)
    stream.seek(0)
    shown = stream.read()
    assert "round 2/2  epsilon <= " in shown
    assert "epsilon by client, min / median / max" in shown
    assert (cwd / "run" / "privacy_statement.md").read_text(encoding="utf-8")


def test_a_run_from_python_on_such_a_terminal(tmp_path, monkeypatch):
    from fl_lightning.output.callbacks import RoundProgress

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    shown = RoundProgress()
    monkeypatch.setattr(
        RoundProgress, "setup", lambda self, *_, **__: setattr(self, "_shown", True)
    )
    go(tmp_path, 2, privacy=RECORD, callbacks=[shown])
    sys.stdout.seek(0)
    assert sys.stdout.read().count("epsilon <= ") == 2


def test_a_closed_stream_is_no_error(monkeypatch):
    for stream in (Gone(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        say("ε")
        show(final_table({**dict.fromkeys(("rounds", "test_accuracy", "sim_only_val_accuracy")),
                          "simulated": False, "privacy": "none", "seconds": 1.0}))  # fmt: skip
    with pytest.raises(KeyError):
        quietly(lambda: {}["no"])


@pytest.mark.parametrize(
    "stream", [pytest.param("stdout", marks=pytest.mark.slow), "stdout and stderr"]
)
def test_a_run_whose_reader_leaves(cwd, stream):
    """As `fit | head -1`, in ASCII besides."""
    read, write = os.pipe()
    env = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fl_lightning.fit", *SMALL],
        stdout=write,
        stderr=write if "stderr" in stream else subprocess.PIPE,
        env=env,
    )
    os.close(write)
    os.close(read)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert b"Traceback" not in (error or b"")
    assert b"BrokenPipe" not in (error or b"")
    summary = json.loads((cwd / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["rounds"] == 2
    assert (cwd / "run" / "plots" / "clients.png").is_file()


# --- what follows the last round ---


@pytest.mark.parametrize("broken", ["draw_all", "run_summary", "final_table", "privacy_statement"])
def test_what_fails_after_the_rounds_is_a_line(cwd, monkeypatch, capsys, broken):
    def fail(*_):
        raise RuntimeError("it\nbroke")

    monkeypatch.setattr(plots if broken == "draw_all" else finish, broken, fail)
    main(SMALL)
    captured = capsys.readouterr()
    (line,) = [o for o in captured.out.splitlines() if "failed: RuntimeError: it broke" in o]
    assert line.startswith("note: ")
    assert "Traceback" not in captured.out + captured.err
    assert ((cwd / "run" / "summary.json").is_file()) == (broken != "run_summary")
    statement = (cwd / "run" / "privacy_statement.md").is_file()
    assert statement == (broken != "privacy_statement")
    assert (cwd / "run" / "plots" / "clients.png").is_file() == (broken != "draw_all")


def test_a_test_that_fails_leaves_the_rest_and_a_status(cwd, monkeypatch, capsys):
    from fl_lightning.module import FederatedModule

    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(FederatedModule, "test_step", fail)
    with pytest.raises(SystemExit) as stop:
        main(SMALL)
    assert stop.value.code == 1
    captured = capsys.readouterr()
    assert "note: the test failed: RuntimeError: no memory" in captured.out
    assert "Traceback" not in captured.out + captured.err
    summary = json.loads((cwd / "run" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["test_accuracy"], summary["rounds"]) == (None, 2)
    assert Path("run/plots/clients.png").is_file()
