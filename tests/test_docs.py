"""The documentation: commands parse, snippets and notebooks run, paths exist, the site builds."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("jsonargparse")
import aadp_kernels
import fl_lightning
from fl_lightning import fit
from tests import notebooks

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TUTORIAL = (DOCS / "tutorial.md").read_text()


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in DOCS.rglob("*.md")}
COMMANDS = [
    (page, line)
    for page, text in PAGES.items()
    for block in blocks(text, "bash")
    for line in block.splitlines()
]
SITE_TOOLS = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers")


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tutorial's file lies."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "my_code.py").write_text(blocks(TUTORIAL, "python")[0])
    return folder


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_are_accepted(
    page: str, command: str, tutorial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(tutorial)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "fl_lightning.fit"], page
    with pytest.raises(SystemExit) as stop:
        fit.main([*words[3:], "--print_config"])
    assert stop.value.code in (0, None)


def in_tutorial(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": f"{ROOT}:{folder}", "PATH": "/usr/bin:/bin", "HOME": str(folder),
             "WANDB_MODE": "disabled"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_tutorial_runs(tutorial: Path) -> None:
    """The first run, verify, a network and data of one's own, from Python too; then the export."""
    (first,) = [c for _, c in COMMANDS if c.endswith("--run_dir runs/first")]
    in_tutorial(tutorial, *shlex.split(first)[1:], "--trainer.max_epochs", "2")
    in_tutorial(tutorial, "-m", "fl_lightning.ledger", "verify", "runs/first")
    (own,) = [c for _, c in COMMANDS if "my_code.load" in c]
    in_tutorial(tutorial, *shlex.split(own)[1:], "--trainer.max_epochs", "2")
    assert "ε of every client" in in_tutorial(tutorial, "-c", blocks(TUTORIAL, "python")[1])
    in_tutorial(tutorial, "-m", "fl_lightning.export", "runs/first", "--out", "my_model")
    (predict,) = blocks(PAGES["export.md"], "python")
    assert len(json.loads(in_tutorial(tutorial, "-c", predict))) == 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", sorted(notebooks.FOLDER.glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs, and prints or draws something where the saved notebook shows something."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    saved = json.loads(path.read_text(encoding="utf-8"))
    fresh = json.loads(json.dumps(saved))
    notebooks.run(fresh, tmp_path)
    kinds = [
        [[output["output_type"] for output in cell.get("outputs", [])] for cell in each["cells"]]
        for each in (saved, fresh)
    ]
    assert kinds[0] == kinds[1]
    assert saved["nbformat"] == 4


def test_a_notebook_that_fails_is_seen(tmp_path: Path) -> None:
    cell = {"cell_type": "code", "source": ["x = 1\n", "assert x == 2"], "outputs": []}
    with pytest.raises(AssertionError):
        notebooks.run({"cells": [cell]}, tmp_path)


def spans(name: str) -> list[str]:
    """What stands between backticks in a page of the repository."""
    return re.findall(r"`([^`\n]+)`", (ROOT / name).read_text())


def is_path(span: str) -> bool:
    plain = re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", span) is not None
    return plain and "NAME" not in span and ("/" in span or span.endswith((".md", ".yml")))


@pytest.mark.parametrize("page", ["docs/design.md", "CONTRIBUTING.md"])
def test_named_paths_exist(page: str) -> None:
    paths = [span for span in spans(page) if is_path(span)]
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_named_functions_exist() -> None:
    """A how-to names what stands in a file; a file that moves without it is seen."""
    folders = ("aadp_kernels", "fl_lightning", "bench", "tests")
    sources = "\n".join(p.read_text() for f in folders for p in (ROOT / f).rglob("*.py"))
    names = {span for span in spans("CONTRIBUTING.md") if re.fullmatch(r"_?[A-Za-z_]+", span)}
    assert {"ClippingLayer", "SOURCES", "Backend"} <= names
    assert [name for name in names if not re.search(rf"\b{name}\b", sources)] == []


@pytest.mark.parametrize(
    ("question", "holds"),
    [
        ("the rule that makes a clip norm from released norms?", "def released_clip_norms("),
        ("the line that makes a number public?", "write_lines(books, fresh)"),
        ("what a new clipped layer needs?", "def backward("),
        ("what a new setting needs?", "ADJACENCY_OF = {"),
    ],
)
def test_a_stranger_finds_the_door(question: str, holds: str) -> None:
    """docs/design.md answers with one path, and the answer stands there."""
    (row,) = [line for line in PAGES["design.md"].splitlines() if f"| {question} |" in line]
    (path,) = re.findall(r"`([^`]+)`", row)
    assert holds in (ROOT / path).read_text()


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"(\S+\.md)$", navigation, re.MULTILINE))
    made = {f"notebooks/{path.stem}.md" for path in notebooks.FOLDER.glob("*.ipynb")}
    assert listed == set(PAGES) | made


@pytest.mark.parametrize("package", [aadp_kernels, fl_lightning], ids=lambda p: p.__name__)
def test_every_public_name_is_in_the_reference(package: ModuleType) -> None:
    page = PAGES[f"api/{package.__name__}.md"]
    for name in package.__all__:
        assert re.search(rf"::: {package.__name__}\.(\w+\.)?{name}\n", page + "\n") or (
            f"`{name}`" in page
        ), name


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """Needs the extra `docs`, which `make test` installs."""
    if missing := [tool for tool in SITE_TOOLS if find_spec(tool) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    # --strict ends with 1 at the first warning. The word itself may stand in a tool's own notices.
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api" / "aadp_kernels" / "index.html").read_text()
    assert "privatize_" in page
    assert "Guarantees" in page
