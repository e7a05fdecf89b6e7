"""The rooms of fl_lightning, in the order in which a number passes them: imports go down alone.

Files and functions of both packages are short, and few arguments go by their place.
"""

from __future__ import annotations

import ast
import statistics
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fl_lightning"
# A room may import what stands below it. A name is a folder, or a module beside the folders.
ROOMS = (
    "__main__",
    "deploy",
    "audit",
    "tune",
    "fit",
    "attacks",
    "export",
    "compare",
    "command",
    "output",
    "plots",
    "module",
    "run",
    "run_ledger",
    "run_spec",
    "header",
    "resumption",
    "preflight",
    "release",
    "kernel_choice",
    "rules",
    "server",
    "ledger",
    "accounting",
    "privacy",
    "models",
    "text_model",
    "augmentation",
    "local",
    "networks",
    "data",
    "processes",
    "keys",
    "values",
    "requirements",
)
MOST_LINES, MOST_OF_A_FUNCTION, MEDIAN, MOST_BY_PLACE = 400, 60, 150, 8
# The source of a network is part of what noise is bound to: another one gives other noise.
OLD = {("__init__", "models.py")}
# Compilers of kernels, and autograd, know arguments by their place alone.
COMPILED = ("jit", "jit_inline", "jit_sums", "triton.jit")
BY_PLACE = OLD | {("forward", "autograd.py"), ("tile", "gather_gemm.py")}
PACKAGES = ("aadp_kernels", "fl_lightning")
SOURCES = sorted(path for name in PACKAGES for path in (PACKAGE.parent / name).rglob("*.py"))


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imported() -> dict[str, set[str]]:
    """What each module imports of the package, wherever in the file and for whatever reason."""
    graph = {}
    for name, path in modules().items():
        graph[name] = found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name}: absolute imports only"
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    found.add(whole if whole in modules() else node.module)
            elif isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
        graph[name] = {other for other in found if other in modules()} - {name}
    return graph


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_module_stands_in_a_room() -> None:
    named = {room(name) for name in modules() if "." in name}
    assert named == set(ROOMS)


def test_no_import_climbs() -> None:
    climbing = [
        f"{name} imports {other}"
        for name, others in imported().items()
        for other in others
        if "." in name and "." in other and ROOMS.index(room(other)) < ROOMS.index(room(name))
    ]
    assert climbing == []


def test_no_module_imports_the_door() -> None:
    """`fl_lightning` itself shows names of all rooms, so nothing in a room may need it."""
    assert [name for name, others in imported().items() if "fl_lightning" in others] == []


def test_there_is_no_circle() -> None:
    left = {name: set(others) for name, others in imported().items()}
    while free := [name for name, others in left.items() if not others]:
        for name in free:
            del left[name]
        for others in left.values():
            others.difference_update(free)
    left.pop("fl_lightning", None)
    assert left == {}


def test_local_training_knows_nothing_of_privacy() -> None:
    private = {"privacy", "accounting", "ledger", "release"}
    below = [
        name
        for name in modules()
        if "." in name and room(name) in ("local", "networks", "data", "models")
    ]
    assert below
    for name in below:
        assert not private & {room(other) for other in imported()[name] if "." in other}


def short(path: Path) -> str:
    return path.relative_to(PACKAGE.parent).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node, clean=False)
            told = 0 if doc is None else node.body[0].end_lineno - node.body[0].lineno + 1
            body = node.end_lineno - node.lineno + 1 - told
            assert body <= MOST_OF_A_FUNCTION, f"{node.name} has {body} lines"


def test_files_of_tests_are_short() -> None:
    here = Path(__file__).parent
    long = {
        path.relative_to(here).as_posix(): lines
        for path in sorted(here.rglob("*.py"))
        if (lines := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert long == {}


def by_place(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Arguments that a caller may give by their place."""
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
    return [name for name in names if name not in ("self", "cls", "ctx", "info")]


def is_compiled(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(d).partition("(")[0] in COMPILED for d in function.decorator_list)


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_few_arguments_go_by_their_place(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_compiled(node):
            given = by_place(node)
            few = len(given) <= MOST_BY_PLACE or (node.name, path.name) in BY_PLACE
            assert few, f"{node.name} has {len(given)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_short_as_a_rule(package: str) -> None:
    lengths = [len(p.read_text().splitlines()) for p in SOURCES if short(p).startswith(package)]
    assert statistics.median(lengths) <= MEDIAN
