"""The privacy statement of a run: one page of Markdown, every figure from the ledger."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fl_lightning.ledger.client_reports import (
    ClientReport,
    any_nominal,
    headline,
    report_clients,
    show_bound,
    show_number,
)
from fl_lightning.ledger.file import Ledger
from fl_lightning.ledger.risks import attack_section, run_risks
from fl_lightning.ledger.statement_assumptions import assumptions
from fl_lightning.ledger.statement_evaluation import evaluation_section
from fl_lightning.ledger.statement_groups import group_section
from fl_lightning.ledger.statement_search import search_section, search_sentence
from fl_lightning.privacy.config import SUMMED
from fl_lightning.privacy.simulated import simulated_reason
from fl_lightning.values.release import ALL_CLIENTS, Release

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
    "Everybody except the client itself and the server, which is trusted: it sees every update{} "
    "and adds the noise. The adversary sees the model after every round, the public facts below "
    "and this ledger{}; all other clients may work together with it."
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
        "client is public and stays the same. Sensitivity: the clip norm{}."
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
        | simulated | begins with a warning: nobody is protected, and why |
    """
    header, releases = ledger.header, ledger.releases
    reports = report_clients(header, releases)
    nominal = header["setting"] == "abstract" or any_nominal(reports)
    protected = header["setting"] in _ADVERSARY and not nominal
    parts = ["# Privacy statement", _warning(header, nominal)]
    parts += [search_sentence(header), _headline_section(header, reports)]
    parts.append(search_section(header))
    if protected:
        parts += [_who(header, releases), assumptions(header, releases)]
    parts += [_how(header, reports, releases), evaluation_section(header, reports)]
    if protected:
        parts.append(attack_section(header, run_risks(header, releases)))
        if not header.get("search"):
            parts.append(group_section(header, reports, releases))
        parts.append(_not_covered(header))
    parts.append(_record(ledger))
    return "\n\n".join(part for part in parts if part) + "\n"


def _warning(header: Mapping[str, Any], nominal: bool) -> str:
    lines, reason = [], simulated_reason(header)
    if reason:
        lines.append(
            f"> **SIMULATED: {reason}.** {_why_simulated(reason)}; this run protects nobody. "
            "Epsilon is what the same run would have with a secret key and a generator to build on."
        )
    if header["setting"] == "none":
        lines.append("> **No privacy.** Updates were released without noise.")
    elif nominal:
        lines.append(
            "> **Nominal epsilon, no guarantee.** Clip norms and budget shares depend on raw "
            "updates; no differential privacy is claimed."
        )
    return "\n>\n".join(lines)


def _why_simulated(reason: str) -> str:
    if "public seed" in reason:
        return "Noise and sampling can be reproduced by anyone who knows the seed"
    return "The generator was not made to withstand anybody who tries to foresee its noise"


def _headline_section(header: Mapping[str, Any], reports: Mapping[int, ClientReport]) -> str:
    lines = ["## Result", "", _sentence(header, reports)]
    active = [r for r in reports.values() if r.releases]
    if active:
        epsilons = [r.epsilon for r in active]
        deltas = [r.delta for r in active]
        lines += ["", "| over clients that released | smallest | median | largest |"]
        lines.append("|---|---|---|---|")
        for name, values, show in (
            ("epsilon", epsilons, show_bound),
            ("delta", deltas, show_number),
        ):
            figures = (min(values), statistics.median(values), max(values))
            lines.append(f"| {name} | " + " | ".join(map(show, figures)) + " |")
        over = [r for r in active if r.target_epsilon is not None and r.epsilon > r.target_epsilon]
        if over:
            who = (
                "1 client spent more than its"
                if len(over) == 1
                else f"{len(over)} clients spent more than their"
            )
            lines += ["", f"{who} target."]
    return "\n".join(lines)


def _sentence(header: Mapping[str, Any], reports: Mapping[int, ClientReport]) -> str:
    if header["setting"] == "none":
        return "**epsilon infinite: no differential privacy.**"
    return f"**{headline(reports)}.**"


def _adversary(setting: str, sampled: bool) -> str:
    if setting != "client+aggregator":
        return _ADVERSARY[setting]
    if sampled:
        return _ADVERSARY[setting].format(", keeps to itself who took part,", "")
    return _ADVERSARY[setting].format("", ", and knows who took part")


def _who(header: Mapping[str, Any], releases: Sequence[Release]) -> str:
    setting, sampled = header["setting"], any(r.sampling_rate < 1 for r in releases)
    units = "records" if setting == "record+local" else "clients"
    weight = ", times the client's public weight in the sum" if setting in SUMMED else ""
    if header.get("coefficients") is not None:
        weight += (
            ", in a round; in the run, the L2 norm of what its rounds move in all planned ones"
        )
    coins = f", which {units} were sampled" if sampled else ""
    return "\n".join(
        (
            "## Who is protected, against whom",
            "",
            f"- Privacy unit: {_UNIT[setting]}.",
            f"- Adversary: {_adversary(setting, sampled)}",
            f"- Secret: the client's data, gradients, unnoised norms and counts{coins}, and the "
            "key of the noise.",
            f"- Adjacency: {_ADJACENCY[header['adjacency']].format(weight)}",
        )
    )


