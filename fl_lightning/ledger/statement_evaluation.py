"""The part of the statement on private evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fl_lightning.accounting.sum_costs import evaluation_multipliers
from fl_lightning.ledger.client_reports import ClientReport, show_number


def evaluation_section(header: Mapping[str, Any], reports: Mapping[int, ClientReport]) -> str:
    """What private evaluations released and cost; "" of a run that plans none.

    Args:
        header: of the ledger.
        reports: accounts of the clients.
    """
    facts = header.get("evaluation")
    if facts is None:
        return ""
    there = np.flatnonzero(facts["records"])
    multipliers = evaluation_multipliers(header)[there]
    span = " to ".join(dict.fromkeys(map(show_number, (multipliers.min(), multipliers.max()))))
    made = max((r.evaluations for r in reports.values()), default=0)
    released = {
        "record+local": "Each client released its number of right answers; one record moves it by "
        "at most 1",
        "client+local": "Each client released its share of right answers; a client moves its own "
        "by at most 1",
        "client+aggregator": "The sum of all clients' shares of right answers was released, with "
        "one noise; a client moves it by at most 1, times its public weight",
    }[header["setting"]]
    charged = (
        "No record is both a training and a held-out record, whatever it holds: which is which "
        "was decided by places. So a training record is charged for the updates and a held-out "
        "one for the evaluations, not for both (parallel composition), and epsilon above is the "
        "larger of the two."
        if facts["apart"]
        else "Both kinds of record are the client's own, so evaluations are composed with the "
        "updates; epsilon above is of both together."
    )
    return "\n".join(
        (
            "## Private evaluation",
            "",
            f"- {made} of {facts['planned']} planned evaluations of {len(there)} clients on "
            f"records that they held out. {released}.",
            f"- Noise scale: {span}, {header['mechanism']}, without sampling.",
            f"- {charged}",
        )
    )
