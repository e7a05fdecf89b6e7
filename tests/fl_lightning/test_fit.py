"""The command line: what people type, and what lies in the run folder afterwards."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fl_lightning import ledger as ledgers
from fl_lightning.fit import FederatedCLI, main
from fl_lightning.output.callbacks import RoundRecorder
from fl_lightning.output.checkpoint import CHECKPOINT

SMALL = [
    *("--data.num_clients", "2", "--model.network", "fl_lightning.models.LogisticRegression"),
    *("--privacy.epsilon", "null", "--privacy.noise_multiplier", "2", "--trainer.max_epochs", "2"),
    *("--model.execution", "loop", "--trainer.accelerator", "cpu"),
]
OWN = '''
import torch
from torch import nn

from fl_lightning import from_arrays


class Network(nn.Module):
    """A network of the user's.

    Args:
        width: hidden units.
    """

    def __init__(self, width: int = 3):
        super().__init__()
        self.hidden = nn.Linear(4, width)
        self.norm = nn.GroupNorm(1, width)
        self.last = nn.Linear(width, 2)

    def forward(self, x):
        return self.last(self.norm(self.hidden(x)).relu())


class Focal(nn.Module):
    """A loss of the user's."""

    def forward(self, outputs, labels):
        return nn.functional.cross_entropy(outputs, labels, reduction="none") ** 2


