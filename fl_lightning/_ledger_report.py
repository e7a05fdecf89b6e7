"""What a ledger says: epsilon per client from the file alone, tables, and the command."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fl_lightning._ledger_accounts import Account, accounts
from fl_lightning.ledger import LedgerError, Release, read
from fl_lightning.privacy.accounting import NoiseEvent
from fl_lightning.privacy.exactness import Extra
from fl_lightning.privacy.simulated import simulated_reason
from fl_lightning.sums import (
    client_multipliers,
    extra_of,
    largest_extra,
    num_clients,
    of_client,
    of_clients,
)


@dataclass(frozen=True)
class ClientReport:
    """One client's account. Public.

    Args:
        client: its number.
        releases, steps: how many releases, with how many noised steps together.
        mechanisms, noise_multipliers, sampling_rates: those that occur, in order.
        epsilon: by PLD at `delta`, inflation included; inf without noise; 0 without releases.
        delta: the client's delta (NaN where the header has none); cut tails are paid from it.
        target_epsilon: planned, None where not stated.
        guarantee: False where epsilon is nominal.
    """

    client: int
    releases: int
    steps: int
    mechanisms: tuple[str, ...]
    noise_multipliers: tuple[float, ...]
    sampling_rates: tuple[float, ...]
    epsilon: float
    delta: float
    target_epsilon: float | None
    guarantee: bool


def report_clients(
    header: Mapping[str, Any], releases: Sequence[Release]
) -> dict[int, ClientReport]:
    """Every client's account; clients that the header lists and that released nothing included."""
    found = accounts(header, releases)
    return {client: _report_one(header, client, found[client]) for client in sorted(found)}


def _report_one(header: Mapping[str, Any], client: int, account: Account) -> ClientReport:
    counts = account.counts()
    return ClientReport(
        client=client,
        releases=account.releases,
        steps=sum(counts.values()),
        mechanisms=tuple(dict.fromkeys(e.mechanism for e in counts)),
        noise_multipliers=tuple(dict.fromkeys(e.noise_multiplier for e in counts)),
        sampling_rates=tuple(dict.fromkeys(e.sampling_rate for e in counts)),
        epsilon=account.epsilon(),
        delta=account.delta,
        target_epsilon=of_client(header["epsilon"], client),
        guarantee=header["setting"] != "abstract" and all(c.guarantee for c in account.charges),
    )


def undercharged(header: Mapping[str, Any], releases: Sequence[Release]) -> list[str]:
    """Releases that charge less for inexact noise than their form, recomputed, costs.

    A ledger whose header states no noise form or layer sizes cannot be checked: [].
    """
    if "noise_form" not in header or "dims" not in header:
        return []
    extra = {votes: extra_of(header, votes=votes) for votes in (False, True)}
    known: dict[tuple[Any, ...], Extra] = {}
    problems = []
    for line, release in enumerate(releases, 2):
        votes = release.vote_noise_scale is not None
        whose = release.clients if release.is_sum else of_client(header["delta"], release.client)
        kind = release.event, votes, release.largest_weight, whose
        cost = known.get(kind)
        if cost is None:
            cost = known[kind] = _extra_of_line(header, release, extra[votes])
        for name, least in (("epsilon_inflation", cost.epsilon), ("tail_delta", cost.delta)):
            charged = getattr(release, name)
            if charged < release.steps * least * (1 - 1e-9):
                problems.append(
                    f"line {line} charges {name} {charged:.3g} for {release.steps} steps of form "
                    f"{header['noise_form']}, which cost {release.steps * least:.3g}"
                )
    return problems


def _extra_of_line(
    header: Mapping[str, Any], release: Release, extra: Callable[[NoiseEvent, float], Extra]
) -> Extra:
    """What a step of a line costs beyond its event; of a sum, the largest over its clients."""
    if not release.is_sum:
        return extra(release.event, of_client(header["delta"], release.client) or 0.0)
    ids = release.members(num_clients(header))
    deltas = of_clients(header, "delta")[ids]
    return largest_extra(release.event, client_multipliers(header, release), deltas, extra)


def show_number(value: float) -> str:
    """A number for a table: four significant digits; infinity as a word."""
    if math.isnan(value):
        return "-"
    return "infinite" if math.isinf(value) else f"{value:.4g}"


def any_nominal(reports: Mapping[int, ClientReport]) -> bool:
    """Whether some finite epsilon carries no guarantee."""
    return any(not r.guarantee and math.isfinite(r.epsilon) for r in reports.values())


def headline(reports: Mapping[int, ClientReport]) -> str:
    """One sentence: the largest epsilon and delta over the clients, and the spread."""
    if not reports:
        return "nothing was released: epsilon 0"
    epsilons = [r.epsilon for r in reports.values()]
    delta = max(r.delta for r in reports.values())
    text = (
        f"epsilon {show_number(max(epsilons))} at delta {show_number(delta)} "
        f"(largest over {len(reports)} clients; smallest {show_number(min(epsilons))}, "
        f"median {show_number(statistics.median(epsilons))})"
    )
    if any_nominal(reports):
        text += ", nominal, no guarantee"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status (1: the ledger cannot be trusted)."""
    from fl_lightning._ledger_verdict import examine

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
    try:
        verdict = examine(options.path, options.head)
        for problem in verdict.problems:
            print(problem, file=sys.stderr)
        if verdict.problems:
            return 1
        header, releases = read(options.path)
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
            show_number(report.epsilon),
            show_number(report.delta),
            "-" if target is None else show_number(target),
        )
    console.print(table)
    if limit is not None and len(reports) > limit:
        console.print(f"... and {len(reports) - limit} more clients (--all)")
    console.print(headline(reports))
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
