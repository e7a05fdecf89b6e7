"""Going on with a run by the command line: with what it was begun with, or one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from fl_lightning import ledger as ledgers
from fl_lightning.fit import main
from fl_lightning.output.checkpoint import CHECKPOINT
from tests.fl_lightning.resuming import RECORD, go

SMALL = [
    *("--data.num_clients", "2", "--model.network", "fl_lightning.models.LogisticRegression"),
    *("--model.execution", "loop", "--trainer.accelerator", "cpu", "--run_dir", "run"),
    *("--trainer.enable_progress_bar", "false"),
]
PLANNED = ["--model.planned_rounds", "4"]
DECAY = "torch.optim.lr_scheduler.ExponentialLR"


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of four rounds that stopped after two."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        main([*SMALL, *PLANNED, "--trainer.max_epochs", "2"])
    return folder


@pytest.fixture
def cwd(begun, monkeypatch):
    monkeypatch.chdir(begun)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    return begun


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("--trainer.max_epochs 9", ["trainer.max_epochs=9", "planned_rounds=4"]),
        ("--model.planned_rounds 9", ["planned_rounds=9", "planned_rounds=4"]),
        (
            "--model.server_optimizer torch.optim.Adam",
            ["server_optimizer=torch.optim.Adam", "server_optimizer=torch.optim.SGD"],
        ),
        ("--model.server_optimizer.lr 0.1", ["optimizer.lr=0.1", "optimizer.lr=1.0"]),
        ("--model.server_optimizer.nesterov true", ["nesterov=True", "nesterov=False"]),
        (f"--model.server_scheduler {DECAY} --model.server_scheduler.gamma 0.9",
         [f"server_scheduler={DECAY}", "server_scheduler=None"]),
        ("--model.network fl_lightning.models.MLP",
         ["network=fl_lightning.models.MLP", "network=fl_lightning.models.LogisticRegression"]),
        ("--model.network.num_classes 11", ["'fc1.weight' is [11, 64]", "[10, 64]"]),
        ("--privacy.epsilon 9", ["epsilon=9.0", "epsilon=8.0"]),
        ("--data.num_clients 3", ["data=", "begun with data="]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_leaves_nothing(cwd, capsys, typed, named):
    before = files(cwd)
    with pytest.raises(SystemExit) as stop:
        main([*SMALL, *PLANNED, "--trainer.max_epochs", "4", "--ckpt_path", "last", *typed.split()])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    (line,) = [o for o in captured.err.splitlines() if o.startswith("error: ")]
    for part in named:
        assert part in line
    assert files(cwd) == before


def test_a_run_that_is_done_says_so_and_is_read_again(cwd, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    charged = len(ledgers.read(cwd / "run")[1])
    main([*SMALL, *PLANNED, "--trainer.max_epochs", "2", "--ckpt_path", "last"])
    shown = capsys.readouterr().out
    assert "note: 2 rounds are done and trainer.max_epochs=2: nothing is left to train" in shown
    assert "test accuracy" in shown
    assert len(ledgers.read(cwd / "run")[1]) == charged
    assert not (cwd / "run" / "config_2.yaml").exists()


def test_a_checkpoint_without_its_folder_finds_it(cwd, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    other = [word for word in SMALL if word not in ("--run_dir", "run")]
    main([*other, *PLANNED, "--trainer.max_epochs", "3", "--ckpt_path", f"run/{CHECKPOINT}"])
    assert {r.round for r in ledgers.read(cwd / "run")[1]} == {0, 1, 2}
    config = yaml.safe_load((cwd / "run" / "config_2.yaml").read_text(encoding="utf-8"))
    assert config["trainer"]["max_epochs"] == 3
    assert not (cwd / "runs").exists()


def test_a_checkpoint_elsewhere_needs_its_folder(cwd, tmp_path, capsys):
    (tmp_path / "last.ckpt").write_bytes((cwd / "run" / CHECKPOINT).read_bytes())
    (tmp_path / "bad.ckpt").write_bytes(b"PK\x03\x04")
    other = [word for word in SMALL if word not in ("--run_dir", "run")]
    for args, words in (
        ([*other, "--ckpt_path", str(tmp_path / "last.ckpt")], "needs run_dir"),
        ([*SMALL, "--ckpt_path", str(tmp_path / "bad.ckpt")], "is damaged"),
    ):
        with pytest.raises(SystemExit):
            main(args)
        assert words in capsys.readouterr().err


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    go(tmp_path, 1, privacy=RECORD)
    checkpoint = torch.load(tmp_path / CHECKPOINT, weights_only=False)
    del checkpoint["aadp_fl"]
    torch.save(checkpoint, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="not the checkpoint of a federated run"):
        go(tmp_path, 2, resume=True, privacy=RECORD)


def test_a_plan_is_kept_by_a_run_from_python(tmp_path):
    module = go(tmp_path, 2, privacy=RECORD, planned_rounds=None)
    with pytest.raises(ValueError, match=r"trainer\.max_epochs=3.* planned for 2 rounds"):
        go(tmp_path, 3, resume=True, privacy=RECORD, planned_rounds=None)
    assert module.run.planned_rounds == 2
    # Without privacy nothing was planned for.
    go(tmp_path / "none", 2, privacy={"setting": "none"}, planned_rounds=None)
    more = go(tmp_path / "none", 3, resume=True, privacy={"setting": "none"}, planned_rounds=None)
    assert more.result is not None
    assert more.result.round == 2


def test_fewer_rounds_than_planned_keep_the_plan(tmp_path):
    go(tmp_path, 2, privacy=RECORD, planned_rounds=5)
    module = go(tmp_path, 3, resume=True, privacy=RECORD, planned_rounds=None)
    assert module.run.planned_rounds == 5
