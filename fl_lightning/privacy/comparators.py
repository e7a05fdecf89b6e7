"""Rules of published methods that AADP-FL is compared with."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Comparator:
    """How a published method differs from AADP-FL; the defaults are AADP-FL's own rules.

    Args:
        clip_function: ``clip`` scales what is longer than C down to C; ``automatic`` scales every
            record's gradient g to C·g/(‖g‖+0.01) (Bu et al., 2022, arXiv:2206.07136), for flat
            clipping in one pass under record+local.
        votes_on: Norm that the votes of ``quantile`` compare: ``l1``, or ``clipped``, the norm that
            is clipped (Andrew et al., 2021).
        history_rule: What ``released`` and ``raw`` take of the norms in the history: their
            ``mean``, ``median``, or exponential moving average ``ema`` of the same age.
        history_cosine: Whether that norm is multiplied by (1 + cos)/2, cos being the cosine between
            the last two released updates of the layer.
        nominal_sensitivity: Under ``abstract``, what the noise of a client with n records is scaled
            to: the ``update``'s own 2C, or 2C/n as if it were the mean of n clipped records
            (``records``; Wei et al., 2020, arXiv:1911.00222), which it is not after local training.

    Raises:
        ValueError: if a value is none of those.
    """

    clip_function: Literal["clip", "automatic"] = "clip"
    votes_on: Literal["l1", "clipped"] = "l1"
    history_rule: Literal["mean", "median", "ema"] = "mean"
    history_cosine: bool = False
    nominal_sensitivity: Literal["update", "records"] = "update"

    def __post_init__(self) -> None:
        check_choices(self)


def check_choices(options: Any) -> None:
    """Whether every field of a dataclass that has a list of choices holds one of them.

    Raises:
        ValueError: naming field, value and choices.
    """
    for name, choices in _choices(type(options)).items():
        value = getattr(options, name)
        if value not in choices:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")


@functools.cache
def _choices(kind: type) -> dict[str, tuple[str, ...]]:
    """The choices of each field that has a list of them; text of annotations takes long to read."""
    hints = get_type_hints(kind)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def check_comparator(
    comparator: Comparator, *, setting: str, clipping: str, noise_form: str, thresholds: str
) -> None:
    """Whether a published rule fits the configuration it stands in.

    Args:
        comparator: the rules.
        setting: of the run, as clipping, noise_form and thresholds are.
        clipping: what is scaled down together.
        noise_form: how noise is computed.
        thresholds: the rule that is used, not "default".

    Raises:
        ValueError: naming what contradicts what.
    """
    if comparator.clip_function == "automatic":
        if setting != "record+local" or clipping != "flat":
            raise ValueError(
                f"clip_function='automatic' with setting='{setting}' and clipping='{clipping}': "
                "only setting='record+local' with clipping='flat' has it"
            )
        if noise_form == "grid" or thresholds == "quantile":
            raise ValueError(
                f"clip_function='automatic' with noise_form='{noise_form}' and thresholds="
                f"'{thresholds}': use noise_form 'wide' or 'fast' and thresholds 'fixed' or "
                "'released'"
            )
    if clipping == "joint" and comparator.votes_on == "clipped":
        raise ValueError(
            "votes_on='clipped' with clipping='joint': all layers would vote alike; use 'l1'"
        )
    if comparator.votes_on != "l1" and setting not in ("record+local", "none"):
        raise ValueError(
            f"votes_on='{comparator.votes_on}' with setting='{setting}': only 'record+local' can "
            "vote on it"
        )
    if comparator.nominal_sensitivity != "update" and setting != "abstract":
        raise ValueError(
            f"nominal_sensitivity='{comparator.nominal_sensitivity}' with setting='{setting}' "
            "would add too little noise: only setting='abstract' may"
        )
    if comparator.history_cosine and thresholds not in ("released", "raw"):
        raise ValueError(
            f"history_cosine=true with thresholds='{thresholds}': only 'released' and 'raw' look "
            "at updates"
        )
