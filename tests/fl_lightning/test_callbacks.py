"""Callbacks: rounds are on disk before a checkpoint knows of them, and nothing secret leaves."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from aadp_kernels import Layout
from fl_lightning.ledger import Ledger, Release, report
from fl_lightning.output import callbacks
from fl_lightning.output.callbacks import RoundProgress, RoundRecorder
from fl_lightning.output.finish import finish_run
from fl_lightning.output.loggers import default_logger
from fl_lightning.output.summary import final_table, run_summary
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.values.round import RoundResult

K, M, L = 5, 3, 2


class Rounds(pl.LightningModule):
    """Stands in for FederatedModule: results are functions of the round and of `shift`."""

    federation: Any = None
    run: Any = None

    def __init__(self, path: Path, privacy: PrivacyConfig | None = None, shift: float = 0.0):
        super().__init__()
        self.automatic_optimization = False
        self.network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        self.layout = Layout.build(dict(self.network.named_parameters()))
        self.privacy = privacy or PrivacyConfig(seed=1)
        self.ledger: Any = object() if self.privacy.private else None
        self.run_path, self.shift = path, shift
        self.result: RoundResult | None = None

    def training_step(self, batch: int, batch_idx: int) -> None:
        self.optimizers().step()
        r = self.current_epoch
        table = np.arange(M * L, dtype=float).reshape(M, L) + r + self.shift
        if not self.privacy.private:
            table = np.zeros((0, 0))
        self.result = RoundResult(
            round=r,
            cohort=np.array([r % K, (r + 1) % K, (r + 2) % K]),
            clip_norm=table + 1,
            shares=table + 2,
            contribution=table + 3,
            noise_scale=table + 4,
            clipped_fraction=table + 5,
            nonfinite=r,
            participants=3,
            epsilon_spent=np.linspace(r, r + 1, K),
            seconds=0.25,
        )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.log("sim_only/val_accuracy", (self.current_epoch + 1) / 100, batch_size=1)
            self.log("sim_only/val_loss", 2.0, batch_size=1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/accuracy", 0.5, batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(1), batch_size=None)

    val_dataloader = test_dataloader = train_dataloader


class Memory(DummyLogger):
    """Remembers what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        seen = self.seen.setdefault(step, {})
        assert not seen.keys() & metrics.keys() - {"epoch"}
        seen.update(metrics)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no keys of whoever runs the tests, no advice about workers."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_RUN_ID", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*no pre-optimization state was saved"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def train(
    module: Rounds, rounds: int, *more: pl.Callback, ckpt: Path | None = None, **options: Any
):
    """Fit with a recorder; returns the Trainer."""
    defaults: dict[str, Any] = {"logger": False, "enable_progress_bar": False}
    if not any(isinstance(c, ModelCheckpoint) for c in more):
        defaults["enable_checkpointing"] = False
    trainer = pl.Trainer(
        max_epochs=rounds,
        accelerator="cpu",
        callbacks=[*more, RoundRecorder()],
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=module.run_path,
        **{**defaults, **options},
    )
    trainer.fit(module, ckpt_path=ckpt, weights_only=False)
    return trainer


def rows(path: Path, name: str = "rounds") -> list[dict[str, str]]:
    with (path / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_row_a_round_with_validation_where_there_was_one(tmp_path: Path) -> None:
    train(Rounds(tmp_path), 4, check_val_every_n_epoch=2)
    seen = rows(tmp_path)
    assert [r["round"] for r in seen] == ["0", "1", "2", "3"]
    accuracies = [r["sim_only_val_accuracy"] for r in seen]
    assert accuracies[0] == accuracies[2] == ""
    assert [float(a) for a in accuracies[1::2]] == pytest.approx([0.02, 0.04])
    expected = {"clients": "3", "epsilon_max": "3", "epsilon_median": "2.5", "epsilon_min": "2"}
    assert expected.items() <= seen[2].items()
    assert seen[2]["sim_only_nonfinite"] == "2"
    assert float(seen[2]["seconds"]) == 0.25


def test_one_row_a_client_and_layer(tmp_path: Path) -> None:
    train(Rounds(tmp_path), 2)
    seen = rows(tmp_path, "layers")
    assert len(seen) == 2 * M * L
    assert list(seen[9].values()) == ["1", "2", "1", "5", "6", "7", "8", "9"]


def test_a_new_run_replaces_old_files(tmp_path: Path) -> None:
    train(Rounds(tmp_path), 3)
    train(Rounds(tmp_path), 1)
    assert len(rows(tmp_path)) == 1
    assert len(rows(tmp_path, "layers")) == M * L


@pytest.mark.parametrize(
    "when",
    [
        {"save_on_train_epoch_end": True},
        {"save_on_train_epoch_end": False},
        {"every_n_train_steps": 1},
    ],
    ids=["epoch", "validation", "batch"],
)
def test_resuming_keeps_what_the_checkpoint_knows_and_repeats_the_rest(
    tmp_path: Path, when: dict[str, Any]
) -> None:
    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "c", filename="{epoch}", save_top_k=-1, **when)

    train(Rounds(tmp_path), 5, keep())
    before = {name: (tmp_path / f"{name}.csv").read_text() for name in ("rounds", "layers")}
    with (tmp_path / "layers.csv").open("a") as file:
        file.write("5,0,torn")
    checkpoint = next((tmp_path / "c").glob("epoch=2*.ckpt"))
    train(Rounds(tmp_path, shift=100.0), 5, keep(), ckpt=checkpoint)
    assert (tmp_path / "rounds.csv").read_text() == before["rounds"]
    old, new = before["layers"].splitlines(), (tmp_path / "layers.csv").read_text().splitlines()
    kept = 1 + 3 * M * L
    assert new[:kept] == old[:kept]
    assert len(new) == len(old)
    assert [float(r["clip_norm"]) for r in rows(tmp_path, "layers")[kept - 1 :: M * L]] == [
        104,
        105,
    ]


