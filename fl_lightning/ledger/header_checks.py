"""Whether the facts in a ledger's header can be true together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from aadp_kernels import tail_cutoff
from fl_lightning.accounting.exactness import Beside, SamplerCost
from fl_lightning.accounting.sum_costs import (
    evaluation_multipliers,
    extra_of,
    num_clients,
    of_clients,
)
from fl_lightning.ledger.correlated_checks import PLAN_FACTS, Cost, check_plan, cost_of_plan
from fl_lightning.ledger.evaluation_checks import beside_of, check_evaluation_facts
from fl_lightning.ledger.header import CORRELATED_SCHEMA, EVALUATION_SCHEMA
from fl_lightning.ledger.search_checks import search_problems
from fl_lightning.values.event import NoiseEvent

# Setting: privacy unit, who is trusted, possible adjacencies.
_SETTINGS = {
    "record+local": ("record", "local", ("zero_out", "replace_one")),
    "client+local": ("client", "local", ("replace_one",)),
    "client+aggregator": ("client", "aggregator", ("zero_out",)),
    "client+secure_sum": ("client", "secure_sum", ("zero_out",)),
    "abstract": ("none", "none", ("zero_out", "replace_one")),
}
EVALUATED = ("record+local", "client+local", "client+aggregator")
# What a header must state, by the schema that brought it; those after 1 hold for that one alone.
_FACTS = (
    ("thresholds", "noise_form", "tail_cutoff", "client_sizes", "layers", "dims"),
    (
        *("noise_multiplier", "noise_multiplier_given", "sampling_rate", "affordable_steps"),
        *("vote_share", "weights", "weighting", "clients_per_round"),
        *("min_survivors", "cohort_rate"),
    ),
    PLAN_FACTS,
    ("evaluation",),
)
_LISTS = ("delta", "epsilon", "client_sizes", "planned_steps")
# By how much a calibrated multiplier may be larger than the least that is enough, and what the
# arithmetic of another version or machine may change.
_SLACK, _ROUNDING = 0.05, 1e-3


def check_header(header: Mapping[str, Any]) -> list[str]:
    """Facts that contradict each other; [] if none do.

    Args:
        header: of a run, of a schema that `check_schema` lets pass.
    """
    schema = header.get("schema", 0)
    numbers = [0, *([1] if schema else []), *([schema] if schema > 1 else [])]
    names = [name for number in numbers for name in _FACTS[number]]
    missing = [name for name in names if name not in header]
    if missing:
        return [f"{', '.join(missing)} is missing"]
    problems = list(_setting(header))
    if not problems and schema:
        problems = list(_shared_noise(header))
        problems = problems or list(_evaluation(header))
        problems = problems or list(_rules(header)) or list(_calibration(header))
        problems = problems or list(search_problems(header))
    return problems


def _shared_noise(header: Mapping[str, Any]) -> Iterator[str]:
    correlated = header.get("coefficients") is not None
    if correlated != (header["schema"] == CORRELATED_SCHEMA):
        stated = "stated" if correlated else "missing"
        yield f"coefficients are {stated} in schema {header['schema']}"
    elif correlated:
        yield from check_plan(header)


def _evaluation(header: Mapping[str, Any]) -> Iterator[str]:
    stated = header.get("evaluation") is not None
    if stated != (header["schema"] == EVALUATION_SCHEMA):
        yield f"evaluation is {'stated' if stated else 'missing'} in schema {header['schema']}"
    elif stated and header["setting"] not in EVALUATED:
        yield f"evaluation is stated with setting {header['setting']}"
    elif stated:
        yield from check_evaluation_facts(header)


def _setting(header: Mapping[str, Any]) -> Iterator[str]:
    setting = header["setting"]
    if setting not in _SETTINGS:
        yield f"a run of setting {setting!r} has no ledger"
        return
    unit, trust, adjacencies = _SETTINGS[setting]
    for name, value in (("privacy_unit", unit), ("trust", trust)):
        if header[name] != value:
            yield f"{name} is {header[name]!r}, with setting {setting} it is {value!r}"
    if header["adjacency"] not in adjacencies:
        yield f"adjacency {header['adjacency']!r} is not one of setting {setting}"
    in_parts = header.get("min_survivors") is not None
    if in_parts != (setting == "client+secure_sum"):
        yield f"min_survivors is {header.get('min_survivors')} with setting {setting}"
    if header.get("cohort_rate") is not None and setting != "client+aggregator":
        yield f"cohort_rate is {header['cohort_rate']} with setting {setting}"
    raw, votes = (header["thresholds"] == name for name in ("raw", "quantile"))
    if (raw and setting != "abstract") or (votes and setting == "client+local"):
        yield f"thresholds are {header['thresholds']!r} with setting {setting}"
    for name in _LISTS:
        if not isinstance(header[name], list) or len(header[name]) != num_clients(header):
            yield f"{name} is not a list of {num_clients(header)} numbers"
    if len(header["layers"]) != len(header["dims"]):
        yield f"there are {len(header['layers'])} layers and {len(header['dims'])} dims"
    cutoff = tail_cutoff(header["mechanism"], header["noise_form"])
    if header["tail_cutoff"] != (cutoff if math.isfinite(cutoff) else None):
        form = header["noise_form"]
        yield f"tail_cutoff is {header['tail_cutoff']}, of form {form} it is {cutoff}"


def _rules(header: Mapping[str, Any]) -> Iterator[str]:
    setting, everyone = header["setting"], num_clients(header)
    summed = setting in ("client+aggregator", "client+secure_sum")
    if (header["weights"] is not None) != summed:
        yield f"weights are {'missing' if summed else 'stated'} with setting {setting}"
    if (header["vote_share"] > 0) != (header["thresholds"] == "quantile"):
        yield f"vote_share is {header['vote_share']} with thresholds {header['thresholds']!r}"
    rate, size = header["cohort_rate"], header["clients_per_round"]
    if rate is not None and rate != size / everyone:
        yield f"cohort_rate is {rate}, {size} of {everyone} clients a round are {size / everyone}"
    if setting != "record+local" and header["sampling_rate"] != (rate or 1.0):
        yield f"sampling_rate is {header['sampling_rate']}, of the cohort it is {rate or 1.0}"
    for name in ("weights", "noise_multiplier", "affordable_steps"):
        if isinstance(header[name], list) and len(header[name]) != everyone:
            yield f"{name} is not a list of {everyone} numbers"
    if summed:
        records = header["weighting"] == "records"
        wanted = of_clients(header, "client_sizes") if records else np.ones(everyone)
        if not (of_clients(header, "weights") == wanted).all():
            yield f"weights are not those of weighting {header['weighting']!r}"


def _calibration(header: Mapping[str, Any]) -> Iterator[str]:
    """Whether target, δ, steps and rate belong to each multiplier."""
    names = ("epsilon", "delta", "noise_multiplier", "planned_steps")
    target, delta, multiplier, planned = (of_clients(header, name) for name in names)
    limited = header["affordable_steps"] is not None
    if limited != bool(np.isfinite(target).any()):
        yield f"affordable_steps is {header['affordable_steps']} for such epsilon"
        return
    if not limited:
        return
    affordable = of_clients(header, "affordable_steps")
    if header.get("coefficients") is not None:
        if not (affordable == planned).all():
            yield "affordable_steps are not planned_steps: the planned run is charged as a whole"
            return
        affordable = np.full_like(planned, planned.max())  # members are told apart by their targets
    own = np.zeros_like(target)
    if header.get("evaluation") is not None:
        own = evaluation_multipliers(header)
    groups = np.unique(np.stack([target, delta, multiplier, affordable, own]), axis=1)
    for epsilon, d, z, steps, y in groups.T.tolist():
        members = (target == epsilon) & (delta == d) & (multiplier == z)
        if header.get("coefficients") is not None:
            problem = _belongs(header, epsilon, d, z, int(steps), cost_of_plan(header, members, d))
        else:
            most = planned[members].max()
            if not header["noise_multiplier_given"] and steps != most:
                yield f"affordable_steps is {steps:.0f}, planned were {most:.0f}"
                return
            problem = _belongs(
                header, epsilon, d, z, int(steps), _cost_of_steps(header, d),
                beside=beside_of(header, y, d) if y else None,
            )  # fmt: skip
        if problem:
            yield problem
            return


def _cost_of_steps(header: Mapping[str, Any], delta: float) -> Cost:
    """What steps cost a client of this δ."""
    extra = extra_of(header, votes=header["thresholds"] == "quantile")

    def cost(z: float, steps: int) -> tuple[NoiseEvent, int, SamplerCost]:
        event = NoiseEvent(header["mechanism"], z, header["sampling_rate"], header["adjacency"])
        return event, steps, extra(event, delta)

    return cost


def _belongs(
    header: Mapping[str, Any],
    epsilon: float,
    delta: float,
    multiplier: float,
    steps: int,
    of_steps: Cost,
    *,
    beside: Beside | None = None,
) -> str:
    """Why a multiplier and a number of steps are not what an ε allows; "" if they are.

    A calibrated multiplier is the least that is enough; a given one allows as many steps as stated.
    """
    from fl_lightning.accounting.exactness import charged_epsilon

    def cost(z: float, count: int) -> float:
        event, times, extra = of_steps(z, count)
        return charged_epsilon(event, times, delta, extra, beside)

    def drawn(z: float, count: int) -> bool:
        """Whether what inexact noise costs leaves half of ε and δ: no less noise is calibrated."""
        _, times, extra = of_steps(z, count)
        return times * extra.epsilon <= epsilon / 2 and times * extra.delta <= delta / 2

    spent, less = cost(multiplier, max(steps, 1)), multiplier * (1 - _SLACK)
    where = f"{steps} steps at noise_multiplier {multiplier} cost epsilon {spent:.6g}"
    if spent > epsilon * (1 + _ROUNDING):
        return f"{where}, more than the target {epsilon:.6g}"
    if spent >= epsilon * (1 - _SLACK / 2):
        return ""
    if header["noise_multiplier_given"]:
        least = steps >= 10**9 or cost(multiplier, 2 * steps + 2) > epsilon
    else:
        least = cost(less, max(steps, 1)) > epsilon or not drawn(less, steps)
    return "" if least else f"{where}, far below the target {epsilon:.6g}: not what was calibrated"
