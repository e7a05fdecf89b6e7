"""What a PrivateOptimizer adds to the state of its optimizer: public facts, no key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aadp_kernels.layout import Layout

ENTRY = "privacy"
_MUST_AGREE = ("layers", "mechanism", "noise_multiplier", "p", "cyclic")


def layers_of(layout: Layout) -> dict[str, int]:
    """Number of elements of each layer by its name."""
    return dict(zip(layout.layer_names, layout.dims, strict=True))


def check_state(state: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """The public facts in a state, if its steps may be continued here.

    Other clip norms or another divisor may follow: a noise multiplier is relative to them.

    Raises:
        ValueError: The state is that of a plain optimizer, or of other layers, another mechanism
            or noise multiplier; names both values.
    """
    facts = state.get(ENTRY)
    if facts is None:
        raise ValueError(
            "the state is that of a plain optimizer: load it into PrivateOptimizer.optimizer"
        )
    for name in _MUST_AGREE:
        # States of earlier versions have no "cyclic": their noise was independent.
        if facts.get(name) != own[name]:
            raise ValueError(f"the state has {name} {facts.get(name)}, this optimizer {own[name]}")
    if own["steps_taken"] and facts["run"] != own["run"]:
        raise ValueError(
            f"this optimizer has taken {own['steps_taken']} steps of its own; a state of another "
            "run must be loaded before the first step"
        )
    return facts
