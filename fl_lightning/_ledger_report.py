"""What a ledger says: epsilon per client from the file alone, tables, and the command."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fl_lightning.ledger import LedgerError, Release, read, verify
from fl_lightning.privacy.accounting import NoiseEvent, compose_epsilon
from fl_lightning.privacy.simulated import simulated_reason
from fl_lightning.release import ALL_CLIENTS


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
    grouped: dict[int, list[Release]] = {client: [] for client in range(_num_clients(header))}
    for release in releases:
        if release.client == ALL_CLIENTS:
            for own in grouped.values():
                own.append(release)
        else:
            grouped.setdefault(release.client, []).append(release)
    return {client: _report_one(header, client, grouped[client]) for client in sorted(grouped)}


def _report_one(header: Mapping[str, Any], client: int, releases: list[Release]) -> ClientReport:
    delta = _of_client(header["delta"], client)
    delta = math.nan if delta is None else delta
    counts: Counter[NoiseEvent] = Counter()
    for release in releases:
        counts[release.event] += release.steps
    target = _of_client(header["epsilon"], client)
    return ClientReport(
        client=client,
        releases=len(releases),
        steps=sum(counts.values()),
        mechanisms=tuple(dict.fromkeys(e.mechanism for e in counts)),
        noise_multipliers=tuple(dict.fromkeys(e.noise_multiplier for e in counts)),
        sampling_rates=tuple(dict.fromkeys(e.sampling_rate for e in counts)),
        epsilon=_epsilon(counts, releases, delta),
        delta=delta,
        target_epsilon=target,
        guarantee=header["setting"] != "abstract" and all(r.guarantee for r in releases),
    )


def _epsilon(counts: Mapping[NoiseEvent, int], releases: list[Release], delta: float) -> float:
    if not releases:
        return 0.0
    left = delta - math.fsum(r.tail_delta for r in releases)
    if not left >= 0:
        return math.inf
    return compose_epsilon(counts, left) + math.fsum(r.epsilon_inflation for r in releases)


def undercharged(header: Mapping[str, Any], releases: Sequence[Release]) -> list[str]:
    """Releases that charge less for inexact noise than their form, recomputed, costs.

    A ledger whose header states no noise form or layer sizes cannot be checked: [].
    """
    if "noise_form" not in header or "dims" not in header:
        return []
    from fl_lightning.privacy.exactness import inexact_noise, noise_streams

    problems, in_shares = [], header["setting"] == "client+secure_sum"
    for line, release in enumerate(releases, 2):
        extra = inexact_noise(
            release.event,
            header["noise_form"],
            streams=noise_streams(header["dims"], votes=release.vote_noise_scale is not None),
            delta=_of_client(header["delta"], release.client) or 0.0,
            shares=header["min_survivors"] if in_shares else None,
        )
        for name, cost in (("epsilon_inflation", extra.epsilon), ("tail_delta", extra.delta)):
            charged = getattr(release, name)
            if charged < release.steps * cost * (1 - 1e-9):
                problems.append(
                    f"line {line} charges {name} {charged:.3g} for {release.steps} steps of form "
                    f"{header['noise_form']}, which cost {release.steps * cost:.3g}"
                )
    return problems


def _of_client(value: Any, client: int) -> float | None:
    """A header's per-client number: one for all, or a list."""
    if isinstance(value, list):
        value = value[client] if client < len(value) else None
    return None if value is None else float(value)


def _num_clients(header: Mapping[str, Any]) -> int:
    lists = (header.get(name) for name in ("client_sizes", "delta", "epsilon"))
    return max((len(value) for value in lists if isinstance(value, list)), default=0)


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
    parser = argparse.ArgumentParser(
        prog="python -m fl_lightning.ledger", description="Check and read a run's privacy ledger."
    )
    parser.add_argument("action", choices=("show", "verify"))
    parser.add_argument("path", help="ledger.jsonl, or the run's directory")
    parser.add_argument("--all", action="store_true", help="show all clients, not the first 50")
    options = parser.parse_args(arguments)
    try:
        problems = verify(options.path)
        for problem in problems:
            print(problem, file=sys.stderr)
        if problems:
            return 1
        header, releases = read(options.path)
    except (OSError, LedgerError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.action == "verify":
        print(f"{len(releases)} releases, chain unbroken")
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
