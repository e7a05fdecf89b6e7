"""Every configuration is documented, parses, and fits its data."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("jsonargparse")
from fl_lightning import fit

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RECORD_SHAPES = {"digits": (1, 8, 8), "fashion_mnist": (1, 28, 28)}


class _MadeError(Exception):
    """Stops the command line when everything is made and nothing is trained."""


def made(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> fit.FederatedCLI:
    """The command line's objects, as they are just before the first round."""

    def stop(self: fit.FederatedCLI) -> None:
        raise _MadeError(self)

    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(fit.FederatedCLI, "before_fit", stop)
    monkeypatch.chdir(ROOT)
    options = ["--run_dir", str(folder / "run"), "--trainer.logger", "false"]
    with pytest.raises(_MadeError) as caught:
        fit.main([*arguments, *options])
    return caught.value.args[0]


def parsed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    """The whole configuration that arguments come to."""
    with pytest.raises(SystemExit) as stop:
        fit.main([*arguments, "--print_config"])
    assert stop.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


def test_there_are_configs() -> None:
    names = {path.stem for path in CONFIGS}
    assert {"base", "smoke"} <= names
    assert any(name.startswith("fashion_mnist") for name in names)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_begins_with_its_command_result_and_time(path: Path) -> None:
    lines = path.read_text().splitlines()
    comment = "\n".join(lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")])
    commands = re.findall(r"^# python -m fl_lightning\.fit.*$", comment, re.MULTILINE)
    assert commands, "`make tables` writes it"
    assert lines[0] == commands[0]
    for command in commands:
        assert f"--config configs/{path.name}" in command or path.stem == "base"
        for name in re.findall(r"--config (\S+)", command):
            assert (ROOT / name).is_file()
    assert re.search(r"\d+\.\d ± \d+\.\d %", comment), "the expected accuracy"
    assert re.search(r"\d (s|min)\b", comment), "the time it takes"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_makes_a_network_that_fits_its_data(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = yaml.safe_load(path.read_text())
    network = text.get("model", {}).get("network", {}).get("init_args", {})
    source = "fashion_mnist" if network.get("image_size") == 28 else "digits"
    assert text.get("data", {}).get("source", source) == source
    cli = made(monkeypatch, tmp_path, "--config", str(path))
    assert cli.trainer.max_epochs > 0
    shape = RECORD_SHAPES[source]
    with torch.no_grad():
        assert cli.model.network(torch.zeros(2, *shape)).shape == (2, 10)
    for section in ("model", "data", "privacy"):
        for name, value in text.get(section, {}).items():
            if not isinstance(value, dict) and (section, name) != ("data", "partition"):
                rules = cli.model.rules
                owner = {"model": rules, "data": cli.datamodule, "privacy": rules.privacy}
                home = owner[section] if hasattr(owner[section], name) else cli.model
                assert getattr(home, name) == value, name
    assert not (tmp_path / "run").exists()


def test_base_is_what_runs_without_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed(capsys, "--config", str(ROOT / "configs" / "base.yaml")) == parsed(capsys)


def test_a_delta_changes_only_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--config", str(ROOT / "configs" / "base.yaml")]
    smoke = yaml.safe_load((ROOT / "configs" / "smoke.yaml").read_text())
    whole = parsed(capsys, *base)
    changed = parsed(capsys, *base, "--config", str(ROOT / "configs" / "smoke.yaml"))
    for section, options in smoke.items():
        for name, value in options.items():
            assert changed[section][name] == value != whole[section][name]
            changed[section][name] = whole[section][name]
    assert changed == whole
