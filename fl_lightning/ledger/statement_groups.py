"""The part of the statement on several records, several clients, and persons at several clients."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fl_lightning.accounting.group_privacy import (
    ClientSteps,
    GroupFigure,
    GroupSteps,
    apart,
    group_figure,
    in_correlated_sums,
    in_one_sum,
    records_of_one_client,
)
from fl_lightning.accounting.group_tails import sampler_of
from fl_lightning.ledger.client_reports import ClientReport, show_bound, show_number
from fl_lightning.privacy.config import SUMMED
from fl_lightning.values.release import Release

GROUPS = (2, 5, 10)
_SELECT = Callable[[Sequence[ClientSteps], int], GroupSteps]


def group_section(
    header: Mapping[str, Any],
    reports: Mapping[int, ClientReport],
    releases: Sequence[Release],
) -> str:
    """A table of what groups are guaranteed; "" where epsilon is 0 or infinite.

    Args:
        header, releases: of the ledger.
        reports: accounts of the clients.
    """
    active = [r for r in reports.values() if r.releases]
    if not active or not all(0 < r.epsilon < math.inf and r.delta >= 0 for r in active):
        return ""
    clients = list(client_steps(header, releases).values())
    one = max(r.epsilon for r in active)
    sampler = sampler_of(header, votes=any(r.vote_noise_scale is not None for r in releases))
    delta = min(r.delta for r in active)

    def figures(select: _SELECT, most: float) -> list[GroupFigure]:
        sizes = [g for g in GROUPS if g <= most and clients]
        return [
            group_figure(select(clients, g), sampler, size=g, delta=delta, at=g * one)
            for g in sizes
        ]

    lines = ["## Groups", "", *_explanation(header["setting"], delta)]
    if header["setting"] == "record+local" and header.get("evaluation"):
        lines += ["", "Groups with both training and held-out records are not in the table."]
    if header["setting"] == "record+local":
        sizes = header.get("client_sizes")
        most = max(sizes) if sizes else math.inf
        rows = _rows("{} records of one client", figures(records_of_one_client, most))
        rows += _rows("one record at each of {} clients", figures(apart, len(clients)))
        held = [c for c in _held_out(header, releases) if c.counts]
        for g in (g for g in GROUPS if held and g <= max(header["evaluation"]["records"])):
            steps = records_of_one_client(held, g)
            figure = group_figure(steps, sampler, size=g, delta=delta, at=g * one)
            rows += _rows("{} held-out records of one client", [figure])
    else:
        select = in_one_sum if header["setting"] in SUMMED else apart
        if header.get("coefficients") is not None:
            select = functools.partial(in_correlated_sums, horizon=header["horizon"])
        rows = _rows("{} clients", figures(select, len(clients)))
    if not rows:
        return ""
    return "\n".join([*lines, "", *_head(delta), *rows])


def client_steps(header: Mapping[str, Any], releases: Sequence[Release]) -> dict[int, ClientSteps]:
    """What the units of every client that released went through, by client."""
    from fl_lightning.ledger.accounts import accounts

    found = accounts(header, releases)
    rounds: dict[int, Counter[int]] = {k: Counter() for k in found}
    for release in releases if header["setting"] in SUMMED else ():
        for client in release.members(len(found)).tolist():
            rounds[client][release.round] += release.steps
    return {
        k: ClientSteps(
            Counter(found[k].counts()),
            found[k].delta,
            frozenset((r, i) for r, n in rounds[k].items() for i in range(n)),
            found[k].largest or 0.0,
        )
        for k in sorted(found)
        if found[k].charges
    }


def _held_out(header: Mapping[str, Any], releases: Sequence[Release]) -> list[ClientSteps]:
    """What records that were held out for private evaluations went through."""
    from fl_lightning.ledger.accounts import accounts

    units = [a.units()[-1] for a in accounts(header, releases).values() if a.held_out]
    return [ClientSteps(Counter(unit.counts()), unit.delta) for unit in units]


def _explanation(setting: str, delta: float) -> list[str]:
    lines = [
        "Several units together are protected less. The table takes the clients with the least "
        "noise. *Exact* is composed from the noised steps of this ledger for units whose data is "
        "there or replaced by zero (`zero_out`) or by any other (`replace_one`), as tight as the "
        "result above; *upper bound* may be too large. For comparison it shows the delta that "
        "belongs to the sum of as many epsilons. Noise that is not the ideal one adds the last "
        "column to both deltas; what it adds to epsilon is included."
    ]
    if setting == "record+local":
        return [
            *lines,
            "",
            "A person with one record at each of m clients has m independent noises. Any other "
            "group of training records is protected at least as well as one of the same size at "
            "one client.",
        ]
    if setting in SUMMED:
        return [
            *lines,
            "",
            "The clients' parts stand in one sum with one noise, so their sensitivities add up. A "
            "person with data at m clients is protected like m clients together.",
        ]
    return [
        *lines,
        "",
        "Every client adds noise of its own. A person with data at m clients is protected like m "
        "clients together.",
    ]


def _head(delta: float) -> list[str]:
    return [
        f"| group | epsilon at delta {show_number(delta)} | delta at epsilon | figures | inexact "
        "noise adds to delta |",
        "|---|---|---|---|---|",
    ]


def _rows(words: str, figures: Sequence[GroupFigure]) -> list[str]:
    return [
        f"| {words.format(f.size)} | {show_bound(f.epsilon)} | {_show_delta(f.delta_at)} at "
        f"{show_bound(f.at)} | {'exact' if f.exact else 'upper bound'} | "
        f"{'not stated' if math.isnan(f.extra_delta) else show_bound(f.extra_delta)} |"
        for f in figures
    ]


def _show_delta(delta: float) -> str:
    return "> 0.999" if delta > 0.999 else "< 1e-10" if delta < 1e-10 else show_bound(delta)
