"""The ledger: what was released, written down before it leaves, and what it cost.

Command: `python -m fl_lightning.ledger show PATH` and `... verify PATH [--head HASH]`; PATH is the
file or the run's directory.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fl_lightning.ledger.chain import LedgerError
from fl_lightning.ledger.file import Ledger, LedgerWarning, read, stored
from fl_lightning.ledger.header import SCHEMA
from fl_lightning.ledger.stored import FILE_NAME
from fl_lightning.values.release import Release

if TYPE_CHECKING:
    from fl_lightning.ledger.client_reports import ClientReport

__all__ = [
    "FILE_NAME",
    "SCHEMA",
    "Ledger",
    "LedgerError",
    "LedgerWarning",
    "Release",
    "read",
    "report",
    "stored",
    "verify",
]


def verify(path: str | os.PathLike[str], head: str | None = None) -> list[str]:
    """Problems of a ledger, each with its line number; [] if there are none.

    Checked are the chain, that every release charges what the form of its noise costs, that header
    and lines do not contradict each other, and that what the run's folder says of the ledger is
    true; see docs/ledger.md. A torn last line that never counted is no problem (a crash leaves it,
    `Ledger.open` removes it).

    Args:
        path: the file or the run's directory.
        head: hash of a line that must be there, or its first 16 or more hex digits.

    Raises:
        FileNotFoundError: no ledger there.
        ValueError: `head` is no hash.
    """
    from fl_lightning.ledger.verdict import examine

    return examine(path, head).problems


def report(path: str | os.PathLike[str]) -> dict[int, ClientReport]:
    """Every client's epsilon by PLD, from the file alone.

    Raises:
        FileNotFoundError: no ledger there.
        LedgerError: the chain is broken or lines are missing.
    """
    from fl_lightning.ledger.client_reports import report_clients

    return report_clients(*stored(path))
