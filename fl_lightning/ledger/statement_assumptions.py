"""The part of the statement on what is assumed: each line only where it is needed and true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fl_lightning.ledger.client_reports import show_number
from fl_lightning.privacy.config import SUMMED
from fl_lightning.values.release import Release

# Generators of older versions whose words were never meant to withstand anybody who tries.
NO_BASIS = ("philox7",)
_PHILOX = (
    " (made for speed, with a key of 64 bits; it passes statistical tests, but nobody has analysed "
    "it as a cipher)"
)


def assumptions(header: Mapping[str, Any], releases: Sequence[Release]) -> str:
    """Markdown of the section.

    Args:
        header, releases: of the ledger of a run with a guarantee.
    """
    sampled = any(r.sampling_rate < 1 for r in releases)
    lines = [
        _arithmetic(header),
        _generator(header),
        f"- Key: {_key(header)}.",
        _public(header),
        _data_free(header, releases),
        _one_at_a_time(header),
        _side_channels(header, sampled),
    ]
    if header["setting"] == "record+local":
        lines.append(
            "- Exact gradients: one record's gradient does not depend on the records beside it, "
            "not even in its last bits."
        )
    if sampled:
        lines.append(
            "- Poisson sampling: nobody learns which records took part in a step."
            if header["setting"] == "record+local"
            else "- Poisson sampling: nobody but the trusted server learns which clients took part "
            "in a round."
        )
    if header["setting"] == "client+secure_sum":
        lines.append(
            f"- Secure aggregation: only sums are seen, and at least {header['min_survivors']} "
            "clients of every round are honest and stay; their shares alone are the whole noise. "
            + _protocol(header)
        )
    if header["setting"] in SUMMED:
        lines.append("- Which clients fail in a round does not depend on their data.")
    if header.get("coefficients") is not None:
        lines.append(
            f"- Which rounds each client takes part in was fixed before the run, and there are no "
            f"more than the {header['horizon']} planned rounds: epsilon covers what later rounds "
            "show of earlier ones up to there."
        )
    if header.get("tail_cutoff") is not None and header.get("noise_form") != "grid":
        lines.append(
            f"- The sampler's largest draw is {show_number(float(header['tail_cutoff']))} noise "
            "scales; its cut tails are charged."
        )
    return "\n".join(["## Assumptions", "", *(line for line in lines if line)])


def _protocol(header: Mapping[str, Any]) -> str:
    """What shows sums only."""
    if header.get("nodes") is None and header.get("member") is None:
        return "Here the protocol itself is simulated."
    return (
        "The nodes mask what they send (docs/secure_sum.md). That holds if the identities that "
        "holders list are those of different organisations, and no more of them than every holder "
        "fears work with the server."
    )


def _arithmetic(header: Mapping[str, Any]) -> str:
    """What is proven of the numbers that a computer has in the place of real ones."""
    form = header.get("noise_form", "wide")
    if form == "grid":
        return (
            "- Floating point: noise form `grid`. What is released is a public multiple of whole "
            "numbers: every contribution is clipped and cut to whole numbers, which are summed and "
            "noised exactly. The guarantee is of the numbers as the computer has them; how far the "
            "sampler's probabilities are off is charged."
        )
    return (
        f"- Real arithmetic: noise form `{form}`; rounding in floating point is not part of the "
        "proof"
        + (f" ({header['arithmetic']})" if header.get("arithmetic") else "")
        + "; only the form `grid` is proven in floating point."
    )


def _generator(header: Mapping[str, Any]) -> str:
    """That the noise is random to everybody without the key."""
    rng = header.get("rng")
    if rng is None:
        return (
            "- Generator (computational): without the key nobody can tell the generator's words "
            "from uniform ones; the ledger does not state which generator it was."
        )
    if rng in NO_BASIS:
        return (
            f"- Generator: `{rng}` is no basis for a claim; that its words cannot be told from "
            "uniform ones does not hold here."
        )
    return (
        f"- Generator (computational): without the key nobody can tell the words of `{rng}`"
        f"{_PHILOX if rng.startswith('philox') else ''} from uniform ones."
    )


def _key(header: Mapping[str, Any]) -> str:
    if header["simulated"] and "public seed" in (header.get("simulated_because") or "public seed"):
        return "a PUBLIC seed was used: this assumption does not hold here"
    return "the operating system's randomness is unpredictable, and the run's key stays secret"


def _public(header: Mapping[str, Any]) -> str:
    """What both neighbours share."""
    facts = ["the number of clients", "how many records each has", "the classes"]
    facts += ["the weights of clients", "their epsilons and deltas", "the schedule of rounds"]
    return (
        f"- Public, and the same for both neighbours: {', '.join(facts)}. In a simulation that "
        "divides one data set, so is how it was divided, by labels included."
    )


def _data_free(header: Mapping[str, Any], releases: Sequence[Release]) -> str:
    later = "" if header.get("thresholds") == "fixed" else "first "
    norms = f"the {later}clip norms" if releases else "the clip norms"
    return (
        f"- Without the private data were chosen: the initial network, {norms}, and all settings "
        "of the run."
    )


def _one_at_a_time(header: Mapping[str, Any]) -> str:
    """That no unit's data stands in another unit's input."""
    if header["setting"] == "record+local":
        checked = " (compared on a few records before the run)"
        return (
            "- Transforms make each input from one record alone: no mean, scale or vocabulary "
            f"comes from private records{checked if header.get('transform_checked') else ''}."
        )
    return (
        "- Transforms make a client's inputs from its own records alone: no mean, scale or "
        "vocabulary comes from private records of several clients."
    )


def _side_channels(header: Mapping[str, Any], sampled: bool) -> str:
    leak = "how long a round takes"
    if sampled:
        leak += " (longer, when more takes part)"
    return f"- Side channels are not observed: {leak}, memory use, and the like."
