"""The README's commands run, and its figures are those of the committed results."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cohort, faults, headline, processes
from fl_lightning import fit

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line]
FIT = [command for command in COMMANDS if command.startswith("python -m")]


def test_make_targets_exist() -> None:
    targets = [c.split("#")[0].split()[1] for c in COMMANDS if c.startswith("make ")]
    assert targets == ["fit", "test"]
    for target in targets:
        done = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "python -m" in done.stdout


@pytest.mark.parametrize("command", FIT)
def test_fit_commands_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every documented command parses; one of them runs below, others in test_fit."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "fl_lightning.fit"]
    with pytest.raises(SystemExit) as stop:
        fit.main([*words[3:], *([] if "--help" in words else ["--print_config"])])
    assert stop.value.code in (0, None)


def test_personal_epsilon_command_runs(tmp_path: Path) -> None:
    command = next(c for c in FIT if "precision" in c)
    words = [*shlex.split(command)[1:], "--run_dir", str(tmp_path), "--trainer.max_epochs", "2"]
    done = subprocess.run(
        [sys.executable, *words, "--trainer.logger", "false"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1 / 3 / 8" in done.stdout


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("index", range(sum(kind == "python" for kind, _ in BLOCKS)))
def test_python_examples_run(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = [text for kind, text in BLOCKS if kind == "python"][index]
    exec(compile(code, f"README block {index}", "exec"), {})


def test_tables_are_current() -> None:
    for bench in (headline, cohort, faults, processes):
        between = README.split(bench.BEGIN)[1].split(bench.END)[0].strip()
        assert between == bench.table()


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_config_comments_are_current(config: Path) -> None:
    assert config.read_text().startswith(headline.expected(config))
