"""The privacy statement of a run: one page of Markdown, every figure from the ledger."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from fl_lightning._ledger_report import (
    ClientReport,
    any_nominal,
    headline,
    report_clients,
    show_number,
)
from fl_lightning.ledger import Ledger

_ADVERSARY = {
    "record+local": (
        "Everybody except the client itself: the server, the other clients and whoever sees the "
        "model. They see every update that the client sent, the public facts below and this ledger."
    ),
    "client+local": (
        "Everybody except the client itself: the server, the other clients and whoever sees the "
        "model. They see every update that the client sent, know that it took part, and see this "
        "ledger."
    ),
}
_ADVERSARY["client+aggregator"] = (
    "Everybody except the client itself and the server, which is trusted: it sees every update, "
    "adds the noise and keeps to itself who took part. The adversary sees the model after every "
    "round, the public facts below and this ledger; all other clients may work together with it."
)
_ADVERSARY["client+secure_sum"] = (
    "Everybody except the client itself, the server included: it knows who takes part and sees the "
    "sum of each round, noise included, but no single update. Clients other than the assumed "
    "honest survivors may work together with it."
)
_UNIT = {
    "record+local": "one record of one client",
    "client+local": "all records of one client together",
    "client+aggregator": "all records of one client together",
    "client+secure_sum": "all records of one client together",
}
_ADJACENCY = {
    "zero_out": (
        "zero_out: the unit's contribution is replaced by zero; the number of records of the "
        "client is public and stays the same. Sensitivity: the clip norm (times the client's "
        "public weight where a sum is weighted)."
    ),
    "replace_one": (
        "replace_one: the unit is replaced by any other unit. Sensitivity: twice the clip norm; "
        "the noise multipliers below are relative to that."
    ),
}


def privacy_statement(ledger: Ledger) -> str:
    """What a run guarantees, to whom, under which assumptions, and what it does not cover.

    Args:
        ledger: the run's ledger. Public.

    Returns:
        Markdown, about a page; ends with a newline.

    Guarantees:
        Epsilon and delta are recomputed from the ledger's releases, never taken from the plan.

    Edge cases:
        | case | statement |
        |---|---|
        | setting `abstract` | epsilon is called nominal, without guarantee |
        | setting `none`, or a release without noise | epsilon is infinite |
        | no releases | nothing was released |
        | simulated | begins with a warning: the seed is public, nobody is protected |
    """
    header, reports = ledger.header, report_clients(ledger.header, ledger.releases)
    nominal = header["setting"] == "abstract" or any_nominal(reports)
    protected = header["setting"] in _ADVERSARY and not nominal
    parts = ["# Privacy statement", _warning(header, nominal)]
    parts.append(_headline_section(header, reports))
    if protected:
        parts += [_who(header), _assumptions(header, ledger)]
    parts += [_how(header, reports, ledger), _not_covered(header, reports, protected)]
    parts.append(_record(ledger))
    return "\n\n".join(part for part in parts if part) + "\n"


def _warning(header: Mapping[str, Any], nominal: bool) -> str:
    lines = []
    if header["simulated"]:
        lines.append(
            "> **SIMULATED: public seed.** Noise and sampling can be reproduced by anyone who "
            "knows the seed; this run protects nobody. Epsilon is what the same run would have "
            "with a secret key."
        )
    if header["setting"] == "none":
        lines.append("> **No privacy.** Updates were released without noise.")
    elif nominal:
        lines.append(
            "> **Nominal epsilon, no guarantee.** Clip norms and budget shares depend on raw "
            "updates; no differential privacy is claimed."
        )
    return "\n>\n".join(lines)


def _headline_section(header: Mapping[str, Any], reports: Mapping[int, ClientReport]) -> str:
    lines = ["## Result", "", _sentence(header, reports)]
    active = [r for r in reports.values() if r.releases]
    if active:
        epsilons = [r.epsilon for r in active]
        deltas = [r.delta for r in active]
        lines += ["", "| over clients that released | smallest | median | largest |"]
        lines.append("|---|---|---|---|")
        for name, values in (("epsilon", epsilons), ("delta", deltas)):
            figures = (min(values), statistics.median(values), max(values))
            lines.append(f"| {name} | " + " | ".join(map(show_number, figures)) + " |")
        over = [r for r in active if r.target_epsilon is not None and r.epsilon > r.target_epsilon]
        if over:
            lines += ["", f"{len(over)} clients spent more than their target."]
    return "\n".join(lines)


def _sentence(header: Mapping[str, Any], reports: Mapping[int, ClientReport]) -> str:
    if header["setting"] == "none":
        return "**epsilon infinite: no differential privacy.**"
    return f"**{headline(reports)}.**"


def _who(header: Mapping[str, Any]) -> str:
    setting = header["setting"]
    return "\n".join(
        (
            "## Who is protected, against whom",
            "",
            f"- Privacy unit: {_UNIT[setting]}.",
            f"- Adversary: {_ADVERSARY[setting]}",
            "- Secret: the client's data, gradients, unnoised norms and counts, which records were "
            "sampled, and the key of the noise.",
            f"- Adjacency: {_ADJACENCY[header['adjacency']]}",
        )
    )


def _assumptions(header: Mapping[str, Any], ledger: Ledger) -> str:
    key = (
        "a PUBLIC seed was used: this assumption does not hold here"
        if header["simulated"]
        else "the operating system's randomness is unpredictable, and the run's key stays secret"
    )
    lines = [
        "## Assumptions",
        "",
        _arithmetic(header),
        f"- Key: {key}.",
        "- Time, memory use and other side channels are not observed.",
    ]
    if header["setting"] == "record+local":
        lines.append(
            "- Exact gradients: one record's gradient does not depend on the records beside it, "
            "not even in its last bits."
        )
    if any(r.sampling_rate < 1 for r in ledger.releases):
        whom = (
            "records took part in a step"
            if "record" in header["setting"]
            else ("clients took part in a round (but the trusted server)")
        )
        lines.append(f"- Poisson sampling: nobody learns which {whom}.")
    if header["setting"] == "client+secure_sum":
        lines.append(
            f"- Secure aggregation: only sums are seen, and at least {header['min_survivors']} "
            "clients of every round are honest and stay; their shares alone are the whole noise. "
            "Here the protocol itself is simulated."
        )
    if header.get("tail_cutoff") is not None and header.get("noise_form") != "grid":
        lines.append(
            f"- The sampler's largest draw is {show_number(float(header['tail_cutoff']))} noise "
            "scales; its cut tails are charged."
        )
    return "\n".join(lines)


def _arithmetic(header: Mapping[str, Any]) -> str:
    """What is proven of the numbers that a computer has in the place of real ones."""
    form = header.get("noise_form", "wide")
    if form == "grid":
        return (
            "- Floating point: noise form `grid`. What is released is a public multiple of whole "
            "numbers: every contribution is clipped and cut to whole numbers, which are summed and "
            "noised exactly. The guarantee is of the numbers as the computer has them, given that "
            "the generator's words are uniform; how far the sampler's probabilities are off is "
            "charged."
        )
    return (
        f"- Real arithmetic: noise form `{form}`; rounding in floating point is not part of the "
        "proof"
        + (f" ({header['arithmetic']})" if header.get("arithmetic") else "")
        + "; only the form `grid` is proven in floating point."
    )


def _charged(ledger: Ledger, name: str) -> str:
    """Largest sum over a client's releases."""
    sums: dict[int, float] = {}
    for release in ledger.releases:
        sums[release.client] = sums.get(release.client, 0.0) + getattr(release, name)
    return show_number(max(sums.values(), default=0.0)) + " (largest client)"