def records():
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    return from_arrays(x, (x[:, 0] > 0).long(), x, (x[:, 0] > 0).long(), name="mine")
'''


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    # Lightning uses an old name of jsonargparse.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    return tmp_path


def python(folder, *arguments, **env):
    env = os.environ | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"} | env
    done = subprocess.run(
        [sys.executable, "-m", "fl_lightning.fit", *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def weights(folder):
    return torch.load(Path(folder) / CHECKPOINT, weights_only=False)["state_dict"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


def test_a_run_from_anywhere(cwd, tmp_path, capsys):
    done = python(tmp_path, *SMALL)
    (run,) = (tmp_path / "runs").iterdir()
    assert f"run folder: runs/{run.name}" in done.stdout
    assert f"--run_dir runs/{run.name} --ckpt_path last" in done.stdout
    assert "round 2/2" in done.stdout
    assert "test accuracy" in done.stdout
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {
        *("config.yaml", "ledger.jsonl", "ledger.head", "rounds.csv", "layers.csv", "secret.key"),
        *("checkpoints/last.ckpt", "privacy_statement.md", "summary.json"),
        *("plots/convergence.png", "plots/clients.png", "plots/layers.png"),
    } <= names
    assert not any("logs" in name for name in names)
    assert ledgers.verify(run) == []
    assert {r.round for r in ledgers.read(run)[1]} == {0, 1}
    with (run / "rounds.csv").open() as file:
        assert [row["round"] for row in csv.DictReader(file)] == ["0", "1"]
    summary = json.loads((run / "summary.json").read_text())
    assert 0 <= summary["test_accuracy"] <= 1
    assert (run / "secret.key").stat().st_mode & 0o777 == 0o600

    main([*SMALL, "--run_dir", str(run), "--ckpt_path", "last"])
    finished = capsys.readouterr().out
    assert "note: 2 rounds are done and trainer.max_epochs=2: nothing is left" in finished
    assert "test accuracy" in finished
    assert len(ledgers.read(run)[1]) == 4
    assert not (run / "config_2.yaml").exists()


def test_the_config_of_a_run_repeats_it(cwd):
    own = [*SMALL, "--privacy.seed", "3", "--seed_everything", "5", "--model.client_lr", "0.7"]
    main([*own, "--run_dir", "one", "--trainer.logger", "false"])
    main(["--config", "one/config.yaml", "--run_dir", "two"])
    assert same(weights("one"), weights("two"))
    ledger_one, ledger_two = ((cwd / name / "ledger.jsonl").read_bytes() for name in ("one", "two"))
    assert ledger_one == ledger_two
    main([*own, "--run_dir", "three", "--trainer.logger", "false", "--seed_everything", "6"])
    assert not same(weights("one"), weights("three"))


def test_a_longer_run_goes_on(cwd):
    own = [*SMALL, "--privacy.seed", "3", "--model.planned_rounds", "4"]
    own += ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    main([*own, "--trainer.max_epochs", "4", "--run_dir", "whole"])
    main([*own, "--run_dir", "parts"])
    main([*own, "--trainer.max_epochs", "4", "--run_dir", "parts", "--ckpt_path", "last"])
    assert same(weights("whole"), weights("parts"))
    assert (cwd / "whole/ledger.jsonl").read_bytes() == (cwd / "parts/ledger.jsonl").read_bytes()


def test_the_users_own_network_loss_and_data(cwd, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))  # as `python -m` has it
    (tmp_path / "own.py").write_text(OWN)
    arguments = ["--data.source", "own.records", "--model.network", "own.Network"]
    arguments += ["--model.network.width", "5", "--model.loss", "own.Focal"]
    arguments += ["--privacy.delta", "0.001", "--data.num_clients", "2", "--run_dir", "run"]
    arguments += ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"]
    main(arguments)
    monkeypatch.delitem(sys.modules, "own")
    header, releases = ledgers.read(tmp_path / "run")
    assert header["dataset"] == "mine"
    assert header["layers"] == ["hidden", "norm", "last"]
    assert header["dims"] == [25, 10, 12]
    assert len(releases) == 4
    assert max(r.epsilon for r in ledgers.report(tmp_path / "run").values()) <= 8


def test_options_win_over_later_files_and_those_over_earlier(cwd, capsys):
    Path("a.yaml").write_text("model: {client_lr: 0.1, local_steps: 2}\nprivacy: {epsilon: 3}\n")
    Path("b.yaml").write_text("model: {client_lr: 0.3}\ntrainer: {max_epochs: 7}\n")
    got = printed(capsys, "--config", "a.yaml", "--config", "b.yaml", "--model.client_lr", "0.2")
    assert got["model"]["client_lr"] == 0.2
    assert got["model"]["local_steps"] == 2
    assert got["privacy"]["epsilon"] == 3
    assert got["trainer"]["max_epochs"] == 7
    got = printed(capsys, "--config", "b.yaml", "--config", "a.yaml")
    assert got["model"]["client_lr"] == 0.1
    assert list(cwd.glob("runs")) == []


def test_the_printed_config_is_one_that_can_be_used(cwd, capsys):
    whole = printed(capsys, "--privacy.epsilon", "[1, 3]", "--model.clients_per_round", "5")
    Path("whole.yaml").write_text(yaml.safe_dump(whole))
    assert printed(capsys, "--config", "whole.yaml") == whole
    assert whole["privacy"]["epsilon"] == [1, 3]


def test_help_explains_every_option(cwd, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help.all"])
    assert stop.value.code in (0, None)
    blocks = re.split(r"\n  --", capsys.readouterr().out)[1:]
    helps = {block.split()[0]: block.partition("\n")[2] for block in blocks}
    own = [n for n in helps if n.split(".")[0] in ("model", "data", "privacy") and "." in n]
    assert len(own) > 40
    for name in [*own, "run_dir"]:
        words = helps[name].partition("\n\n")[0]
        assert len(words.split()) >= 3, f"{name}: {words!r}"


def test_silent_and_without_logger(cwd, capsys):
    quiet = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    main([*SMALL, *quiet, "--run_dir", "run"])
    assert "round 1/2" not in capsys.readouterr().out
    assert not list(cwd.rglob("metrics.csv"))


def test_another_logger(cwd):
    main(
        [
            *(*SMALL, "--run_dir", "run", "--trainer.logger", "CSVLogger"),
            *("--trainer.logger.save_dir", "logs"),
        ]
    )
    (metrics,) = (cwd / "logs").rglob("metrics.csv")
    with metrics.open() as file:
        names = set(next(csv.reader(file)))
    assert {"perf/round_seconds", "privacy/epsilon_max", "test/accuracy"} <= names
    private = {"val_loss", "val_accuracy", "clipped_fraction"}
    assert not any(name.split("/")[0] in private for name in names)


def test_the_users_callbacks_stay_beside_ours(cwd, monkeypatch):
    kept = []
    monkeypatch.setattr(FederatedCLI, "after_fit", lambda self: kept.append(self.trainer))
    main(
        [
            *(*SMALL, "--run_dir", "run", "--trainer.logger", "false"),
            *("--trainer.callbacks+=TQDMProgressBar", "--trainer.callbacks.refresh_rate", "9"),
        ]
    )
    (trainer,) = kept
    assert {"TQDMProgressBar", "RoundRecorder"} <= {type(c).__name__ for c in trainer.callbacks}
    assert sum(isinstance(c, RoundRecorder) for c in trainer.callbacks) == 1


@pytest.mark.parametrize("setting", ["client+local", "abstract", "none"])
def test_other_settings(cwd, setting, capsys):
    options = ["--privacy.setting", setting, "--privacy.delta", "0.1", "--run_dir", "run"]
    options += ["--model.sampling_rate", "null", "--model.batch_size", "16"]
    main([*SMALL, *options, "--trainer.logger", "false"])
    statement = (cwd / "run" / "privacy_statement.md").read_text()
    assert (cwd / "run" / "ledger.jsonl").exists() == (setting != "none")
    if setting == "abstract":
        assert "no guarantee" in statement
        assert "no guarantee" in capsys.readouterr().out
    if setting == "none":
        assert "No privacy" in statement


def test_fast_dev_run(cwd):
    main([*SMALL, "--run_dir", "run", "--trainer.fast_dev_run", "true"])
    assert {r.round for r in ledgers.read(cwd / "run")[1]} == {0}