def _charged(header: Mapping[str, Any], releases: Sequence[Release], name: str) -> str:
    """Largest sum over a client's releases, those of everybody included.

    Where rounds share noise, each planned round costs every client what the line with most says.
    """
    if header.get("coefficients") is not None:
        most = max((getattr(r, name) for r in releases), default=0.0)
        return show_number(header["horizon"] * most) + " (largest client)"
    sums: dict[int, float] = {}
    for release in releases:
        sums[release.client] = sums.get(release.client, 0.0) + getattr(release, name)
    everybody = sums.pop(ALL_CLIENTS, 0.0)
    return show_number(everybody + max(sums.values(), default=0.0)) + " (largest client)"


def _how(
    header: Mapping[str, Any], reports: Mapping[int, ClientReport], releases: Sequence[Release]
) -> str:
    active = [r for r in reports.values() if r.releases > r.evaluations]
    if not active:
        return ""
    multipliers = [z for r in active for z in r.noise_multipliers]
    rates = [q for r in active for q in r.sampling_rates]
    steps = [r.steps for r in active]
    mechanisms = sorted({m for r in active for m in r.mechanisms})
    whole_run = "" if header.get("coefficients") is None else ", of the whole run"
    return "\n".join(
        (
            "## What was done",
            "",
            f"- {_releases(header, releases, len(active))} in "
            f"{len({r.round for r in releases})} rounds; noised steps a client: "
            f"{_span(steps)}.",
            *_local_training(header),
            f"- Mechanism: {', '.join(mechanisms)}; noise multiplier (noise scale / sensitivity, "
            f"votes included{whole_run}): {_span(multipliers)}; sampling rate: {_span(rates)}.",
            f"- Composition: {_composition(header)}; random numbers: "
            f"{header.get('rng', 'not stated')}; noise form: {header.get('noise_form', 'wide')}.",
            "- Charged on top of the composition, for noise that is not the ideal one: epsilon "
            f"{_charged(header, releases, 'epsilon_inflation')}, delta "
            f"{_charged(header, releases, 'tail_delta')}.",
        )
    )


def _local_training(header: Mapping[str, Any]) -> list[str]:
    """What clients did beyond SGD on the released layers."""
    lines, personal = [], header.get("personal")
    if header.get("client_proximal"):
        lines.append(
            f"- Local steps were drawn back to the global model (FedProx, mu = "
            f"{show_number(float(header['client_proximal']))}), which is public."
        )
    if personal:
        lines.append(
            f"- Personal layers ({', '.join(personal['parameters'])}): in every round each client "
            "fitted them to its own records, from a public start, and sent none of them."
        )
    return lines


def _composition(header: Mapping[str, Any]) -> str:
    if header.get("coefficients") is None:
        return "privacy loss distributions (pessimistic), per client"
    shown = ", ".join(show_number(float(d)) for d in header["coefficients"])
    return (
        f"none: rounds share noise (coefficients {shown}), so each client is charged once, as one "
        f"Gaussian over all {header['horizon']} planned rounds, those after its last one included"
    )


def _releases(header: Mapping[str, Any], releases: Sequence[Release], clients: int) -> str:
    if header["setting"] not in SUMMED:
        return f"{len(releases)} releases of {clients} clients"
    # A sum is one release, though each client that could be in it may have a line.
    sums = len({(r.round, r.binding, r.digest) for r in releases})
    return f"{sums} noised sums, in which {clients} clients could be,"


def _span(values: list[float] | list[int]) -> str:
    low, high = show_number(min(values)), show_number(max(values))
    return low if low == high else f"{low} to {high}"


def _not_covered(header: Mapping[str, Any]) -> str:
    validation = "Validation and test figures are"
    if header.get("evaluation"):
        validation = "Test figures, and validation figures named `sim_only`, are"
    only_here = (
        "- The time that rounds took may depend on records, unless the nodes hold their answers."
        if header.get("nodes")
        else "- Values named `sim_only` and the time that rounds took are private; they exist "
        "because one machine simulates all clients, and must not be published."
    )
    given = "of this one run, its hyperparameters given"
    if header.get("search"):
        given = "of this one run, and above, of the search that chose it"
    return "\n".join(
        (
            "## What is not covered",
            "",
            f"- Epsilon is {given}: other runs on the same data "
            "are not charged, nor is choosing a run, a round to stop at, a checkpoint or a "
            "hyperparameter by figures of private, validation or test data.",
            f"- {validation} computed from their own records without noise; "
            "those records are not protected.",
            only_here,
            *_personal_outputs(header),
            "- Facts that are true of the whole population may be learned; that is the purpose.",
        )
    )


def _personal_outputs(header: Mapping[str, Any]) -> list[str]:
    if not header.get("personal"):
        return []
    return [
        "- A client's personal layers are fitted to its records without noise: whoever is shown "
        "them, or what they predict, is shown something of those records that nothing here covers."
    ]


def _record(ledger: Ledger) -> str:
    copied = (
        " Each client released at a node of its own, whose holder keeps the ledger that counts; "
        "this one is the server's copy of those lines that reached it."
        if ledger.header.get("nodes")
        else ""
    )
    return (
        "## Record\n\n"
        f"Ledger of {len(ledger)} releases, last hash `{ledger.head_hash}`. Check it with "
        "`python -m fl_lightning.ledger verify`, read it with `python -m fl_lightning.ledger show`."
        + copied
    )
