"""Tables and histograms of clients, TensorBoard by option, W&B that goes on offline, the sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.loggers.logger import DummyLogger
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from fl_lightning import fit
from fl_lightning.models import MLP
from fl_lightning.output import callbacks, loggers
from fl_lightning.output.callbacks import ClientTables
from fl_lightning.output.client_tables import _told_apart, client_distributions, client_tables

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
SMALL = [
    *("--data.num_clients", "2", "--model.network", "fl_lightning.models.LogisticRegression"),
    *("--privacy.epsilon", "null", "--privacy.noise_multiplier", "2", "--model.execution", "loop"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
]


class Memory(DummyLogger):
    """Remembers what it is told, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, dict[str, Any]] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        assert step is not None
        self.seen.setdefault(step, {}).update(metrics)


class Attach(pl.Callback):
    """Gives loggers to the Trainer of the fixture `fit`, which has none."""

    def __init__(self, loggers: list[Any]) -> None:
        self.loggers = loggers

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trainer.loggers = self.loggers


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for name in ("WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(callbacks.plots, "draw_all", lambda path: [])
    return tmp_path


def network() -> MLP:
    torch.manual_seed(0)
    return MLP(8, 3, hidden=(4,))


# --- tables ---


@pytest.mark.parametrize("setting", ["record+local", "client+local", "abstract"])
def test_a_row_a_client_of_what_was_released(federation, fit, setting: str) -> None:
    module = fit(
        federation(60, clients=3), network(), setting=setting, noise_multiplier=2.0, delta=0.01,
        seed=None,
    )  # fmt: skip
    tables, shown = client_tables(module), client_distributions(module)
    public, private = tables["released/clients"], tables["sim_only/clients"]
    layers, proven = module.layout.layer_names, setting != "abstract"
    figures = ["clip_norm", "share", "noise_scale", "l1_norm"]
    known = [f"{figure}/{layer}" for figure in figures for layer in layers]
    clipped = [f"clipped_fraction/{layer}" for layer in layers]
    name = "epsilon" if proven else "nominal_epsilon"
    # Without a guarantee everything but the nominal ε follows raw norms.
    assert public[0] == ["client", name, *(known if proven else [])]
    assert private[0] == ["client", *([] if proven else known), *clipped]
    lines = [r for r in module.ledger.releases if r.round == 1]
    rows = public[1] if proven else private[1]
    first = 2 if proven else 1
    for row, line in zip(rows, lines, strict=True):
        assert row[0] == line.client
        assert row[first : first + 2] == list(line.clip_norm)
        assert row[first + 2 : first + 4] == list(line.shares)
        assert row[first + 6 : first + 8] == module.run.history.l1_norm[line.client].tolist()
    assert [row[1] for row in public[1]] == module.result.epsilon_spent.tolist()
    kind = "released" if proven else "sim_only"
    assert shown[f"{kind}/clip_norm/{layers[0]}/by_client"].tolist() == [
        line.clip_norm[0] for line in lines
    ]
    assert shown[f"privacy/{name}/by_client"].tolist() == module.result.epsilon_spent.tolist()
    assert all(n.startswith(("sim_only/", "privacy/")) for n in shown) or proven
    assert all(len(row) == len(private[0]) for row in private[1])


def test_a_sum_is_one_row_and_infinity_is_in_no_histogram(federation, fit) -> None:
    module = fit(
        federation(60, clients=6), network(), setting="client+aggregator", noise_multiplier=0.0,
        module_kwargs={"clients_per_round": 2},
    )  # fmt: skip
    (row,) = client_tables(module)["released/clients"][1]
    assert row[:2] == ["all", np.inf]
    assert "privacy/simulated_epsilon/by_client" not in client_distributions(module)


def test_every_so_many_rounds_and_the_last(federation, fit, monkeypatch) -> None:
    class Board(Memory):
        def add_histogram(self, name: str, values: np.ndarray, step: int) -> None:
            self.log_metrics({name: values}, step)

        experiment = property(lambda self: self)

    class Online(Memory):
        pass

    monkeypatch.setattr(callbacks, "WandbLogger", Online)
    monkeypatch.setattr(callbacks, "TensorBoardLogger", Board)
    shown = {}
    for every, privacy in ((2, {"noise_multiplier": 2.0}), (0, {"noise_multiplier": 2.0}),
                           (1, {"setting": "none"})):  # fmt: skip
        online, board = Online(), Board()
        both = [Attach([online, board]), ClientTables(every)]
        module = fit(federation(60), network(), rounds=5, callbacks=both, **privacy)
        shown[every] = online.seen, board.seen
        assert module.result.round == 4
    online, board = shown.pop(2)
    assert {s for s, names in online.items() if "released/clients" in names} == {1, 3, 4}
    assert board.keys() == {1, 3, 4}
    table = online[4]["released/clients"]
    assert table.columns[:2] == ["client", "simulated_epsilon"]
    assert len(table.data) == 3
    names = {n for n in online[4] if n.endswith("/by_client")}
    assert names == set(board[4])
    assert sum(online[4]["released/clip_norm/fc1/by_client"].histogram) == 3
    for seen in shown.values():
        assert not any("by_client" in n or "clients" in n for s in seen for n in s)
    with pytest.raises(ValueError, match="every_n_rounds=-1"):
        ClientTables(-1)


# --- TensorBoard ---


def test_tensorboard_that_is_missing_is_said_before_anything_is_done(cwd, capsys, monkeypatch):
    def missing(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available.")

    monkeypatch.setattr(loggers, "TensorBoardLogger", missing)
    with pytest.raises(SystemExit) as stop:
        fit.main([*SMALL, "--trainer.max_epochs", "1", "--tensorboard", "true"])
    assert stop.value.code == 2
    assert "tensorboard=true needs a package" in capsys.readouterr().err
    assert not list(cwd.rglob("ledger.jsonl"))


@pytest.mark.parametrize("other", [[], ["--trainer.logger", "false"]])
def test_tensorboard_stands_beside_other_loggers(cwd, monkeypatch, other: list[str]) -> None:
    made = []

    def board(**options: Any) -> Memory:
        made.append((Memory(), options))
        return made[-1][0]

    wandb = Memory()
    monkeypatch.setattr(fit, "default_logger", lambda *_: wandb)
    monkeypatch.setattr(loggers, "TensorBoardLogger", board)
    monkeypatch.setattr(ClientTables, "on_train_epoch_end", lambda *_: None)
    monkeypatch.setattr(fit, "finish_run", lambda *_: None)
    args = ["--trainer.max_epochs", "1", "--tensorboard", "true", "--run_dir", "run", *other]
    fit.main([*SMALL, *args])
    ((logger, options),) = made
    assert options["save_dir"] == Path("run")
    assert "privacy/epsilon_max" in logger.seen[0]
    assert bool(wandb.seen) == (not other)


def test_tensorboard_writes_its_files(cwd) -> None:
    pytest.importorskip("tensorboard")
    args = ["--trainer.max_epochs", "1", "--tensorboard", "true", "--trainer.logger", "false"]
    fit.main([*SMALL, *args, "--run_dir", "run"])
    assert list((cwd / "run" / "tensorboard").glob("events.out.tfevents.*"))


# --- W&B ---


@pytest.mark.slow
def test_an_offline_run_that_goes_on_keeps_its_id(cwd, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    args = [*SMALL, "--run_dir", "run", "--model.planned_rounds", "4"]
    fit.main([*args, "--trainer.max_epochs", "2"])
    fit.main([*args, "--trainer.max_epochs", "4", "--ckpt_path", "last"])
    kept = (cwd / "run" / "wandb_id").read_text()
    runs = sorted((cwd / "run" / "wandb").glob("offline-run-*"))
    # Two folders are two parts of one run, which `wandb sync` puts together by its id.
    assert len(runs) == 2
    assert {run.name.rpartition("-")[2] for run in runs} == {kept}
    assert all(list(run.glob(f"run-{kept}.wandb")) for run in runs)
    assert list(runs[0].rglob("released/clients*.table.json"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_a_sweep_runs_as_the_agent_would_and_never_reads_the_test_set(
    path: Path, cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = yaml.safe_load(path.read_text())
    assert sweep["metric"] == {"name": "sim_only/val_accuracy", "goal": "maximize"}
    assert sweep["method"] in ("random", "grid", "bayes")
    assert sweep["parameters"]["read_test_set"] == {"value": False}
    assert sweep["parameters"]["data.val_fraction"]["value"] > 0
    monkeypatch.chdir(ROOT)
    seen: list[Memory] = []
    for end in (0, -1):
        drawn = {}
        for name, options in sweep["parameters"].items():
            ends = options.get("values") or [options.get("min"), options.get("max")]
            drawn[name] = {"value": options["value"] if "value" in options else ends[end]}
        expanded = create_sweep_command_args({"args": drawn})["args"]
        program = [p for p in create_sweep_command(sweep["command"]) if p != "${env}"]
        assert program[:3] == ["${interpreter}", "-m", "${program}"]
        assert sweep["program"] == "fl_lightning.fit"
        at = program.index("${args}")
        args = [*program[3:at], *expanded, *program[at + 1 :]]
        run = cwd / f"run{end}"
        seen.append(Memory())
        monkeypatch.setattr(fit, "default_logger", lambda *_: seen[-1])
        fit.main([*args, "--trainer.max_epochs=1", "--run_dir", str(run)])
        summary = json.loads((run / "summary.json").read_text())
        assert summary["test_accuracy"] is None
        logged = {name for metrics in seen[-1].seen.values() for name in metrics}
        assert sweep["metric"]["name"] in logged
        assert not any(name.startswith("test") for name in logged)
        config = yaml.safe_load((run / "config.yaml").read_text())
        for name, value in drawn.items():
            found: Any = config
            *parents, leaf = name.split(".")
            for part in parents:
                found = found[part]
                found = found.get("init_args", found)
            if name != "trainer.max_epochs":
                assert found[leaf] == value["value"], name


def test_there_is_a_sweep() -> None:
    assert SWEEPS


def test_values_that_no_bin_can_tell_apart_are_given_as_equal():
    """As happens where all clients have one noise scale but for its last bits."""
    values = np.array([1.0, 1.0 + 2**-52, 1.0 + 2**-50])
    with pytest.raises(ValueError, match="bins"):
        np.histogram(values, 64)
    np.histogram(_told_apart(values), 64)
    assert (_told_apart(values) == 1.0).all()
    apart = np.array([0.0, 1e-9, 2.0])
    assert (_told_apart(apart) == apart).all()
    assert (_told_apart(np.zeros(3)) == 0).all()
