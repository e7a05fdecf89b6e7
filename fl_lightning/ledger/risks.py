"""What a ledger says of attacks: bounds for the worst and the median client."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fl_lightning.accounting.risk import FALSE_POSITIVE_RATES, PRIORS, Risk, risk_of
from fl_lightning.ledger.accounts import Account, accounts
from fl_lightning.values.release import Release

CURVE_COLUMNS = ("false_positive_rate", "worst_client", "median_client", "epsilon_delta_alone")
# What an attack has to tell apart.
_QUESTION = {
    "zero_out": "was {unit} used, or was its contribution replaced by zero",
    "replace_one": "was it {unit} as it is, or some other one that the attacker names",
}
_OF = {"record": "this record of this client", "client": "this client's data"}


@dataclass(frozen=True)
class RunRisks:
    """Bounds of a run. Public.

    Args:
        worst, median: of the client with the largest epsilon and of one in the middle.
        alone: what the worst client's (epsilon, delta) alone would bound.
    """

    worst: Risk
    median: Risk
    alone: Risk


def run_risks(header: Mapping[str, Any], releases: Sequence[Release]) -> RunRisks | None:
    """Bounds on attacks on a run; None where nothing is proven or nothing was released.

    Args:
        header, releases: of the ledger.
    """
    if header["setting"] in ("none", "abstract") or header.get("search"):
        return None  # of a run that a search chose the bounds of the run alone are too small
    # Of each client, the kind of unit that attacks can find out most of.
    clients = [a for a in accounts(header, releases).values() if a.releases]
    found = [max(a.units(), key=Account.epsilon) for a in clients]
    if not found or not all(c.guarantee for account in found for c in account.charges):
        return None
    ordered = sorted(found, key=Account.epsilon)
    worst, median = ordered[-1], ordered[(len(ordered) - 1) // 2]
    if not math.isfinite(worst.epsilon()):
        return None
    of_worst = _risk(worst)
    return RunRisks(
        of_worst,
        of_worst if _same(worst, median) else _risk(median),
        Risk.of_pairs([(worst.epsilon(), worst.delta)]),
    )


def _risk(account: Account) -> Risk:
    return risk_of(account.counts(), account.delta, *account.on_top())


def _same(one: Account, other: Account) -> bool:
    return one.counts() == other.counts() and one.on_top() == other.on_top()


def risk_figures(risks: RunRisks | None) -> dict[str, float | None]:
    """Figures for `summary.json`; None where there is no bound."""
    return {
        "attack_advantage_max": risks and risks.worst.advantage(),
        "attack_advantage_median": risks and risks.median.advantage(),
        **{
            f"attack_tpr_at_fpr_{rate:g}_max": risks and float(risks.worst.power(rate))
            for rate in FALSE_POSITIVE_RATES
        },
        "attack_right_guesses_of_half_max": risks and risks.worst.right_guesses(0.5),
    }


def curve_rows(risks: RunRisks) -> list[tuple[float, ...]]:
    """Rows of the trade-off curves, see `CURVE_COLUMNS`; false positive rates from 0 to 1."""
    rates = np.concatenate([[0.0], np.geomspace(1e-4, 1.0, 121)])
    curves = [risk.power(rates) for risk in (risks.worst, risks.median, risks.alone)]
    return [tuple(map(float, row)) for row in zip(rates, *curves, strict=True)]


def attack_section(header: Mapping[str, Any], risks: RunRisks | None) -> str:
    """The part of the statement on attacks; "" where there is no bound.

    Args:
        header: of the ledger.
        risks: of the run.
    """
    if risks is None:
        return ""
    question = _QUESTION[header["adjacency"]].format(unit=_OF[header["privacy_unit"]])
    rows: dict[str, Callable[[Risk], float]] = {
        "right alarms minus false alarms (advantage)": Risk.advantage
    }
    for rate in FALSE_POSITIVE_RATES:
        rows[f"right alarms, at {_percent(rate)} false ones"] = partial(_power, rate=rate)
    for prior in reversed(PRIORS):
        rows[
            f"right guesses, if it is so in {_percent(prior)} of cases "
            f"(without this run: {_percent(max(prior, 1 - prior))})"
        ] = partial(Risk.right_guesses, prior=prior)
    columns = (risks.worst, risks.median, risks.alone)
    half = risks.worst.right_guesses(0.5)
    return "\n".join(
        (
            "## What an attack can find out, at most",
            "",
            f"The question is: {question}? The attacker is the adversary above and may know all "
            "other data. No attack of any kind does better than these bounds, which follow from "
            "the noise of all releases together; most do much worse. Read alone, (epsilon, delta) "
            "would allow more.",
            "",
            "| at most | worst client | median client | (epsilon, delta) alone |",
            "|---|---|---|---|",
            *(
                f"| {name} | {' | '.join(_percent(figure(c)) for c in columns)} |"
                for name, figure in rows.items()
            ),
            "",
            "In words: where a guess is right in 50 of 100 cases without this run, it is right in "
            f"at most {_percent(half).removesuffix(' %')} of 100 with it.",
        )
    )


def _power(risk: Risk, rate: float) -> float:
    return float(risk.power(rate))


def _percent(value: float) -> str:
    """Per cent with a decimal where it is not whole, rounded up."""
    return f"{min(100.0, math.ceil(value * 1000 - 1e-9) / 10):g} %"
