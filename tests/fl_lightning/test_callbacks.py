"""Callbacks: rounds are on disk before a checkpoint knows of them."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers.logger import DummyLogger

from fl_lightning.output import callbacks
from fl_lightning.output.callbacks import RoundProgress
from fl_lightning.privacy.config import PrivacyConfig
from tests.fl_lightning.recorded_rounds import L, M, Rounds, train


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
    assert list(seen[9].values())[:-1] == ["1", "2", "1", "5", "6", "7", "8", "9"]
    # Contributions 6 and 7 of layers of six and nine numbers: (6 + 7)²/((6²/6 + 7²/9)·15).
    expected = f"{169 / ((6 + 49 / 9) * 15):.6g}"
    assert seen[8]["division_ratio"] == seen[9]["division_ratio"] == expected


@pytest.mark.parametrize(
    "options", [{"clipping": "flat"}, {"setting": "abstract"}], ids=["one layer", "raw history"]
)
def test_no_ratio_where_layers_show_nothing_that_is_released(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    train(Rounds(tmp_path, PrivacyConfig(seed=1, **options)), 1)
    assert {row["division_ratio"] for row in rows(tmp_path, "layers")} == {""}


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


def test_the_time_of_a_run_is_that_of_all_its_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 17.0, 100.0, 104.0])
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: next(clock))
    first, second = callbacks.RoundRecorder(), callbacks.RoundRecorder()
    first._began = callbacks.time.perf_counter()
    kept = first.state_dict()
    second.load_state_dict(kept)
    second._began = callbacks.time.perf_counter()
    assert second.seconds_before == 7.0
    assert second.state_dict()["seconds"] == 11.0
    second.load_state_dict({"rounds": 3})  # of a version that kept no time
    assert second._resumed == 3
