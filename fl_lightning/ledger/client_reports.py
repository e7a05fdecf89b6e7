"""What a ledger says: epsilon per client from the file alone, tables, and the command."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fl_lightning.accounting.correlated import CorrelatedPlan
from fl_lightning.accounting.evaluation import evaluation_cost
from fl_lightning.accounting.exactness import SamplerCost
from fl_lightning.accounting.sum_costs import (
    client_multipliers,
    extra_of,
    largest_extra,
    num_clients,
    of_client,
    of_clients,
)
from fl_lightning.ledger.accounts import Account, accounts
from fl_lightning.ledger.correlated_checks import plan_of
from fl_lightning.values.event import NoiseEvent
from fl_lightning.values.release import ALL_CLIENTS, Release
from fl_lightning.values.rounding import round_up


@dataclass(frozen=True)
class ClientReport:
    """One client's account. Public.

    Args:
        client: its number.
        releases, steps: how many releases, with how many noised steps together.
        mechanisms, noise_multipliers, sampling_rates: those that occur, in order; where rounds
            share noise, those of the whole run as one step.
        epsilon: by PLD at `delta`, inflation included; inf without noise; 0 without releases.
        delta: the client's delta (NaN where the header has none); cut tails are paid from it.
        target_epsilon: planned, None where not stated.
        guarantee: False where epsilon is nominal.
        evaluations: how many of the releases are private evaluations.
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
    evaluations: int = 0


def report_clients(
    header: Mapping[str, Any], releases: Sequence[Release]
) -> dict[int, ClientReport]:
    """Every client's account; clients that the header lists and that released nothing included."""
    found = accounts(header, releases)
    evaluations = _evaluations(header, releases)
    return {
        client: _report_one(header, client, found[client], evaluations) for client in sorted(found)
    }


def _evaluations(header: Mapping[str, Any], releases: Sequence[Release]) -> np.ndarray | None:
    """How many evaluations each client was in [K]; None of a run that plans none."""
    if header.get("evaluation") is None:
        return None
    times = np.zeros(num_clients(header), dtype=np.int64)
    for release in releases:
        if release.evaluation:
            times[release.members(len(times))] += 1
    return times


def _report_one(
    header: Mapping[str, Any], client: int, account: Account, evaluations: np.ndarray | None
) -> ClientReport:
    counts = account.counts()
    return ClientReport(
        client=client,
        releases=account.releases,
        steps=account.steps,
        mechanisms=tuple(dict.fromkeys(e.mechanism for e in counts)),
        noise_multipliers=tuple(dict.fromkeys(e.noise_multiplier for e in counts)),
        sampling_rates=tuple(dict.fromkeys(e.sampling_rate for e in counts)),
        epsilon=account.epsilon(),
        delta=account.delta,
        target_epsilon=of_client(header["epsilon"], client),
        guarantee=header["setting"] != "abstract" and all(c.guarantee for c in account.charges),
        evaluations=0 if evaluations is None else int(evaluations[client]),
    )


def undercharged(header: Mapping[str, Any], releases: Iterable[Release]) -> list[str]:
    """Releases that charge less for inexact noise than their form, recomputed, costs."""
    check = undercharged_lines(header)
    return [problem for line, one in enumerate(releases, 2) for problem in check(line, one)]


def undercharged_lines(header: Mapping[str, Any]) -> Callable[[int, Release], list[str]]:
    """A check for releases that charge less for inexact noise than their form, recomputed, costs.

    A ledger whose header states no noise form or layer sizes cannot be checked.

    Returns:
        A function (number of the line, release) → problems.
    """
    if "noise_form" not in header or "dims" not in header:
        return lambda line, release: []
    plan = plan_of(header) if header.get("coefficients") is not None else None
    extra = {votes: extra_of(header, votes=votes) for votes in (False, True)}
    known: dict[tuple[Any, ...], SamplerCost] = {}

    def check(line: int, release: Release) -> list[str]:
        problems = []
        votes = release.vote_noise_scale is not None
        whose = release.clients if release.is_sum else of_client(header["delta"], release.client)
        kind = release.event, votes, release.largest_weight, whose, release.evaluation
        cost = known.get(kind)
        if cost is None:
            cost = known[kind] = _extra_of_line(header, release, extra[votes], plan)
        for name, least in (("epsilon_inflation", cost.epsilon), ("tail_delta", cost.delta)):
            charged = getattr(release, name)
            if charged < release.steps * least * (1 - 1e-9):
                problems.append(
                    f"line {line} charges {name} {charged:.3g} for {release.steps} steps of form "
                    f"{header['noise_form']}, which cost {release.steps * least:.3g}"
                )
        return problems

    return check


def _extra_of_line(
    header: Mapping[str, Any],
    release: Release,
    extra: Callable[[NoiseEvent, float], SamplerCost],
    plan: CorrelatedPlan | None,
) -> SamplerCost:
    """What a step of a line costs beyond its event; of a sum, the largest over its clients."""
    if release.evaluation:
        everyone = np.unique(of_clients(header, "delta")).tolist()
        whose = of_client(header["delta"], max(release.client, 0)) or 0.0
        deltas = everyone if release.client == ALL_CLIENTS else [whose]
        costs = [evaluation_cost(release.event, header["noise_form"], d) for d in deltas]
        return SamplerCost(max(c.epsilon for c in costs), max(c.delta for c in costs))
    if not release.is_sum:
        return extra(release.event, of_client(header["delta"], release.client) or 0.0)
    ids = release.members(num_clients(header))
    deltas = of_clients(header, "delta")[ids]
    multipliers = client_multipliers(header, release)
    if plan is not None:
        multipliers = multipliers / plan.sizes_of_one.largest[ids]
    return largest_extra(release.event, multipliers, deltas, extra)


def shared_noise(header: Mapping[str, Any]) -> str | None:
    """In a few words, the noise that rounds share; None where each has its own."""
    if header.get("coefficients") is None:
        return None
    bands, rounds = len(header["coefficients"]), header["horizon"]
    return f"shared by {bands} rounds; charged at once for all {rounds} planned rounds"


def show_number(value: float) -> str:
    """A number for a table: four significant digits; infinity as a word."""
    if math.isnan(value):
        return "-"
    return "infinite" if math.isinf(value) else f"{value:.4g}"


def show_bound(value: float) -> str:
    """`show_number` of an upper bound: digits are dropped upwards."""
    return round_up(value) if math.isfinite(value) else show_number(value)


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
        f"epsilon {show_bound(max(epsilons))} at delta {show_number(delta)} "
        f"(largest over {len(reports)} clients; smallest {show_bound(min(epsilons))}, "
        f"median {show_bound(statistics.median(epsilons))})"
    )
    if any_nominal(reports):
        text += ", nominal, no guarantee"
    return text
