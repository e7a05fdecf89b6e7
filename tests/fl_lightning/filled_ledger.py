"""A ledger with a few releases."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fl_lightning.ledger import Ledger, Release

HEADER = {
    "setting": "record+local",
    "privacy_unit": "one record of one client",
    "trust": "client",
    "adjacency": "zero_out",
    "mechanism": "gaussian",
    "delta": [1e-5, 1e-5],
    "epsilon": [1.0, math.inf],
    "simulated": True,
}


def release(client: int = 0, round: int = 0, **changes: Any) -> Release:
    values = {
        "client": client,
        "round": round,
        "steps": 5,
        "mechanism": "gaussian",
        "noise_multiplier": 3.0,
        "sampling_rate": 0.1,
        "adjacency": "zero_out",
        "num_layers": 2,
        "clip_norm": (1.0, math.inf),
        "shares": (0.25, 0.75),
        "binding": "ab",
        "digest": f"{client}-{round}",
    }
    return Release(**{**values, **changes})


def filled(path: Path, rounds: int = 3, **facts: Any) -> Path:
    """A closed ledger of two clients; its file."""
    with Ledger.create(path, {**HEADER, **facts}) as ledger:
        for round in range(rounds):
            ledger.append([release(0, round), release(1, round)])
    return path / "ledger.jsonl"


def reopen(path: Path) -> list[Release]:
    with Ledger.open(path) as ledger:
        return list(ledger)
