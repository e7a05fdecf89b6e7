"""docs/networks.md: page.md with the table of the rows that `tests.networks.rows` has made.

python -m tests.networks.page             the page, on the screen
python -m tests.networks.page --write     into docs/networks.md
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.networks.measure import Seen
from tests.networks.rows import BLOCKS, COLUMNS, RECORD, Row, kept

PAGE = Path(__file__).resolve().parents[2] / "docs" / "networks.md"
BOUND, ROUNDING = 1 + 1e-6, 1e-4
STOPPED = ("refused", "raises", "raises (Opacus)", "fails")
HEAD = ("network", *COLUMNS, "move", "error")
# Why Opacus' hooks give another gradient than the network has, where we know.
_ELSEWHERE = "Opacus sees a weight where its layer is called, not where F.linear takes it"
LIMITS = {
    "tied autoencoder, F.linear": _ELSEWHERE,
    "tied embedding and softmax, F.linear": _ELSEWHERE,
    "forward hooks": "Opacus takes the gradient of what a forward hook returns for that of the "
    "layer's own output",
}

_TEXT = Path(__file__).with_name("page.md").read_text(encoding="utf-8")
_COUNTED = {
    "n_backward": ("backward",),
    "n_vmap": ("vmap",),
    "n_loop": ("loop",),
    "n_both": ("backward, loop", "backward, vmap"),
    "n_hooks": ("hooks",),
    "n_refused": ("refused",),
    "n_raises": ("raises",),
    "n_opacus": ("raises (Opacus)",),
    "n_inexact": ("inexact",),
}


def cell(seen: Seen) -> str:
    """What the page says of one network under one setting."""
    if seen.way in STOPPED:
        return seen.way
    if not seen.move <= BOUND:
        return f"{seen.way}, but moves by {seen.move:.6f}"
    return "inexact" if seen.difference > ROUNDING else seen.way


def line(name: str, row: Row) -> str:
    """The row of the table."""
    ours = [s for n, s in row.items() if n in RECORD and s.way not in STOPPED]
    errors = [s.difference for s in ours if s.difference == s.difference]
    figures = ("", "")
    if ours:
        move = max(s.move for s in ours)
        figures = (f"{move:.7f}", f"{max(errors):.0e}" if errors else "—")
    cells = (cell(row[column]) if column in row else "not made" for column in COLUMNS)
    return "| " + " | ".join((name, *cells, *figures)) + " |"


# An adapter is given a network, never the loss that is computed from its outputs.
LOSS_MIXES = {
    "contrastive loss (mixes records)": "an adapter sees the network and not its loss, which must "
    "be a sum over records with public weights (docs/adapters.md)"
}


def reason(name: str, seen: Seen) -> str:
    """Why a cell is not exact; "" if it is."""
    what = cell(seen)
    if what == "inexact":
        return LIMITS.get(name, "")
    if "moves" in what:
        return LOSS_MIXES.get(name, "")
    return seen.reason


def reasons(name: str, row: Row) -> str:
    """Why cells of a row are not exact, each reason once."""
    by_reason: dict[str, list[str]] = {}
    for column, seen in row.items():
        if why := reason(name, seen):
            by_reason.setdefault(why, []).append(column)
    parts = [f"{', '.join(columns)}: {why}" for why, columns in by_reason.items()]
    return "".join(f"- **{name}**, {part}\n" for part in parts)


def page(versions: Mapping[str, str], rows: Mapping[str, Row]) -> str:
    """The whole page."""
    cells = collections.Counter(cell(seen) for row in rows.values() for seen in row.values())
    text = _TEXT.format(
        count=len(rows),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        rounding=ROUNDING,
        **{key: sum(cells[name] for name in names) for key, names in _COUNTED.items()},
    )
    table = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    table += [line(name, row) for name, row in rows.items()]
    why = "".join(reasons(name, row) for name, row in rows.items())
    text += "\n## The networks\n" + "\n".join(table) + "\n\n## Reasons\n" + why
    lacking = [block.name for block in BLOCKS if block.name not in rows]
    if lacking:
        text += f"\n## Without a row yet\n{'; '.join(lacking)}.\n"
    return text


def main(arguments: list[str]) -> None:
    """Command line; see the module."""
    text = page(*kept())
    if "--write" in arguments:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
