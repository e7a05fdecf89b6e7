"""Names of layers, short enough for a picture."""

from __future__ import annotations

from collections.abc import Sequence

ROOM = 24  # characters that a picture has for a name


def short_names(names: Sequence[str]) -> list[str]:
    """What tells each layer from the others, where full names are too long; in the same order.

    Of `body.encoder.layer.5.query.lora_B.default` beside `…value.lora_B.default` and `head`,
    `body.query` is left. A part of a path stays where paths divide, so that different names stay
    different; what is longer than `ROOM` even then loses its middle.

    Args:
        names: paths of modules with dots, no two alike.
    """
    if all(len(name) <= ROOM for name in names):
        return list(names)
    following: dict[tuple[str, ...], set[str]] = {}  # "": a path that ends here
    paths = [tuple(name.split(".")) for name in names]
    for path in paths:
        for i, part in enumerate((*path, "")):
            following.setdefault(path[:i], set()).add(part)
    found = []
    for path in paths:
        kept = [part for i, part in enumerate(path) if len(following[path[:i]]) > 1]
        found.append(".".join(kept) or path[-1])
    short = [_without_middle(name) for name in found]
    return next((some for some in (short, found) if len(set(some)) == len(some)), list(names))


def _without_middle(name: str) -> str:
    half = (ROOM - 1) // 2
    return name if len(name) <= ROOM else f"{name[: ROOM - 1 - half]}…{name[-half:]}"
