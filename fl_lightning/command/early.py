"""What `fit` says before anything big is imported: its help, and why a command cannot be meant.

Only what is certain is refused here. What is left, the values that do not fit each other or the
data, is checked where it is used.
"""

from __future__ import annotations

import ast
import difflib
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fl_lightning.command.help_page import page
from fl_lightning.command.options import Option, options, sections
from fl_lightning.command.shipped import with_shipped
from fl_lightning.output.console import say, speak_any_encoding
from fl_lightning.privacy.config import PrivacyConfig

_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "None": "null"}
_NEAR = 0.6


def answer_first(arguments: Sequence[str] | None = None) -> None:
    """Print what `answer` has to say and end the program; go on where it has nothing.

    Args:
        arguments: of the command, with or without `fit`; None: those of the process.

    Raises:
        SystemExit: 0 after help, 2 after an error.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    speak_any_encoding()
    try:
        text = answer(given[1:] if given[:1] == ["fit"] else given)
    except ValueError as error:
        say(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if text is not None:
        say(text.rstrip())
        raise SystemExit(0)


def answer(arguments: Sequence[str]) -> str | None:
    """The help that was asked for; None where a run was.

    Args:
        arguments: of `fit`, without the command itself.

    Raises:
        ValueError: an option that there is not, or a value that it cannot take; one line.
    """
    for argument in arguments:
        if argument in ("-h", "--help") or argument.startswith("--help."):
            return page(argument.partition(".")[2])
    given = _Given()
    problem = next(_problems(with_shipped(arguments), given), None)
    if problem is not None:
        raise ValueError(problem)
    if not given.open and "privacy" not in given.values:
        privacy = {n.partition(".")[2]: v for n, v in given.values.items() if "privacy." in n}
        if not any("." in name for name in privacy):
            PrivacyConfig(**({"clip_norm": 3.0} | privacy))
    return None


class _Given:
    """What a command says of each option; `open` where something else may say more."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.open = False

    def note(self, name: str, value: Any) -> None:
        """A later value takes the place of an earlier one."""
        import yaml

        if isinstance(value, str):
            try:
                value = float(value) if _is_number(value, whole=False) else yaml.safe_load(value)
            except yaml.YAMLError:
                self.open = True
        if isinstance(value, float) and _takes_whole_numbers(name) and value.is_integer():
            value = int(value)
        self.values[name] = value


def _takes_whole_numbers(name: str) -> bool:
    type = options()[name].type if name in options() else ""
    return "float" not in type and ("int" in type or "Literal[1" in type)


def _problems(arguments: list[str], note: _Given) -> Iterator[str]:
    place = 0
    while place < len(arguments):
        typed = arguments[place]
        place += 1
        if typed == "-c":
            typed = "--config"
        if not typed.startswith("--"):
            dashes = "options begin with two dashes" if typed[:1] == "-" else "no option takes it"
            yield f"{typed}: {dashes}; see --help"
            continue
        name, equals, value = typed[2:].partition("=")
        name = name.removesuffix("+")
        follows = place < len(arguments) and not arguments[place].startswith("--")
        if not equals and follows:
            value = arguments[place]
            place += 1
        given = bool(equals) or follows
        yield from _problem_of(name, value if given else None, note)


def _problem_of(name: str, value: str | None, note: _Given) -> Iterator[str]:
    known = options()
    note.open |= name in sections()
    if name in sections() or name in ("print_config", "help") or name.endswith(".help"):
        return
    if name not in known:
        if not _below_an_open_one(name):
            yield f"there is no option --{name}{_nearest_option(name)}"
        return
    if value is None:
        yield f"--{name} needs a value; {_wants(known[name])}"
        return
    if name == "config":
        yield from _problems_of_file(value, note)
        return
    note.note(name, value)
    if not _fits(known[name].type, value):
        yield f"--{name} {value}: {_wants(known[name], value)}"


