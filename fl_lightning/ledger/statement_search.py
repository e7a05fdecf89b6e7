"""The part of the statement on the search that chose a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fl_lightning.ledger.client_reports import show_bound, show_number


def search_sentence(header: Mapping[str, Any]) -> str:
    """ε and δ of the whole search, largest over the clients; "" of a run that none chose."""
    facts = header.get("search")
    if facts is None:
        return ""
    worst = max(zip(facts["epsilon"], facts["delta"], strict=True))
    return (
        f"**Chosen by a search that costs epsilon {show_bound(worst[0])} at delta "
        f"{show_number(worst[1])} (largest over the clients), this run included.** The figures "
        "below are of this run alone, as if there had been no other."
    )


def search_section(header: Mapping[str, Any]) -> str:
    """What was searched, what it cost, and who is protected; "" of a run that none chose."""
    facts = header.get("search")
    if facts is None:
        return ""
    law = "Poisson" if facts["law"] == "poisson" else "truncated negative binomial"
    shape = "" if facts["law"] == "poisson" else f" and shape {show_number(facts['shape'])}"
    losses = sorted(set(facts["loss"]))
    return "\n".join(
        (
            "## The search that chose this run",
            "",
            f"- A secret number of runs, drawn from a {law} law of mean "
            f"{show_number(facts['mean'])}{shape}, each with options drawn from the laws below. "
            "The run with the best private evaluation was chosen; nothing of any other run is "
            "shown.",
            f"- A run's options: `{json.dumps(facts['space'], sort_keys=True)}`.",
            "- Cost: a client's epsilon of the search is at most that of one run, at delta over "
            f"the expected number of runs, and up to {show_bound(losses[-1])} for the choice "
            "(docs/tuning.md).",
            "- This holds against those who see what the search shows: this run, its ledger and "
            "this statement. It does not hold against anybody who sees another of its runs, or "
            "learns how many there were: whoever ran the search, and in a deployment the server "
            "and the clients. Against them all runs are composed.",
            "- Bounds for attacks and for groups are not computed for a search.",
        )
    )
