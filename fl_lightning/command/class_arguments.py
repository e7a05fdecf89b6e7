"""Arguments of a class end with the class.

A later option or file may name another network, optimizer, schedule, loss or logger. jsonargparse
then keeps every argument of the class before that the new class happens to take too: Adam would
run at the learning rate that was meant for SGD. Here none is kept.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jsonargparse import Namespace, _typehints

_HOOK = "discard_init_args_on_class_path_change"


@contextmanager
def arguments_end_with_their_class(
    defaults: Mapping[str, Mapping[str, Any]],
) -> Iterator[list[str]]:
    """Parse under this rule: what was given for one class is not given to the next.

    Args:
        defaults: arguments that nobody typed, by import path of the class.

    Yields:
        Sentences on what was dropped, complete when the block ends. Defaults are not mentioned.

    Guarantees:
        Arguments given together with the new class, or after it, are kept. The class named again
        keeps what it had. jsonargparse is as before when the block ends.
    """
    notes: dict[str, None] = {}
    before = getattr(_typehints, _HOOK)

    def drop(parser_or_action: object, old: Any, new: Any) -> None:
        if not old or not ("init_args" in old or "dict_kwargs" in old):
            return
        first, second = old["class_path"], new["class_path"]
        if _same(first, second):
            return
        dropped = _plain(old.get("init_args")) | _plain(old.get("dict_kwargs"))
        known = _own_defaults(first) | dict(defaults.get(first, {}))
        for name in ("init_args", "dict_kwargs"):
            if name in old:
                old.pop(name)
        typed = [f"{n}={v!r}" for n, v in dropped.items() if not _is_default(n, v, known)]
        if typed:
            notes[
                f"{second} takes the place of {first}: {', '.join(typed)} was given for the latter "
                "and no longer holds"
            ] = None

    found: list[str] = []
    setattr(_typehints, _HOOK, drop)
    try:
        yield found
    finally:
        setattr(_typehints, _HOOK, before)
        found += notes


def class_before_its_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line on which `--a.b CLASS` stands before `--a.b.argument`, as it is meant.

    Nothing moves across a file, nor past an earlier class of the same option.
    """
    result: list[str] = []
    tokens = list(arguments)
    while tokens:
        token = tokens.pop(0)
        taken = [token]
        if token.startswith("--") and "=" not in token and tokens and tokens[0][:1] != "-":
            taken.append(tokens.pop(0))
        result[_place(result, token) :] = [*taken, *result[_place(result, token) :]]
    return result


def _place(before: Sequence[str], token: str) -> int:
    """Where an option belongs among those before it."""
    name = token.partition("=")[0]
    place = len(before)
    if not name.startswith("--") or "." not in name or name.endswith("+"):
        return place
    for i in range(len(before) - 1, -1, -1):
        option = before[i].partition("=")[0]
        if option == name:
            return len(before)
        if option in ("-c", "--config"):
            break
        if option.startswith(f"{name}."):
            place = i
    return place


def _same(first: str, second: str) -> bool:
    """Whether two import paths name one class, such as torch.optim.SGD and torch.optim.sgd.SGD."""
    if first == second:
        return True
    try:
        return pkgutil.resolve_name(first) is pkgutil.resolve_name(second)
    except (ImportError, AttributeError, ValueError):
        return False


def _plain(arguments: Namespace | Mapping[str, Any] | None) -> dict[str, Any]:
    if arguments is None:
        return {}
    return dict(arguments.as_dict() if isinstance(arguments, Namespace) else arguments)


def _own_defaults(class_path: str) -> dict[str, Any]:
    try:
        parameters = inspect.signature(pkgutil.resolve_name(class_path)).parameters.values()
    except (ImportError, AttributeError, ValueError, TypeError):
        return {}
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _is_default(name: str, value: Any, known: Mapping[str, Any]) -> bool:
    if name not in known:
        return False
    # A file knows lists alone, where a signature has tuples.
    first, second = (list(v) if isinstance(v, tuple) else v for v in (value, known[name]))
    return first == second