def test_a_torn_number_is_no_round(tmp_path: Path) -> None:
    path = tmp_path / "rounds.csv"
    path.write_bytes(b"round,x\n0,5\n1,6\n1")
    callbacks._keep_before(path, ("round", "x"), 20)
    assert path.read_bytes() == b"round,x\n0,5\n1,6\n"


def test_rows_are_written_before_the_checkpoint(tmp_path: Path) -> None:
    known: list[int] = []

    class Watching(ModelCheckpoint):
        def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
            known.append(len(rows(tmp_path)))
            super()._save_checkpoint(trainer, filepath)

    train(Rounds(tmp_path), 3, Watching(tmp_path / "c", save_top_k=-1))
    assert known == [1, 2, 3]


def test_loggers_get_released_and_sim_only_scalars(tmp_path: Path) -> None:
    memory = Memory()
    train(Rounds(tmp_path), 2, logger=memory, check_val_every_n_epoch=2)
    assert memory.seen[1] == pytest.approx(
        {
            "epoch": 1,
            "perf/round_seconds": 0.25,
            "privacy/simulated_epsilon_max": 2.0,
            "privacy/simulated_epsilon_median": 1.5,
            "released/clip_norm/0": 4.0,
            "released/clip_norm/1": 5.0,
            "released/share/0": 5.0,
            "released/share/1": 6.0,
            "released/noise_scale/0": 7.0,
            "released/noise_scale/1": 8.0,
            "sim_only/clipped_fraction/0": 8.0,
            "sim_only/clipped_fraction/1": 9.0,
            "sim_only/val_accuracy": 0.02,
            "sim_only/val_loss": 2.0,
        }
    )
    assert "sim_only/val_accuracy" not in memory.seen[0]


def test_without_privacy_there_is_no_epsilon(tmp_path: Path) -> None:
    memory = Memory()
    train(Rounds(tmp_path, PrivacyConfig(setting="none")), 1, logger=memory)
    assert rows(tmp_path)[0]["epsilon_max"] == ""
    assert rows(tmp_path, "layers") == []
    assert set(memory.seen[0]) == {
        "epoch",
        "perf/round_seconds",
        "sim_only/val_accuracy",
        "sim_only/val_loss",
    }


def progress(path: Path, capsys: Any, rounds: int, privacy: PrivacyConfig, **options: Any) -> str:
    options = {"enable_progress_bar": True, **options}
    train(Rounds(path, privacy), rounds, RoundProgress(), **options)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("privacy", "text"),
    [
        (PrivacyConfig(), "round 40/40  ε ≤ 40.00 (max)  sim_only accuracy 0.400"),
        (PrivacyConfig(seed=3), "ε ≤ 40.00 (max)  simulated"),
        (PrivacyConfig(setting="abstract"), "nominal ε 40.00, no guarantee"),
        (PrivacyConfig(setting="none"), "no privacy  sim_only"),
    ],
)
def test_ten_lines_where_there_is_no_terminal(
    tmp_path: Path, capsys: Any, privacy: PrivacyConfig, text: str
) -> None:
    lines = progress(tmp_path, capsys, 40, privacy).splitlines()
    assert [line.split()[1] for line in lines] == [f"{r}/40" for r in range(4, 41, 4)]
    assert text in lines[-1]


def test_an_infinite_epsilon_is_shown_as_such(tmp_path: Path) -> None:
    module = Rounds(tmp_path)
    trainer = train(module, 1)
    assert module.result is not None
    module.result.epsilon_spent[:] = math.inf
    assert "ε = ∞" in callbacks._status(trainer, module)
    assert callbacks._epsilons(module) == (math.inf,) * 3


