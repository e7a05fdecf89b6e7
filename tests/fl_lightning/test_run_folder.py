"""The folder of a run: its own, and gone again where the run was refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest

from fl_lightning.command import run_folder
from fl_lightning.command.run_folder import RunFolder, run_of_checkpoint
from fl_lightning.fit import main
from fl_lightning.output.checkpoint import CHECKPOINT

SMALL = [
    *("--data.num_clients", "2", "--model.network", "fl_lightning.models.LogisticRegression"),
    *("--trainer.max_epochs", "1", "--model.execution", "loop", "--trainer.accelerator", "cpu"),
]


class Noon(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 1, 12)


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def take_several(root: Path) -> list[str]:
    return [str(RunFolder().take_new(root)) for _ in range(20)]


def test_runs_that_start_in_the_same_second_share_no_folder(cwd, monkeypatch):
    monkeypatch.setattr(run_folder, "datetime", Noon)
    with ThreadPoolExecutor(4) as pool:
        taken = [name for names in pool.map(take_several, [cwd / "runs"] * 4) for name in names]
    assert len(set(taken)) == 80
    assert {Path(name) for name in taken} == set((cwd / "runs").iterdir())
    assert (cwd / "runs" / "20260101-120000").is_dir()


def test_only_what_was_made_is_taken_away(cwd):
    (cwd / "mine").mkdir()
    for path, left in (("mine/a/run", ["mine"]), ("mine", ["mine"]), ("new/run", ["mine"])):
        folder = RunFolder()
        folder.take(cwd / path)
        assert (cwd / path).is_dir()
        (cwd / path / "file").touch()
        if path == "mine":
            folder.give_up()
            assert (cwd / "mine" / "file").exists()
            (cwd / "mine" / "file").unlink()
        folder.give_up()
        assert [p.name for p in cwd.iterdir()] == left


def test_a_folder_beside_that_of_another_run_leaves_that_alone(cwd):
    first, second = RunFolder(), RunFolder()
    one, two = first.take_new(cwd / "runs"), second.take_new(cwd / "runs")
    first.give_up()
    assert not one.exists()
    assert two.is_dir()


def test_a_run_that_has_begun_keeps_its_folder(cwd):
    folder = RunFolder()
    path = folder.take_new(cwd / "runs")
    folder.on_train_start(None, None)  # pyright: ignore[reportArgumentType]
    folder.give_up()
    assert path.is_dir()


@pytest.mark.parametrize("rank", ["LOCAL_RANK", "RANK", "SLURM_PROCID"])
def test_other_processes_make_nothing(cwd, monkeypatch, rank):
    monkeypatch.setenv(rank, "1")
    RunFolder().take(cwd / "run")
    RunFolder().take_new(cwd / "runs")
    assert not list(cwd.iterdir())


def test_a_file_is_no_folder(cwd):
    (cwd / "run").touch()
    with pytest.raises(NotADirectoryError, match=r"run_dir=.*is a file"):
        RunFolder().take(cwd / "run")


def test_the_run_of_a_checkpoint():
    assert run_of_checkpoint(Path("a/b") / CHECKPOINT) == Path("a/b")
    assert run_of_checkpoint(Path("a/b/last.ckpt")) is None


@pytest.mark.parametrize("where", [[], ["--run_dir", "deep/run"]])
@pytest.mark.parametrize(
    "bad",
    [
        "--data.source cifar",  # when objects are made
        "--privacy.delta 0.9",  # when everything is checked
        "--privacy.noise_multiplier 0.1 --privacy.epsilon 0.1",  # when the noise is calibrated
    ],
)
def test_a_refused_run_leaves_nothing(cwd, capsys, bad, where):
    with pytest.raises(SystemExit) as stop:
        main([*SMALL, *bad.split(), *where])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("error: ") == 1
    assert not list(cwd.iterdir())


def test_a_home_folder_in_a_path(cwd, monkeypatch):
    monkeypatch.setenv("HOME", str(cwd / "home"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    Path("run.yaml").write_text("run_dir: ~/run\n")
    main([*SMALL, "--config", "run.yaml"])
    assert (cwd / "home" / "run" / CHECKPOINT).is_file()
    again = ["--model.planned_rounds", "1", "--ckpt_path", "~/run/checkpoints/last.ckpt"]
    main([*SMALL, *again])
    assert not (cwd / "~").exists()
    assert not (cwd / "runs").exists()