def _how(header: Mapping[str, Any], reports: Mapping[int, ClientReport], ledger: Ledger) -> str:
    active = [r for r in reports.values() if r.releases]
    if not active:
        return ""
    multipliers = [z for r in active for z in r.noise_multipliers]
    rates = [q for r in active for q in r.sampling_rates]
    steps = [r.steps for r in active]
    mechanisms = sorted({m for r in active for m in r.mechanisms})
    return "\n".join(
        (
            "## What was done",
            "",
            f"- {len(ledger)} releases of {len(active)} clients in "
            f"{len({r.round for r in ledger.releases})} rounds; noised steps a client: "
            f"{_span(steps)}.",
            f"- Mechanism: {', '.join(mechanisms)}; noise multiplier (noise scale / sensitivity, "
            f"votes included): {_span(multipliers)}; sampling rate: {_span(rates)}.",
            f"- Composition: privacy loss distributions (pessimistic), per client; random numbers: "
            f"{header.get('rng', 'not stated')}; noise form: {header.get('noise_form', 'wide')}.",
            "- Charged on top of the composition, for noise that is not the ideal one: epsilon "
            f"{_charged(ledger, 'epsilon_inflation')}, delta {_charged(ledger, 'tail_delta')}.",
        )
    )


def _span(values: list[float] | list[int]) -> str:
    low, high = show_number(min(values)), show_number(max(values))
    return low if low == high else f"{low} to {high}"


def _not_covered(
    header: Mapping[str, Any], reports: Mapping[int, ClientReport], protected: bool
) -> str:
    if not protected:
        return ""
    lines = [
        "## What is not covered",
        "",
        "- Epsilon is of this one run, its hyperparameters given: choosing them by looking at "
        "private or validation data, other runs on the same data, and early stopping are not "
        "charged.",
        "- Validation and test figures are computed from their own records without noise; those "
        "records are not protected.",
        "- Values named `sim_only` and the time that rounds took are private; they exist because "
        "one machine simulates all clients, and must not be published.",
        f"- Groups: g {'records' if header['setting'] == 'record+local' else 'clients'} together "
        "have epsilon g * epsilon and delta g * exp((g - 1) * epsilon) * delta."
        + _group_example(reports),
        "- One person with data at m clients: epsilons and deltas of these clients add up.",
        "- Facts that are true of the whole population may be learned; that is the purpose.",
    ]
    return "\n".join(lines)


def _group_example(reports: Mapping[int, ClientReport]) -> str:
    worst = max(reports.values(), key=lambda r: r.epsilon, default=None)
    if worst is None or not math.isfinite(worst.epsilon) or worst.epsilon == 0:
        return ""
    delta = 2 * math.exp(min(worst.epsilon, 700.0)) * worst.delta
    return (
        f" For two: epsilon {show_number(2 * worst.epsilon)}, delta {show_number(min(delta, 1.0))}."
    )


def _record(ledger: Ledger) -> str:
    return (
        "## Record\n\n"
        f"Ledger of {len(ledger)} releases, last hash `{ledger.head_hash}`. Check it with "
        "`python -m fl_lightning.ledger verify`, read it with `python -m fl_lightning.ledger show`."
    )
