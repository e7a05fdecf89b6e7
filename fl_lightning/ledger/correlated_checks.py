"""What must hold in the ledger of a run whose rounds share noise (schema 2).

The schedule of cohorts follows from facts of the header, and from it each client's planned
sensitivity, the steps that were planned and the multipliers that were calibrated. Lines say which
earlier noises they combined: those of all rounds before that were released and that the bands
reach, no more and no fewer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_lightning.accounting.cohort import cohort_schedule, participations_of
from fl_lightning.accounting.correlated import CorrelatedPlan, check_coefficients, whole_run
from fl_lightning.accounting.exactness import SamplerCost
from fl_lightning.accounting.sum_costs import extra_of, num_clients, of_clients
from fl_lightning.values.event import NoiseEvent
from fl_lightning.values.release import Release

# (multiplier of a round, steps) → (event, how often it happens, what inexact noise adds each time).
Cost = Callable[[float, int], tuple[NoiseEvent, int, SamplerCost]]
PLAN_FACTS = ("coefficients", "horizon", "schedule_seed", "sensitivity")
_CLOSE = 1e-9


def schedule_of(header: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """Clients of every planned round, int64 [rounds, m]."""
    return _schedule(*_drawn_from(header))


def plan_of(header: Mapping[str, Any]) -> CorrelatedPlan:
    """The plan of a run, from its header alone."""
    return _plan(tuple(header["coefficients"]), *_drawn_from(header))


def _drawn_from(header: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Clients, clients a round, rounds and seed: all that a schedule is a function of."""
    rounds, seed = header["horizon"], header["schedule_seed"]
    return num_clients(header), header["clients_per_round"], rounds, seed


@functools.lru_cache(maxsize=4)
def _schedule(everyone: int, size: int, rounds: int, seed: int) -> npt.NDArray[np.int64]:
    return cohort_schedule(everyone, size, rounds, seed, one_order=True)


@functools.lru_cache(maxsize=4)
def _plan(
    coefficients: tuple[float, ...], everyone: int, size: int, rounds: int, seed: int
) -> CorrelatedPlan:
    return CorrelatedPlan.of(coefficients, _schedule(everyone, size, rounds, seed), everyone)


def check_plan(header: Mapping[str, Any]) -> Iterator[str]:
    """Facts of shared noise that contradict the rest of a header.

    Args:
        header: of schema 2, its other facts checked.
    """
    wanted = {
        "setting": (header["setting"], "client+aggregator"),
        "mechanism": (header["mechanism"], "gaussian"),
        "cohort_rate": (header["cohort_rate"], None),
    }
    for name, (stated, needed) in wanted.items():
        if stated != needed:
            yield f"{name} is {stated}, noise that rounds share needs {needed}"
            return
    if header["noise_form"] == "grid":
        yield "noise_form is 'grid', for which noise that rounds share has no proof"
        return
    check_coefficients(header["coefficients"])
    steps = of_clients(header, "planned_steps")
    fits = header["horizon"] * header["clients_per_round"] == steps.sum()  # before it is dealt out
    if not (fits and (steps == participations_of(schedule_of(header), len(steps))).all()):
        yield (
            f"planned_steps are not those of horizon {header['horizon']} and schedule_seed "
            f"{header['schedule_seed']}"
        )
        return
    plan = plan_of(header)
    if not np.allclose(
        of_clients(header, "sensitivity"), plan.sizes_of_one.whole, rtol=_CLOSE, atol=0
    ):
        yield "sensitivity is not that of coefficients, horizon and schedule_seed"


def cost_of_plan(header: Mapping[str, Any], members: npt.NDArray[np.bool_], delta: float) -> Cost:
    """What the planned run costs the worst of some clients, whatever the number of steps.

    Args:
        header: of schema 2.
        members: bool [clients].
        delta: theirs.
    """
    plan, extra = plan_of(header), extra_of(header, votes=header["thresholds"] == "quantile")
    whole, largest = (
        max(1.0, float(sizes[members].max()))
        for sizes in (plan.sizes_of_one.whole, plan.sizes_of_one.largest)
    )

    def cost(z: float, _: int) -> tuple[NoiseEvent, int, SamplerCost]:
        event = NoiseEvent(header["mechanism"], z, header["sampling_rate"], header["adjacency"])
        run, inexact = whole_run(
            event, whole / z, largest / z, plan.horizon, lambda event: extra(event, delta)
        )
        return run, 1, inexact

    return cost


def check_lines(header: Mapping[str, Any]) -> Callable[[int, Release], Iterator[str]]:
    """A check for lines not of the planned rounds, or that combined other noises than they could.

    Returns:
        A function (number of the line, release) → problems, to be called for all lines in order.
    """
    if header.get("coefficients") is None:
        return _uncombined
    plan, schedule = plan_of(header), schedule_of(header)
    released: set[int] = set()

    def check(line: int, release: Release) -> Iterator[str]:
        for problem in _line(plan, schedule, release, released):
            yield f"line {line}: {problem}"
        released.add(release.round)

    return check


def _uncombined(line: int, release: Release) -> Iterator[str]:
    if release.combined is not None:
        yield f"line {line}: combined is stated, the header has no coefficients"


def _line(
    plan: CorrelatedPlan, schedule: npt.NDArray[np.int64], release: Release, before: set[int]
) -> Iterator[str]:
    round = release.round
    if round >= plan.horizon:
        yield f"round {round} is beyond the {plan.horizon} planned rounds"
        return
    if before and round <= max(before):
        yield f"round {round} comes after round {max(before)}: a round is released once, in order"
        return
    strangers = np.setdiff1d(release.members(schedule.max() + 1), schedule[round])
    if len(strangers):
        yield f"client {strangers[0]} is not in the planned cohort of round {round}"
    wanted = tuple(r for r, _ in plan.terms(round, before.__contains__))
    if release.combined != wanted:
        yield (
            f"combined is {_show(release.combined)}, the rounds before it that were released and "
            f"are within {len(plan.coefficients)} bands are {_show(wanted)}"
        )


def _show(rounds: tuple[int, ...] | None) -> str:
    return "missing" if rounds is None else str(list(rounds))
