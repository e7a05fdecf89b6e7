"""One row of docs/networks.md for each building block: making it, and the file that keeps rows.

    python -m tests.networks.rows             makes all rows again, about ten minutes
    python -m tests.networks.rows --new       rows that the file lacks
    python -m tests.networks.rows 0/2         every second row, from the first
    python -m tests.networks.rows MLP GRU     rows by name

Each row is written as soon as it is made. Rows whose packages are missing are left as they stand.
`python -m tests.networks.page` then writes the page.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.networks import hugging_face, plain, sequences, shared
from tests.networks.adapters import adapted, opacus_engine, private_optimizer
from tests.networks.blocks import Block
from tests.networks.measure import Seen, measured, subject, trained_by_clients
from tests.networks.product import Setting

BLOCKS = (*plain.BLOCKS, *sequences.BLOCKS, *shared.BLOCKS, *hugging_face.BLOCKS)
FILE = Path(__file__).with_name("rows.json")
RECORD = {
    "layer": Setting(),
    "Laplace": Setting(mechanism="laplace"),
    "flat": Setting("flat"),
    "joint": Setting("joint"),
    "grid": Setting(noise_form="grid"),
}
CLIENTS = Setting(setting="client+local")
COLUMNS = (*RECORD, "clients", "PrivateOptimizer", "Opacus, per layer", "Opacus, flat")
PACKAGES = ("torch", "opacus", "transformers", "peft")

Row = dict[str, Seen]


def made(block: Block, columns: Sequence[str] = COLUMNS) -> Row:
    """Everything that is seen of one block, or some columns."""
    row: Row = {}
    if any(name in RECORD for name in columns):
        found = subject(block, Setting())
        for name, setting in RECORD.items():
            if name in columns:
                row[name] = found if isinstance(found, Seen) else measured(found, setting)
    if "clients" in columns:
        found = subject(block, CLIENTS)
        row["clients"] = found if isinstance(found, Seen) else trained_by_clients(found)
    if "PrivateOptimizer" in columns:
        row["PrivateOptimizer"] = adapted(block, private_optimizer)
    if "Opacus, per layer" in columns:
        row["Opacus, per layer"] = adapted(block, opacus_engine, "per_layer")
    if "Opacus, flat" in columns:
        row["Opacus, flat"] = adapted(block, opacus_engine, "flat")
    return row


def kept() -> tuple[dict[str, str], dict[str, Row]]:
    """Versions of packages, and the rows by name, as they were made last."""
    if not FILE.exists():
        return {}, {}
    given = json.loads(FILE.read_text(encoding="utf-8"))
    return given["packages"], {name: _read(row) for name, row in given["rows"].items()}


def keep(name: str, row: Row) -> None:
    """Write a row into the file, in the order of BLOCKS; safe among several processes."""
    with _alone():
        versions, rows = kept()
        versions |= {n: v for n in PACKAGES if (v := _version(n))}
        rows[name] = row
        lines = ",\n".join(
            f"{json.dumps(block.name)}: {json.dumps(_written(rows[block.name]))}"
            for block in BLOCKS
            if block.name in rows
        )
        text = f'{{"packages": {json.dumps(versions)},\n"rows": {{\n{lines}\n}}}}\n'
        FILE.write_text(text, encoding="utf-8")


@contextmanager
def _alone() -> Iterator[None]:
    """While no other process is in here."""
    folder = os.open(FILE.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _written(row: Row) -> dict[str, list[Any]]:
    """As JSON: (way, move to 1e-7, difference to two digits or null, reason) by column."""
    return {
        column: [
            seen.way,
            round(seen.move, 7),
            None if math.isnan(seen.difference) else float(f"{seen.difference:.1e}"),
            seen.reason,
        ]
        for column, seen in row.items()
    }


def _read(row: dict[str, list[Any]]) -> Row:
    return {
        column: Seen(way, move, math.nan if difference is None else difference, reason)
        for column, (way, move, difference, reason) in row.items()
    }


def _chosen(arguments: Sequence[str]) -> list[Block]:
    """The blocks that the command line names, of those whose packages are there."""
    blocks = [block for block in BLOCKS if not block.missing()]
    if not arguments:
        return blocks
    if list(arguments) == ["--new"]:
        rows = kept()[1]
        return [block for block in blocks if block.name not in rows]
    first, slash, step = arguments[0].partition("/")
    if slash and first.isdigit() and step.isdigit():
        return blocks[int(first) :: int(step)]
    unknown = set(arguments) - {block.name for block in blocks}
    if unknown:
        raise SystemExit(f"no such network: {', '.join(sorted(unknown))}")
    return [block for block in blocks if block.name in arguments]


def main(arguments: list[str]) -> None:
    """Command line; see the module."""
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for block in _chosen(arguments):
        row = made(block)
        keep(block.name, row)
        print(block.name, *(seen.way for seen in row.values()), sep=" | ", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
