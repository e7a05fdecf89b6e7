"""The configurations that come with the package, by name, from any folder."""

from __future__ import annotations

import difflib
import sysconfig
from collections.abc import Sequence
from pathlib import Path

# Of single runs: those below `comparators` are for the studies of docs/results.md.
_LISTED = ("", "best")


def folder() -> Path:
    """Where they lie: beside the packages in a clone, in the environment's data otherwise.

    Raises:
        FileNotFoundError: they were not installed.
    """
    clone = Path(__file__).resolve().parents[2] / "configs"
    installed = Path(sysconfig.get_path("data")) / "share" / "aadp-fl" / "configs"
    for path in (clone, installed):
        if (path / "base.yaml").is_file():
            return path
    raise FileNotFoundError(f"the shipped configurations are neither in {clone} nor in {installed}")


def shipped() -> dict[str, Path]:
    """Every shipped configuration of a run by its name, such as `base` or `best/fashion_mnist`."""
    root = folder()
    found = [path for part in _LISTED for path in sorted((root / part).glob("*.yaml"))]
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in found}


def with_shipped(arguments: Sequence[str]) -> list[str]:
    """Arguments in which the name of a shipped configuration is its file.

    A file of that name in the current folder comes first.

    Raises:
        ValueError: a name that is neither.
    """
    found = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, name = argument.partition("=")
        if before == "--config":
            found.append(_file(argument))
        elif option == "--config" and equals:
            found.append(f"--config={_file(name)}")
        else:
            found.append(argument)
    return found


def _file(name: str) -> str:
    path = Path(name).expanduser()
    if path.exists() or path.suffix or "\n" in name or ":" in name:
        return name
    known = shipped()
    if name in known:
        return str(known[name])
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(
        f"config={name}: there is no such file, nor a shipped configuration of that name; "
        f"{hint}`aadp configs` lists them"
    )


def described(path: Path) -> str:
    """What is expected of a configuration: the indented lines of its first comment."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if line.startswith("#   "):
            lines.append(line[1:].strip())
    return "; ".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """List the shipped configurations with what is expected of them."""
    from fl_lightning.output.console import say

    for name, path in shipped().items():
        expected = described(path)
        say(f"{name:32} {expected}".rstrip())
    say(f"\naadp fit --config NAME [--config NAME ...]; the files are in {folder()}")
    return 0
