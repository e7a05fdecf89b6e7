"""Whether the noise of a run can protect anybody, or is only simulated; said in one place for all.

Every output that names epsilon calls a simulated run so, and says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fl_lightning.privacy.config import PrivacyConfig

# Their words can be told from random ones, or were never meant to withstand anybody who tries.
NO_BASIS = ("philox7",)


class SimulatedWarning(UserWarning):
    """The generator of the noise is no basis for a claim of privacy."""


def simulated_because(privacy: PrivacyConfig) -> str | None:
    """Why the noise of a run protects nobody, in a few words; None: it can protect, or is none."""
    if not privacy.private:
        return None
    reasons = ["public seed"] if privacy.seed is not None else []
    reasons += [f"generator {privacy.rng}"] if privacy.rng in NO_BASIS else []
    return ", ".join(reasons) or None


def simulated_reason(header: Mapping[str, Any]) -> str | None:
    """Why the run of a ledger's header is simulated; None: it is not."""
    if not header["simulated"]:
        return None
    return header.get("simulated_because") or "public seed"


def warn_of_generator(rng: str) -> None:
    """Warn, before a run, of a generator that is no basis for a claim."""
    if rng in NO_BASIS:
        warnings.warn(
            f"rng={rng!r} is no basis for a claim of privacy: it has 7 rounds of a function that "
            "was made for speed, not as a cipher, so this run is called simulated; use 'chacha20'",
            SimulatedWarning,
            stacklevel=2,
        )