def _problems_of_file(name: str, note: _Given) -> Iterator[str]:
    """What a configuration file says that cannot be meant; what is no such file is not read."""
    import yaml

    path = Path(name).expanduser()
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        if "\n" not in name and ": " not in name:  # else it is no name but the configuration
            yield f"config={name}: {getattr(error, 'strerror', None) or 'it is no text'}"
        note.open = True
        return
    except yaml.YAMLError as error:
        yield f"config={name}: {' '.join(str(error).split())}"
        return
    if not isinstance(found, dict) or "fit" in found:
        note.open = True
        return
    for option, value in _flat(found, ""):
        note.note(option, value)
        if option not in options() and not _below_an_open_one(option):
            yield f"config={name}: there is no option {option}{_nearest_option(option)}"
        elif option in options() and not _fits(options()[option].type, value):
            yield f"config={name}: {option}={value}: {_wants(options()[option], str(value))}"


def _flat(found: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in found.items():
        name = f"{prefix}{key}"
        if name in sections() and isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        elif name not in sections():
            yield name, value


def _below_an_open_one(name: str) -> bool:
    """Whether it is an argument of something that is chosen, such as the network."""
    above = name
    while above := above.rpartition(".")[0]:
        if above in options():
            return not _is_simple(options()[above].type)
    return False


def _is_simple(type: str) -> bool:
    return all(kind in _KINDS or kind.startswith("Literal[") for kind in _parts(type))


def _parts(type: str) -> list[str]:
    """The types of a union, each as it is written."""
    try:
        node = ast.parse(type, mode="eval").body
    except SyntaxError:
        return [type]
    found: list[str] = []
    todo = [node]
    while todo:
        node = todo.pop(0)
        if isinstance(node, ast.BinOp):
            todo[:0] = [node.left, node.right]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("Optional", "Union"):
            inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            todo[:0] = inner
            if ast.unparse(node.value) == "Optional":
                found.append("None")
        else:
            found.append(ast.unparse(node))
    return found


def _fits(type: str, value: Any) -> bool:
    """Whether a value could be of a type; only what is certain does not fit."""
    return any(_fits_one(kind, value) for kind in _parts(type))


def _fits_one(kind: str, value: Any) -> bool:
    text = value if isinstance(value, str) else _text(value)
    if kind.startswith("Literal["):
        return text in _choices(kind)
    if kind == "None":
        return text in ("null", "None", "~", "")
    if kind == "bool":
        return text.lower() in ("true", "false", "yes", "no", "on", "off")
    if kind in ("int", "float"):
        return _is_number(text, whole=kind == "int")
    if kind.startswith("list["):
        return text.startswith("[") or isinstance(value, list)
    return True


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(value)


def _choices(kind: str) -> list[str]:
    return [
        str(v) for v in ast.literal_eval(f"({kind.removeprefix('Literal[').removesuffix(']')},)")
    ]


def _is_number(text: str, *, whole: bool) -> bool:
    try:
        number = float(text.removeprefix(".").strip() if text in (".inf", ".nan") else text)
    except ValueError:
        return False
    return not whole or (math.isfinite(number) and number == int(number))


def _wants(option: Option, value: str | None = None) -> str:
    """What an option takes, and what was meant perhaps."""
    kinds, choices = [], []
    for kind in sorted(_parts(option.type), key=lambda k: k == "None"):
        if kind.startswith("Literal["):
            choices += _choices(kind)
        elif kind.startswith("list["):
            kinds.append("a list such as [1, 2]")
        else:
            kinds.append(_KINDS.get(kind, "a value"))
    wanted = " or ".join([*([f"one of {', '.join(choices)}"] if choices else []), *kinds])
    near = difflib.get_close_matches(value or "", choices, n=1, cutoff=0.5)
    return f"it takes {wanted}" + (f"; did you mean {near[0]}?" if near else "")


def _nearest_option(name: str) -> str:
    """The options that were meant perhaps: of a like name, or the same one in another section."""
    known = [n for n in options() if not n.endswith("help")]
    last = name.rpartition(".")[2]
    near = [n for n in known if n.rpartition(".")[2] == last]
    near += difflib.get_close_matches(name, known, n=1, cutoff=_NEAR)
    if not near:
        lasts = {n.rpartition(".")[2]: n for n in known}
        near = [lasts[n] for n in difflib.get_close_matches(last, lasts, n=1, cutoff=_NEAR)]
    meant = " or ".join(f"--{n}" for n in dict.fromkeys(near[:2]))
    return f"; did you mean {meant}?" if meant else "; --help.all shows all of them"
