"""The options of `fit`, read from the sources of the classes that they are arguments of.

Nothing is imported for that: help and the refusal of a mistyped option take no second.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# Section: module of the package, class, arguments that are no options.
_OURS = {
    "privacy": ("privacy/config.py", "PrivacyConfig", ("comparator",)),
    "model": ("module.py", "FederatedModule", ("privacy", "seed", "run_dir")),
    "data": ("data/module.py", "FederatedDataModule", ("seed",)),
    "privacy.comparator": ("privacy/comparators.py", "Comparator", ()),
    "checkpoint": ("output/checkpoint.py", "RoundCheckpoint", ()),
    "client_tables": ("output/callbacks.py", "ClientTables", ()),
}
_ALIASES = ("privacy/settings.py", "data/module.py")
_TOP = {
    "config": ("str", "", "Configuration file, or the name of a shipped one (`aadp configs`)."),
    "run_dir": ("str | None", "null", "Folder of the run; null: a new one below runs/."),
    "ckpt_path": (
        "str | None",
        "null",
        "Checkpoint to go on from: `last` is that of run_dir; `auto` starts where there is none.",
    ),
    "seed_everything": (
        "bool | int",
        "1",
        "Public seed of networks, partitions, cohorts and faults; never that of noise.",
    ),
    "read_test_set": (
        "bool",
        "true",
        "Read the test set once, after the last round; false while anything is chosen.",
    ),
    "tensorboard": ("bool", "false", "Write TensorBoard's files to the run folder too."),
    "weights_only": ("bool | None", "null", "Of Lightning; how a checkpoint is unpickled."),
    "print_config": ("", "", "Print the whole configuration and end."),
    "help": ("", "", "Print the common options and end; also --help.SECTION and --help.all."),
}


@dataclass(frozen=True)
class Option:
    """One option.

    Args:
        name: with its section, such as `privacy.epsilon`.
        type: what it takes, as the source writes it, aliases resolved; "" where unknown.
        default: as one types it.
        words: what it means, from the docstring.
    """

    name: str
    type: str
    default: str
    words: str

    @property
    def section(self) -> str:
        return self.name.rpartition(".")[0]


@cache
def options() -> Mapping[str, Option]:
    """Every option by its name; those of the chosen network or optimizer are not among them."""
    found = {name: Option(name, *facts) for name, facts in _TOP.items()}
    ours = _default_experiment()
    for section, (file, name, hidden) in _OURS.items():
        for option in _arguments(PACKAGE / file, name, section):
            if option.name.rpartition(".")[2] not in hidden:
                default = ours.get(option.name, option.default)
                found[option.name] = Option(option.name, option.type, default, option.words)
    spec = find_spec("pytorch_lightning")
    if spec is not None and spec.origin is not None:
        trainer = Path(spec.origin).parent / "trainer" / "trainer.py"
        for option in _arguments(trainer, "Trainer", "trainer"):
            default = ours.get(option.name, option.default)
            found[option.name] = Option(option.name, option.type, default, option.words)
    return found


def sections() -> list[str]:
    """Names of groups of options, which take a file with their values."""
    return [*_OURS, "trainer"]


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _aliases() -> Mapping[str, str]:
    """Names of types that the sources define: what they stand for."""
    return {
        node.targets[0].id: ast.unparse(node.value)
        for file in _ALIASES
        for node in _tree(PACKAGE / file).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


def _arguments(path: Path, name: str, section: str) -> Iterator[Option]:
    """Arguments of a class: fields of a dataclass, else those of its __init__."""
    node = next(n for n in _tree(path).body if isinstance(n, ast.ClassDef) and n.name == name)
    init = next((n for n in node.body if getattr(n, "name", "") == "__init__"), None)
    texts = _texts(ast.get_docstring(node) or "")
    if isinstance(init, ast.FunctionDef):
        texts = _texts(ast.get_docstring(init) or "") | texts
        found = _signature(init)
    else:
        found = [(n.target.id, n.annotation, n.value) for n in node.body if _is_field(n)]  # pyright: ignore
    for argument, annotation, default in found:
        type = "" if annotation is None else ast.unparse(annotation)
        words = texts.get(argument, "")
        yield Option(f"{section}.{argument}", _aliases().get(type, type), _typed(default), words)


def _is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


def _signature(
    function: ast.FunctionDef,
) -> list[tuple[str, ast.expr | None, ast.expr | None]]:
    plain = function.args.args[1:]
    missing: list[ast.expr | None] = [None] * (len(plain) - len(function.args.defaults))
    pairs = [
        *zip(plain, [*missing, *function.args.defaults], strict=False),
        *zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True),
    ]
    return [(a.arg, a.annotation, default) for a, default in pairs]


def _typed(default: ast.expr | None) -> str:
    """A default as one would type it."""
    if default is None:
        return ""
    if isinstance(default, ast.Call):  # lazy_instance(CNN)
        return ast.unparse(default.args[0]) if default.args else ""
    text = ast.unparse(default)
    words = {"None": "null", "True": "true", "False": "false"}
    return words.get(text, text.strip("'\""))


def _texts(docstring: str) -> dict[str, str]:
    """What the section `Args:` says of each argument, each on one line."""
    after = docstring.partition("Args:\n")[2]
    block = re.split(r"\n\S", after)[0]
    found: dict[str, str] = {}
    name = ""
    for line in block.splitlines():
        entry = re.match(r" {4}(\w+)(?: \([^)]*\))?: (.*)", line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


def _default_experiment() -> dict[str, str]:
    """What `fit.default_experiment` sets, by option, as one would type it."""
    tree = _tree(PACKAGE / "fit.py")
    function = next(n for n in tree.body if getattr(n, "name", "") == "default_experiment")
    table = next(n.value for n in ast.walk(function) if isinstance(n, ast.Return))
    assert isinstance(table, ast.Dict)
    found = {}
    for key, value in zip(table.keys, table.values, strict=True):
        assert isinstance(key, ast.Constant)
        typed = _typed(value)
        if isinstance(value, ast.Dict):
            typed = str(ast.literal_eval(value)["class_path"])
        found[str(key.value)] = typed
    return found
