"""A ledger that somebody edits and seals again: its chain is unbroken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fl_lightning.ledger import chain
from fl_lightning.ledger.client_reports import report_clients
from fl_lightning.ledger.statement import privacy_statement
from tests.fl_lightning.resuming import go

Entries = list[dict[str, Any]]

# Without sampling, so that calibration has a closed form.
RUNS = {
    "records": {
        "privacy": {"epsilon": [2.0, 4.0], "delta": 1e-3},
        "sampling_rate": 1.0,
        "local_steps": 2,
    },
    "sums": {
        "privacy": {
            "setting": "client+secure_sum",
            "epsilon": [3.0, 4.0],
            "delta": 0.05,
            "thresholds": "fixed",
            "min_survivors": 2,
        },
        "dropout": 0.3,
    },
    "given": {
        "privacy": {
            "setting": "client+aggregator",
            "epsilon": 30.0,
            "delta": 0.05,
            "noise_multiplier": 2.0,
            "cohort_sampling": "fixed",
        },
    },
    "coins": {
        "privacy": {
            "setting": "client+aggregator",
            "epsilon": None,
            "delta": 0.05,
            "noise_multiplier": 2.0,
        },
        "clients_per_round": 2,
    },
    "correlated": {
        "privacy": {
            "setting": "client+aggregator",
            "epsilon": [3.0, 4.0],
            "delta": 0.05,
            "cohort_sampling": "fixed",
            "correlation": "banded",
            "bands": 3,
        },
        "clients_per_round": 1,
    },
    "grid": {
        "privacy": {
            "setting": "client+local",
            "mechanism": "laplace",
            "epsilon": [30.0, 40.0],
            "delta": 0.0,
            "noise_form": "grid",
        },
    },
    "grid sums": {
        "privacy": {
            "setting": "client+aggregator",
            "epsilon": [30.0, 40.0],
            "delta": 0.05,
            "noise_form": "grid",
            "cohort_sampling": "fixed",
            "thresholds": "quantile",
        },
    },
}
ROUNDS = 5


class Runs(dict[str, Path]):
    """Folders of short runs with all that the command line writes; made when they are asked for."""

    def __init__(self, make_folder: Callable[[str], Path]) -> None:
        super().__init__()
        self.make_folder = make_folder

    def __missing__(self, name: str) -> Path:
        folder = self[name] = self.make_folder(name) / "run"
        module = go(folder, ROUNDS, **RUNS[name])
        assert module.ledger is not None
        reports = report_clients(module.ledger.header, module.ledger.releases)
        (folder / "privacy_statement.md").write_text(privacy_statement(module.ledger))
        summary = {
            "ledger_head": module.ledger.head_hash,
            "epsilon_max": max(r.epsilon for r in reports.values()),
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        return folder


def entries_of(folder: Path) -> Entries:
    lines = (folder / "ledger.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("prev", "hash")} for line in lines
    ]


def reseal(entries: Entries, folder: Path) -> Path:
    """Write a ledger of these entries; its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    digest, lines = None, []
    for entry in entries:
        line, digest = chain.seal(entry, digest)
        lines.append(line)
    (folder / "ledger.jsonl").write_bytes(b"".join(lines))
    assert digest is not None
    chain.write_head(folder / "ledger.jsonl", len(lines), digest)
    return folder


def edited(source: Path, folder: Path, change: Callable[[Entries], Any]) -> Path:
    """A ledger of its own after an edit: `change` works on the entries, or returns others."""
    entries = entries_of(source)
    return reseal(change(entries) or entries, folder)


def facts(**values: Any) -> Callable[[Entries], None]:
    """An edit of the header."""

    def change(entries: Entries) -> None:
        entries[0]["facts"].update(values)

    return change


def lines(where: slice | int = slice(1, None), **values: Any) -> Callable[[Entries], None]:
    """An edit of releases; a value may be a function of the old one."""

    def change(entries: Entries) -> None:
        chosen = entries[where] if isinstance(where, slice) else [entries[where]]
        for entry in chosen:
            for name, value in values.items():
                entry[name] = value(entry[name]) if callable(value) else value

    return change


def both(*changes: Callable[[Entries], Any]) -> Callable[[Entries], None]:
    """Several edits."""

    def change(entries: Entries) -> None:
        for one in changes:
            assert one(entries) is None

    return change


def without(*numbers: int) -> Callable[[Entries], Entries]:
    """Without some entries (0 is the header)."""
    return lambda entries: [e for i, e in enumerate(entries) if i not in numbers]


def tenfold(value: float) -> float:
    return 10 * value


def two_thirds(value: float) -> float:
    return 2 / 3 * value


def half(value: float) -> float:
    return value / 2
