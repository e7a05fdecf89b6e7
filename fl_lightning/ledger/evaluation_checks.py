"""What must hold of private evaluations in a ledger: between its header, its plan and its lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from fl_lightning.accounting.evaluation import EvaluationPlan, evaluation_cost, is_due
from fl_lightning.accounting.exactness import Beside
from fl_lightning.accounting.sum_costs import evaluation_multipliers, num_clients, of_clients
from fl_lightning.values.event import NoiseEvent
from fl_lightning.values.release import ALL_CLIENTS, Release

FACTS = ("every_n_rounds", "rounds", "planned", "share", "apart", "records", "noise_multiplier")
_SLACK, _ROUNDING = 0.05, 1e-3


def beside_of(header: Mapping[str, Any], multiplier: float, delta: float) -> Beside | None:
    """What evaluations add to a client's updates; None where there are none or they are apart."""
    facts = header.get("evaluation")
    if facts is None or facts["apart"]:
        return None
    event = _event(header, multiplier)
    return event, int(facts["planned"]), evaluation_cost(event, header["noise_form"], delta)


def _event(header: Mapping[str, Any], multiplier: float) -> NoiseEvent:
    return NoiseEvent(header["mechanism"], multiplier, 1.0, header["adjacency"])


def check_evaluation_facts(header: Mapping[str, Any]) -> Iterator[str]:
    """Facts of private evaluations that contradict each other or the rest of the header."""
    facts, everyone = header["evaluation"], num_clients(header)
    missing = [name for name in FACTS if name not in facts]
    if missing:
        yield f"evaluation has no {', '.join(missing)}"
        return
    if facts["apart"] != (header["privacy_unit"] == "record"):
        yield f"evaluation.apart is {facts['apart']}, the unit is {header['privacy_unit']}"
    if not 0 < facts["share"] <= 0.5 or facts["every_n_rounds"] < 1 or facts["planned"] < 1:
        yield f"evaluation of share {facts['share']}, planned {facts['planned']}, cannot be"
    values = facts["noise_multiplier"]
    if len(facts["records"]) != everyone or (isinstance(values, list) and len(values) != everyone):
        yield f"evaluation does not list {everyone} clients"
        return
    found = np.stack([*(of_clients(header, n) for n in ("epsilon", "delta")),
                      evaluation_multipliers(header)])  # fmt: skip
    for epsilon, delta, z in np.unique(found, axis=1).T.tolist():
        yield from _calibrated(header, epsilon, delta, z)


def _calibrated(header: Mapping[str, Any], epsilon: float, delta: float, z: float) -> Iterator[str]:
    """Whether an evaluation's multiplier is the least that its part of ε allows."""
    facts = header["evaluation"]
    plan = EvaluationPlan(
        facts["every_n_rounds"], facts["rounds"], facts["share"], facts["apart"],
        header["noise_form"], np.array(facts["records"]),
    )  # fmt: skip
    if facts["planned"] != plan.times:
        yield f"evaluation.planned is {facts['planned']}, by its rounds it is {plan.times}"
        return
    least = plan.multiplier(_event(header, 1.0), epsilon, delta)
    if not least * (1 - _ROUNDING) <= z <= least * (1 + _SLACK):
        yield f"evaluation.noise_multiplier is {z}, calibrated would be {least}"


def check_evaluations(header: Mapping[str, Any]) -> Callable[[int, Release], Iterator[str]]:
    """A check for lines of evaluations that contradict the header or each other.

    Returns:
        A function (number of the line, release) → problems, to be called for all lines in order.
    """
    facts = header.get("evaluation")
    if facts is None:
        return lambda line, release: iter(())
    everyone, records = num_clients(header), np.array(facts["records"])
    multipliers, there = evaluation_multipliers(header), np.flatnonzero(records)
    summed = header["setting"] == "client+aggregator"
    made: Counter[int] = Counter()
    attempts: Counter[tuple[int, int]] = Counter()

    def check(line: int, release: Release) -> Iterator[str]:
        if not release.evaluation:
            return
        problems = dict(_against_header(header, release))
        z = release.noise_multiplier
        if (release.client == ALL_CLIENTS) != summed:
            problems["client"] = release.client, "another"
        elif summed:
            if not np.array_equal(release.members(everyone), there):
                problems["clients"] = release.clients, "all that have held-out records"
            z = float(multipliers[there].min())
        elif release.client >= everyone or not records[release.client]:
            problems["client"] = release.client, "one that has held-out records"
        else:
            z = float(multipliers[release.client])
        if "client" not in problems and release.noise_multiplier != z:
            problems["noise_multiplier"] = release.noise_multiplier, z
        if not is_due(release.round, facts["rounds"], facts["every_n_rounds"]):
            problems["round"] = release.round, "one that ends with an evaluation"
        place = release.client, release.round
        if release.attempt != attempts[place]:
            problems["attempt"] = release.attempt, attempts[place]
        if release.first_step != made[release.client]:
            problems["first_step"] = release.first_step, made[release.client]
        attempts[place] += 1
        made[release.client] += 1
        if made[release.client] > facts["planned"]:
            problems["evaluations"] = made[release.client], f"at most {facts['planned']}"
        for name, (stated, fact) in problems.items():
            yield f"line {line}: evaluation's {name} is {stated}, by the header it is {fact}"

    return check


def _against_header(
    header: Mapping[str, Any], release: Release
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    stated = {
        "mechanism": (release.mechanism, header["mechanism"]),
        "adjacency": (release.adjacency, header["adjacency"]),
        "sampling_rate": (release.sampling_rate, 1.0),
        "steps": (release.steps, 1),
        "num_layers": (release.num_layers, 1),
        "clip_norm": (release.clip_norm, (1.0,)),
        "guarantee": (release.guarantee, True),
    }
    for name, (line, fact) in stated.items():
        if line != fact:
            yield name, (line, fact)
