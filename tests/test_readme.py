"""README: its commands and snippets run, its figures are current, and it stays short."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from bench import cohort, faults, headline, pages, processes, readme_figures

pytest.importorskip("jsonargparse")
from fl_lightning import fit

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line]
FIT = [command for command in COMMANDS if command.startswith("python -m")]
SNIPPETS = [text for kind, text in BLOCKS if kind == "python"]
FIRST_SCREEN = 62  # lines


def test_readme_is_short_and_says_at_once_what_it_is() -> None:
    lines = README.splitlines()
    assert len(lines) <= 200
    first = "\n".join(lines[:FIRST_SCREEN])
    assert "*simulated*" in first
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", first)
    assert (ROOT / picture).is_file()
    assert "make fit" in first
    for snippet in SNIPPETS:
        assert snippet in first
        assert len([line for line in snippet.splitlines() if line]) == 8


def test_make_targets_exist() -> None:
    targets = [c.split("#")[0].split()[1] for c in COMMANDS if c.startswith("make ")]
    assert targets == ["fit", "test"]
    for target in targets:
        done = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "python -m" in done.stdout


@pytest.mark.parametrize(("target", "extra"), [("fit", "federated"), ("test", "test")])
def test_make_installs_what_a_target_needs(target: str, extra: str) -> None:
    venv = ["VENV=no-such-folder"]
    done = subprocess.run(
        ["make", "-n", target, *venv], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (installed,) = re.findall(r"pip install .* '\.\[(.*)\]'", done.stdout)
    assert installed == extra


@pytest.mark.parametrize("command", FIT)
def test_fit_commands_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every documented command parses; one of them runs below, others in test_fit."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "fl_lightning.fit"]
    with pytest.raises(SystemExit) as stop:
        fit.main([*words[3:], *([] if "--help" in words else ["--print_config"])])
    assert stop.value.code in (0, None)


def test_personal_epsilon_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    # Lightning uses an old name of jsonargparse.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    command = next(c for c in FIT if "precision" in c)
    words = [*shlex.split(command)[3:], "--run_dir", str(tmp_path), "--trainer.max_epochs", "2"]
    fit.main([*words, "--trainer.logger", "false"])
    assert "1 / 3 / 8" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_python_examples_run(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(SNIPPETS[index], f"README block {index}", "exec"), {})


def test_figures_are_current() -> None:
    assert pages.written(pages.README, "figures") == readme_figures.figures()
    for bench in (headline, cohort, faults, processes):
        assert pages.written(*bench.PLACE) == bench.table()


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_config_comments_are_current(config: Path) -> None:
    assert config.read_text().startswith(headline.expected(config))
