"""The command: `python -m fl_lightning.audit RUN`, or `aadp audit RUN`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fl_lightning.output.console import say, speak_any_encoding, without_advertisements


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status (1: more is shown than is proven, 2: no audit)."""
    from fl_lightning.audit.audit import CANARIES, CONFIDENCE, MINUTES, audit
    from fl_lightning.audit.report import COLUMNS, lines_of, rows_of, write
    from fl_lightning.ledger import LedgerError

    parser = argparse.ArgumentParser(
        prog="aadp audit",
        description="Attack copies of a finished run, and compare what that shows with its proof.",
    )
    parser.add_argument("run", type=Path, help="folder of a finished run; its ledger is only read")
    parser.add_argument("--canaries", type=int, default=CANARIES, help=f"trials ({CANARIES})")
    parser.add_argument(
        "--confidence", type=float, default=CONFIDENCE, help=f"of what is shown ({CONFIDENCE})"
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"for the trials of sums ({MINUTES:g})"
    )
    parser.add_argument("--seed", type=int, help="repeatable coins and noise (default: secret)")
    parser.add_argument("--out", type=Path, help="where to write (default: the run's folder)")
    options = parser.parse_args(arguments)
    speak_any_encoding()
    without_advertisements()
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        found = audit(
            options.run,
            canaries=options.canaries,
            confidence=options.confidence,
            minutes=options.minutes,
            seed=options.seed,
        )
        written = write(found, options.out or options.run)
    except (OSError, ValueError, LedgerError) as error:
        say(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    _show(COLUMNS, rows_of(found.bounds))
    for line in lines_of(found):
        say(line)
    say(", ".join(map(str, written)))
    return 0 if found.passed else 1


def _show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    from fl_lightning.output.console import show

    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    show(table)


if __name__ == "__main__":
    sys.exit(main())
