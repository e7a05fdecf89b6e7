"""What a candidate of a charged search may spend, from the facts in its ledger's header."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fl_lightning.accounting.evaluation import evaluation_cost
from fl_lightning.accounting.repeat_and_select import TrialNumber, selection_cost
from fl_lightning.accounting.sum_costs import (
    evaluation_multipliers,
    extra_of,
    num_clients,
    of_clients,
)
from fl_lightning.values.event import NoiseEvent

FACTS = ("law", "mean", "shape", "epsilon", "delta", "loss")
_ROUNDING = 1 + 1e-9
Unit = tuple[dict[NoiseEvent, int], float, float]


class SearchLossError(ValueError):
    """A candidate whose choice would cost more than the search planned for it."""


def number_of(header: Mapping[str, Any]) -> TrialNumber:
    """The law of the number of candidates."""
    facts = header["search"]
    return TrialNumber(facts["law"], facts["mean"], facts["shape"])


def search_problems(header: Mapping[str, Any]) -> Iterator[str]:
    """Why a header's search does not keep what it promises; nothing of a header without a search.

    What a candidate spends at its own ε and δ is the header's calibration, which is checked with
    the rest of it; here, whether that and the choice stay within what the search promises.
    """
    facts = header.get("search")
    if facts is None:
        return
    missing = [name for name in FACTS if name not in facts]
    if missing or header.get("evaluation") is None:
        yield f"search has no {', '.join(missing) or 'private evaluation'}"
        return
    everyone, number = num_clients(header), number_of(header)
    for name in ("epsilon", "delta", "loss"):
        if not isinstance(facts[name], list) or len(facts[name]) != everyone:
            yield f"search.{name} is not a list of {everyone} numbers"
            return
    names = ("epsilon", "delta")
    own_epsilon, own_delta = (of_clients(header, name) for name in names)
    total, delta, loss = (np.array(facts[name]) for name in (*names, "loss"))
    if (own_delta > delta / max(1.0, number.mean) * _ROUNDING).any():
        yield "search: delta of a candidate is more than the search's over the expected number"
    if (own_epsilon + loss > total * _ROUNDING).any():
        yield "search: epsilon of a candidate and of the choice are more than the search's"
    if header.get("affordable_steps") is None:
        yield "search: its candidates have no target"
        return
    for client, most in choice_losses(header).items():
        if most > loss[client] * _ROUNDING:
            yield f"search.loss of client {client} is {loss[client]}, by its noise it is {most}"
            return


def choice_losses(header: Mapping[str, Any]) -> dict[int, float]:
    """By how much the choice raises each client's ε, by its planned noise."""
    number, facts, known = number_of(header), header["search"], {}
    found = {}
    for client, delta in enumerate(facts["delta"]):
        units = _units(header, client)
        key = (delta, *((*counts.items(), *rest) for counts, *rest in units))
        if key not in known:
            costs = [selection_cost(number, counts, delta, *rest) for counts, *rest in units]
            known[key] = max(loss for loss, _ in costs)
        found[client] = known[key]
    return found


def _units(header: Mapping[str, Any], client: int) -> list[Unit]:
    """Planned events of a client's units, and what comes on top of their ε and δ."""
    delta = float(of_clients(header, "delta")[client])
    steps = int(of_clients(header, "affordable_steps")[client])
    event = NoiseEvent(
        header["mechanism"],
        float(of_clients(header, "noise_multiplier")[client]),
        header["sampling_rate"],
        header["adjacency"],
    )
    extra = extra_of(header, votes=header["thresholds"] == "quantile")(event, delta)
    updates = {event: steps}, steps * extra.epsilon, steps * extra.delta
    plan = header["evaluation"]
    if not plan["records"][client]:
        return [updates]
    z, times = float(evaluation_multipliers(header)[client]), int(plan["planned"])
    held = NoiseEvent(header["mechanism"], z, 1.0, header["adjacency"])
    cost = evaluation_cost(held, header["noise_form"], delta)
    own = {held: times}, times * cost.epsilon, times * cost.delta
    if plan["apart"]:
        return [updates, own]
    both = dict(updates[0])
    both[held] = both.get(held, 0) + times
    return [(both, updates[1] + own[1], updates[2] + own[2])]


def check_search(header: Mapping[str, Any]) -> None:
    """Refuse a candidate before its first release, where its choice would cost too much.

    Raises:
        SearchLossError: with less ε the candidate would keep to its search.
        ValueError: it would not.
    """
    problem = next(search_problems(header), None)
    if problem is not None:
        raise (SearchLossError if problem.startswith("search.loss of") else ValueError)(problem)
