"""The command that shows and checks a run's ledger."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fl_lightning.ledger.chain import LedgerError
from fl_lightning.ledger.file import stored
from fl_lightning.privacy.simulated import simulated_reason

if TYPE_CHECKING:
    from fl_lightning.ledger.client_reports import ClientReport


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status (1: the ledger cannot be trusted)."""
    parser = argparse.ArgumentParser(
        prog="python -m fl_lightning.ledger", description="Check and read a run's privacy ledger."
    )
    parser.add_argument("action", choices=("show", "verify"))
    parser.add_argument("path", help="ledger.jsonl, or the run's directory")
    parser.add_argument("--all", action="store_true", help="show all clients, not the first 50")
    parser.add_argument(
        "--head", metavar="HASH", help="a line of this hash (or its first 16 digits) must be there"
    )
    options = parser.parse_args(arguments)
    from fl_lightning.ledger.client_reports import report_clients
    from fl_lightning.ledger.verdict import examine

    try:
        verdict = examine(options.path, options.head)
        for problem in verdict.problems:
            print(problem, file=sys.stderr)
        if verdict.problems:
            return 1
        header, releases = stored(options.path)
    except (OSError, LedgerError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.action == "verify":
        print(f"{len(releases)} releases, chain unbroken")
        if verdict.schema:
            print(f"schema {verdict.schema}, head {verdict.head}")
        for note in verdict.notes:
            print(note)
    else:
        _print_tables(header, report_clients(header, releases), None if options.all else 50)
    return 0


def _print_tables(
    header: Mapping[str, Any], reports: Mapping[int, ClientReport], limit: int | None
) -> None:
    from rich.console import Console
    from rich.table import Table

    from fl_lightning.ledger.client_reports import any_nominal, headline, show_bound, show_number
    from fl_lightning.ledger.statement_search import search_sentence

    console = Console(width=None if sys.stdout.isatty() else 120)
    facts = Table("fact", "value", title="run")
    for name, value in header.items():
        facts.add_row(name, _show_fact(value))
    console.print(facts)
    nominal = any_nominal(reports)
    columns = ("client", "releases", "steps", "mechanism", "noise_multiplier", "q")
    table = Table(
        *columns, "epsilon (nominal)" if nominal else "epsilon", "delta", "target", title="clients"
    )
    for report in list(reports.values())[:limit]:
        target = report.target_epsilon
        table.add_row(
            str(report.client),
            str(report.releases),
            str(report.steps),
            ", ".join(report.mechanisms),
            ", ".join(show_number(z) for z in report.noise_multipliers),
            ", ".join(show_number(q) for q in report.sampling_rates),
            show_bound(report.epsilon),
            show_number(report.delta),
            "-" if target is None else show_number(target),
        )
    console.print(table)
    if limit is not None and len(reports) > limit:
        console.print(f"... and {len(reports) - limit} more clients (--all)")
    console.print(headline(reports))
    if header.get("search"):
        console.print(search_sentence(header).replace("**", ""))
    reason = simulated_reason(header)
    if reason:
        console.print(f"SIMULATED ({reason}): the noise protects nobody")


def _show_fact(value: Any) -> str:
    if isinstance(value, list) and len(value) > 8:
        same = all(v == value[0] for v in value)
        return f"{value[0]} ({len(value)} times)" if same else f"{len(value)} values"
    if isinstance(value, list):
        return ", ".join(str(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
