"""The summary of a run is the ledger's, and nothing secret leaves by a logger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from fl_lightning.ledger import Ledger, Release, report
from fl_lightning.output.finish import finish_run
from fl_lightning.output.loggers import default_logger
from fl_lightning.output.summary import final_table, run_summary
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.values.rounding import round_up
from tests.fl_lightning.recorded_rounds import Rounds, train


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
    assert f"{round_up(epsilons[2])} at delta" in (tmp_path / "privacy_statement.md").read_text()
    shown = capsys.readouterr().out
    assert "SIMULATED" in shown
    assert " / ".join(round_up(e) for e in epsilons) in shown
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
    monkeypatch.delenv("WANDB_BASE_URL")
    # W&B itself reads the environment once a process, which may have been before.
    monkeypatch.setenv("WANDB_MODE", "offline")
    told = default_logger(tmp_path / "run")
    assert told is not None
    assert told._wandb_init["mode"] == "offline"
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