def test_a_bar_in_a_terminal_and_none_on_demand(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert progress(tmp_path, capsys, 3, PrivacyConfig(), enable_progress_bar=False) == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = progress(tmp_path, capsys, 3, PrivacyConfig())
    assert "round 3/3" in shown
    assert "ε ≤ 3.00 (max)" in shown
    assert "Epoch" not in shown


def with_ledger(path: Path, **config: Any) -> Rounds:
    """A module with three clients' releases in a real ledger."""
    module = Rounds(path, PrivacyConfig(**config))
    header = {
        "setting": module.privacy.setting,
        "privacy_unit": module.privacy.unit,
        "trust": "local",
        "adjacency": module.privacy.resolved_adjacency,
        "mechanism": "gaussian",
        "delta": 1e-5,
        "epsilon": 8.0,
        "simulated": module.privacy.seed is not None,
    }
    module.ledger = Ledger.create(path, header)
    module.ledger.append(
        [
            Release(
                client=client,
                round=0,
                steps=5,
                mechanism="gaussian",
                noise_multiplier=3.0 + client,
                sampling_rate=1.0,
                adjacency=module.privacy.resolved_adjacency,
                num_layers=1,
                clip_norm=(1.0,),
                shares=(1.0,),
                binding="",
                digest="",
                guarantee=module.privacy.guarantee,
            )
            for client in range(3)
        ]
    )
    return module


def test_the_summary_is_the_ledgers(tmp_path: Path, capsys: Any) -> None:
    module = with_ledger(tmp_path, seed=4)
    trainer = train(module, 2)
    trainer.test(module, verbose=False)
    module.result = None  # as after a resumption with nothing left to do
    finish_run(trainer, module, 1.5)
    summary = json.loads((tmp_path / "summary.json").read_text())
    epsilons = sorted(r.epsilon for r in report(tmp_path).values())
    names = ("epsilon_min", "epsilon_median", "epsilon_max")
    assert [summary[name] for name in names] == epsilons
    assert summary["test_accuracy"] == 0.5
    assert summary["sim_only_val_accuracy"] == pytest.approx(0.02)
    assert (summary["rounds"], summary["releases"], summary["seconds"]) == (2, 3, 1.5)
    assert summary["versions"]["torch"] == torch.__version__
    assert f"{epsilons[2]:.4g} at delta" in (tmp_path / "privacy_statement.md").read_text()
    shown = capsys.readouterr().out
    assert "SIMULATED" in shown
    assert " / ".join(f"{e:.4g}" for e in epsilons) in shown
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {
        "convergence.png",
        "layers.png",
        "clients.png",
        "attacks.png",
    }
    assert 0 < summary["attack_advantage_median"] <= summary["attack_advantage_max"] < 1


@pytest.mark.parametrize("setting", ["abstract", "none"])
def test_nothing_is_called_proven_that_is_not(tmp_path: Path, setting: str) -> None:
    if setting == "none":
        module = Rounds(tmp_path, PrivacyConfig(setting="none"))
    else:
        module = with_ledger(tmp_path, setting=setting)
    trainer = train(module, 1)
    finish_run(trainer, module, 1.0)
    summary = run_summary(trainer, module, 1.0)
    expected = "none" if setting == "none" else "nominal ε, no guarantee"
    assert summary["privacy"] == expected
    assert (summary["epsilon_max"] is None) == (setting == "none")
    assert expected in list(final_table(summary).columns[1].cells)
    statement = (tmp_path / "privacy_statement.md").read_text()
    assert ("No privacy" if setting == "none" else "Nominal epsilon, no guarantee") in statement


def test_wandb_is_online_only_with_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline = default_logger(tmp_path / "run", "a name")
    assert offline is not None
    assert offline._wandb_init["mode"] == "offline"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "netrc").write_text("machine api.wandb.ai login user password x\n")
    online = default_logger(tmp_path / "run", "a name")
    assert online is not None
    assert "mode" not in online._wandb_init
    assert online.version != offline.version, "neither run has begun"
    assert not (tmp_path / "run").exists()
    offline.begin()
    again = default_logger(tmp_path / "run")
    assert again is not None
    assert again.version == offline.version == (tmp_path / "run" / "wandb_id").read_text()
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.example")
    elsewhere = default_logger(tmp_path / "run")
    assert elsewhere is not None
    assert elsewhere._wandb_init["mode"] == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert default_logger(tmp_path / "run") is None


def test_wandb_never_gets_the_secret_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    path, secret = tmp_path / "run", bytes(range(100, 132))
    module = with_ledger(path)
    (path / "secret.key").write_bytes(secret)
    (path / "config.yaml").write_text("seed: 1\n")
    added: list[str] = []
    add_file = wandb.Artifact.add_file

    def record(self: Any, local_path: str, *args: Any, **options: Any) -> Any:
        added.append(Path(local_path).name)
        return add_file(self, local_path, *args, **options)

    monkeypatch.setattr(wandb.Artifact, "add_file", record)
    keep = ModelCheckpoint(path / "checkpoints", save_last=True)
    trainer = train(module, 2, keep, logger=default_logger(path, "test"))
    finish_run(trainer, module, 1.0)
    assert wandb.run is None
    assert set(added) == {
        "ledger.jsonl",
        "ledger.head",
        "privacy_statement.md",
        "summary.json",
        "config.yaml",
        "convergence.png",
        "layers.png",
        "clients.png",
        "attacks.png",
        "last.ckpt",
    }
    kept = [f for root in (path / "wandb", tmp_path / "home") for f in root.rglob("*")]
    assert any(f.suffix == ".wandb" for f in kept)
    copies = [f for f in kept if f.is_file() and secret in f.read_bytes()]
    assert copies == []
