"""docs/networks.md: what works, as the project's own code says.

    python -m tests.networks.page          the page, on the screen
    python -m tests.networks.page --write  into docs/networks.md

Rows whose packages are missing are kept as they stand in the page.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.networks import hugging_face, plain, sequences, shared
from tests.networks.adapters import adapted, opacus_engine, private_optimizer
from tests.networks.blocks import Block
from tests.networks.measure import Seen, measured, subject, trained_by_clients
from tests.networks.product import Setting

BLOCKS = (*plain.BLOCKS, *sequences.BLOCKS, *shared.BLOCKS, *hugging_face.BLOCKS)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "networks.md"
COLUMNS = {
    "layer": Setting(),
    "Laplace": Setting(mechanism="laplace"),
    "flat": Setting("flat"),
    "joint": Setting("joint"),
    "grid": Setting(noise_form="grid"),
}
BOUND, ROUNDING = 1 + 1e-6, 1e-4
STOPPED = ("refused", "raises", "raises (Opacus)", "fails")
CLIENTS = Setting(setting="client+local")
HEAD = (
    "network",
    *COLUMNS,
    "clients",
    "PrivateOptimizer",
    "Opacus, per layer",
    "Opacus, flat",
    "move",
    "error",
)

_TEXT = """# What works

Written by `python -m tests.networks.page --write`; a test compares it with what the code does.
Every network is small and has records to match. The rows of Hugging Face and peft need
`pip install transformers peft`.

`record+local`, by what is clipped together: each **layer** (also with **Laplace** noise), the
whole gradient (**flat**), or by the layers' noise (**joint**); **grid** is `noise_form=grid` with
layers. **clients** are the settings that clip a client's whole update.

- backward: exact, clipped in one backward pass;
- vmap, loop: exact, by per-sample gradients, under `torch.func.vmap` or record by record (under
  clients: they train together, or one after another);
- hooks: exact, by Opacus' per-sample gradients;
- backward, loop: in one backward pass, and record by record for batches whose forward does not
  allow it;
- refused, raises: one clear line, before anything is released; the reasons stand below;
- raises (Opacus): an error of Opacus itself, whose per-sample gradients do not know the layer;
- inexact: the norm is bounded, but Opacus' per-sample gradient is not that of the network.

The adapters get lazy layers after one forward.

Each accepted cell was compared with clipping by the definition: float64, plain autograd, one
record at a time. **move** is the largest norm that one record adds to a sum, over what it may add,
of all cells of fl_lightning: each record and extreme ones in its place, against the batch without
it and against padding there. **error** is the largest distance from the definition, over clip
norms and records (— where the forward draws random numbers).

"""


@dataclass(frozen=True)
class Row:
    """One network.

    Args:
        name: of the block.
        seen: what was seen in each column of HEAD between the name and the figures.
    """

    name: str
    seen: dict[str, Seen]

    @property
    def ways(self) -> tuple[str, ...]:
        """The cells without the figures."""
        return tuple(_cell(seen) for seen in self.seen.values())

    def line(self) -> str:
        """The row of the table."""
        ours = [s for n, s in self.seen.items() if n in COLUMNS and s.way not in STOPPED]
        move = max((s.move for s in ours), default=None)
        errors = [s.difference for s in ours if s.difference == s.difference]
        figures = ("" if move is None else f"{move:.7f}", f"{max(errors):.0e}" if errors else "—")
        return "| " + " | ".join((self.name, *self.ways, *(figures if ours else ("", "")))) + " |"

    def reasons(self) -> str:
        """Why cells refuse, each reason once."""
        by_reason: dict[str, list[str]] = {}
        for column, seen in self.seen.items():
            if seen.reason:
                by_reason.setdefault(seen.reason, []).append(column)
        parts = [f"{', '.join(columns)}: {reason}" for reason, columns in by_reason.items()]
        return "".join(f"- **{self.name}**, {part}\n" for part in parts)


def _cell(seen: Seen) -> str:
    if seen.way in STOPPED:
        return seen.way
    if not seen.move <= BOUND:
        return f"{seen.way}, but moves by {seen.move:.2f}"
    return "inexact" if seen.difference > ROUNDING else seen.way


def row(block: Block, columns: Sequence[str] = HEAD[1:-2]) -> Row:
    """Everything that is seen of one block, or some columns."""
    seen: dict[str, Seen] = {}
    if any(name in COLUMNS for name in columns):
        found = subject(block, Setting())
        for name, setting in COLUMNS.items():
            if name in columns:
                seen[name] = found if isinstance(found, Seen) else measured(found, setting)
    if "clients" in columns:
        found = subject(block, CLIENTS)
        seen["clients"] = found if isinstance(found, Seen) else trained_by_clients(found)
    if "PrivateOptimizer" in columns:
        seen["PrivateOptimizer"] = adapted(block, private_optimizer)
    if "Opacus, per layer" in columns:
        seen["Opacus, per layer"] = adapted(block, opacus_engine, "per_layer")
    if "Opacus, flat" in columns:
        seen["Opacus, flat"] = adapted(block, opacus_engine, "flat")
    return Row(block.name, seen)


def _kept(text: str, name: str) -> tuple[str, str]:
    """The line and the reasons of a row in the page as it stands."""
    lines = text.splitlines()
    line = next((row for row in lines if row.startswith(f"| {name} |")), "")
    reasons = [row + "\n" for row in lines if row.startswith(f"- **{name}**, ")]
    return line, "".join(reasons)


def page(old: str) -> str:
    """The whole page.

    Args:
        old: the page as it stands, for rows whose packages are missing.
    """
    lines, reasons = [], []
    for block in BLOCKS:
        if block.missing():
            line, why = _kept(old, block.name)
        else:
            made = row(block)
            line, why = made.line(), made.reasons()
        print(line, file=sys.stderr, flush=True)
        lines.append(line)
        reasons.append(why)
    table = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD), *filter(None, lines)]
    return _TEXT + "\n".join(table) + "\n\n## Reasons\n\n" + "".join(reasons)


def main(arguments: list[str]) -> None:
    """Command line; see the module."""
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    text = page(PAGE.read_text(encoding="utf-8") if PAGE.exists() else "")
    if "--write" in arguments:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
