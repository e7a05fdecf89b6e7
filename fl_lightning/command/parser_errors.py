"""What jsonargparse says of a bad value, in a line: it tells of every type that the value was not.

Its messages have no structure but their words. What is not recognised is said as it is, cut short.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import pkgutil
import re
from collections.abc import Mapping
from importlib import import_module

# Where the classes of an option are found by their plain names.
_HOMES = {
    "model.network": "fl_lightning.models",
    "model.server_optimizer": "torch.optim",
    "model.server_scheduler": "torch.optim.lr_scheduler",
    "model.loss": "torch.nn",
    "trainer.callbacks": "pytorch_lightning.callbacks",
    "trainer.logger": "pytorch_lightning.loggers",
}
_MOST = 200
_WORDS: Mapping[str, str] = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "NoneType": "null",
    "dict": "a mapping such as {name: value}",
    "list": "a list",
    "Sequence": "a list",
    "Iterable": "a list",
    "str": "a text",
}


def in_a_line(error: Exception) -> str:
    """An error of the parser in a line: option, value, what it takes or what was meant perhaps."""
    text = " ".join(str(error).split())
    keys = re.findall(r'Parser key "([^"]+)":', text)
    if not keys:
        return _cut(text)
    option = ".".join(keys)
    found = _no_argument(keys[0], text) or _no_class(option, text) or _lacks(option, text)
    return found or _no_value(option, keys[-1], text)


def _no_argument(option: str, text: str) -> str | None:
    found = re.search(r"Option '([^']+)' is not accepted", text)
    if found is None:
        return None
    named = re.search(r"class_path[ =]'([^']+)'", text)
    path = named[1] if named else ""
    hint = ""
    try:
        known = list(inspect.signature(pkgutil.resolve_name(path)).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        known = []
    near = difflib.get_close_matches(found[1], known, n=1)
    if near:
        hint = f"; did you mean {near[0]}?"
    elif known:
        hint = f"; it has {', '.join(known)}"
    return _cut(f"--{option}: {path or 'the class'} has no argument {found[1]}{hint}")


def _no_class(option: str, text: str) -> str | None:
    missing = re.search(
        r"class_path '([^']+)': (No module named '[^']+'|[^:]*has no attribute.*)", text
    )
    if missing is not None:
        return _cut(f"--{option} {missing[1]}: {missing[2]}")
    found = re.search(r"Expected a dot import path string: (\S+)", text)
    if found is None:
        return None
    home = _HOMES.get(option, "")
    names = [n for n in dir(import_module(home)) if n[0].isupper()] if home else []
    near = difflib.get_close_matches(found[1], names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"--{option} {found[1]}: there is no class of that name; {hint}package.Class works too"


def _lacks(option: str, text: str) -> str | None:
    """Of a class that is not given what it needs."""
    found = re.search(r"following arguments are required: ([\w.]+(?:, [\w.]+)*)", text)
    if found is None:
        return None
    named = re.search(r"class_path[ =]'([^']+)'", text)
    return _cut(f"--{option}: {named[1] if named else 'the class'}: required: {found[1]}")


def _no_value(option: str, key: str, text: str) -> str:
    inner = text.rpartition(f'Parser key "{key}": ')[2]
    if inner.startswith("Expected"):
        # What follows is of the types that the whole class was not.
        text = inner.partition(" - ")[0]
    value = re.search(r"(?:Given value|Got value): (.*?)(?=\. Got value: |$)", text)
    wanted: list[str] = []
    for kind in re.findall(r"- Expected an? ([^-]+?)(?= -| Given|$)", text) or re.findall(
        r"Expected an? (.+?)(?=\. Got|$)", text
    ):
        wanted += _kind(kind)
    if not wanted or value is None:
        return _cut(f"--{option}: {text.rpartition('Parser key')[2].partition(': ')[2]}")
    takes = " or ".join(dict.fromkeys(wanted))
    return _cut(f"--{option} {value[1]}: it takes {takes}")


def _kind(text: str) -> list[str]:
    if text.startswith("path "):
        return []
    literal = re.match(r"typing\.Literal\[(.*)\]", text)
    if literal:
        return [str(v) for v in ast.literal_eval(f"({literal[1]},)")]
    name = re.sub(r"<class '([^']+)'>", r"\1", text).partition("[")[0].rpartition(".")[2]
    return [_WORDS.get(name, name)]


def _cut(text: str) -> str:
    return text if len(text) <= _MOST else text[: _MOST - 2].rstrip() + " …"
