"""The model of a run, taken away with its card."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file

from fl_lightning import export as exporting
from fl_lightning.export import export, to_safetensors
from fl_lightning.fit import main
from fl_lightning.ledger import Ledger, LedgerError, report
from fl_lightning.models import MLP, LogisticRegression
from fl_lightning.output.checkpoint import CHECKPOINT
from fl_lightning.values.rounding import round_up
from tests.fl_lightning.resuming import RECORD, go

ARGUMENTS = [
    *("--data.num_clients", "2", "--model.network", "fl_lightning.models.LogisticRegression"),
    *("--privacy.epsilon", "null", "--privacy.noise_multiplier", "2", "--trainer.max_epochs", "2"),
    *("--model.execution", "loop", "--trainer.accelerator", "cpu", "--trainer.logger", "false"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        main([*ARGUMENTS, "--run_dir", str(folder)])
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of one run."""
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    return shutil.copytree(made, tmp_path / "run")


def test_the_exported_network_is_the_one_that_was_trained(run: Path) -> None:
    folder = export(run)
    assert folder == run / "export"
    weights = load_file(folder / "model.safetensors")
    network = LogisticRegression()
    network.load_state_dict(weights)
    trained = torch.load(run / CHECKPOINT, weights_only=True)["state_dict"]
    assert {f"network.{name}" for name in weights} == set(trained)
    for name, value in network.state_dict().items():
        assert torch.equal(value, trained[f"network.{name}"])


def test_the_card_says_what_the_ledger_says(run: Path) -> None:
    folder = export(run, run.parent / "taken")
    card = (folder / "README.md").read_text()
    spent = max(client.epsilon for client in report(run).values())
    with Ledger.open(run) as ledger:
        assert ledger.head_hash in card
    for words in (
        f"| epsilon | {round_up(spent)} |",
        "| unit | record |",
        "zero_out",
        "| proven |",
    ):
        assert words in card, words
    assert "LogisticRegression(in_features=64, num_classes=10)" in card
    statement = (folder / "privacy_statement.md").read_text()
    assert statement.startswith("# Privacy statement")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert float(file.metadata()["epsilon"]) == spent
    secret = (run / "secret.key").read_bytes()
    for path in folder.iterdir():
        raw = path.read_bytes()
        assert secret not in raw
        assert secret.hex().encode() not in raw


def test_simulated_nominal_and_no_privacy_are_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for options, words in (
        (["--privacy.seed", "1"], "simulated: public seed"),
        (["--privacy.setting", "abstract"], "nominal, no guarantee"),
        (["--privacy.setting", "none"], "no differential privacy"),
    ):
        run = tmp_path / "".join(options)
        main([*ARGUMENTS, "--run_dir", str(run), *options])
        folder = export(run)
        assert words in (folder / "README.md").read_text()
        assert (folder / "privacy_statement.md").exists() == ("none" not in options)


def test_a_ledger_that_lost_releases_is_refused(run: Path) -> None:
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(LedgerError):
        export(run)
    (run / "ledger.head").unlink()
    with pytest.raises(LedgerError):
        export(run)
    assert not (run / "export").exists()


def test_a_run_in_progress_is_refused(run: Path) -> None:
    with Ledger.open(run), pytest.raises(LedgerError):
        export(run)


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exporting.main([str(run)]) == 0
    assert "README.md, model.safetensors, privacy_statement.md" in capsys.readouterr().out
    assert exporting.main([str(tmp_path / "nowhere")]) == 2
    assert "last.ckpt is missing" in capsys.readouterr().err


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_a_run_always_gives_the_same_bytes(tmp_path: Path) -> None:
    """Whatever order sets have: two of so many names have another one in another process."""
    run = tmp_path / "run"
    go(run, 1, privacy=RECORD, hidden=(4, 4, 4, 4))
    first = digests(export(run, tmp_path / "first"))
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    out = tmp_path / "again"
    subprocess.run(
        [sys.executable, "-m", "fl_lightning.export", str(run), "--out", str(out)],
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONHASHSEED": seed},
    )
    assert digests(out) == first


def test_any_metadata_any_weights_the_same_bytes() -> None:
    weights = {"b": torch.arange(3.0), "a": torch.ones(2, 5, dtype=torch.float64)}
    metadata = {f"name {i} ε": str(i) for i in range(9)}
    files = {to_safetensors(weights, metadata) for _ in range(20)}
    assert len(files) == 1
    (raw,) = files
    read = load(raw)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)


def test_it_is_the_run_of_the_checkpoint_whatever_was_asked_for_later(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(export(run, tmp_path / "first"))
    files = set(run.rglob("*"))
    later = ["--ckpt_path", "last", "--run_dir", str(run), "--trainer.max_epochs", "2"]
    other = ["--model.network", "fl_lightning.models.MLP"]
    with pytest.raises(SystemExit) as stop:
        main([*ARGUMENTS, *later, *other])
    assert stop.value.code == 2
    assert "network=fl_lightning.models.MLP" in capsys.readouterr().err
    assert set(run.rglob("*")) == files
    assert digests(export(run, tmp_path / "second")) == before
    # Nor does a file count that somebody left there.
    (run / "config_2.yaml").write_text("model: {network: {class_path: other.Network}}\n")
    (run / "config.yaml").unlink()
    assert digests(export(run, tmp_path / "third")) == before


def test_a_run_from_python(tmp_path: Path) -> None:
    go(tmp_path / "run", 2, privacy=RECORD)
    folder = export(tmp_path / "run")
    card = (folder / "README.md").read_text(encoding="utf-8")
    for words in ("| network | fl_lightning.models.MLP |", "| clients | 3 |", "| rounds | 2 |"):
        assert words in card
    assert "| test accuracy | - |" in card
    assert "from fl_lightning.models import MLP" in card
    assert set(load_file(folder / "model.safetensors")) == set(MLP(6, 3, hidden=[4]).state_dict())


def test_a_checkpoint_that_does_not_say_what_it_is_of(run: Path) -> None:
    checkpoint = torch.load(run / CHECKPOINT, weights_only=False)
    del checkpoint["aadp_fl"]["run"]
    torch.save(checkpoint, run / CHECKPOINT)
    with pytest.raises(ValueError, match="does not say what run it is of"):
        export(run)
    (run / CHECKPOINT).write_bytes(b"PK")
    with pytest.raises(ValueError, match="is damaged"):
        export(run)
