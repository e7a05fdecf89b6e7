"""Whether the noise of a run can protect anybody, or is only simulated; said in one place for all.

Every output that names epsilon calls a simulated run so, and says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fl_lightning.privacy.config import PrivacyConfig


def simulated_because(privacy: PrivacyConfig) -> str | None:
    """Why the noise of a run protects nobody, in a few words; None: it can protect, or is none."""
    if not privacy.private:
        return None
    return "public seed" if privacy.seed is not None else None


def simulated_reason(header: Mapping[str, Any]) -> str | None:
    """Why the run of a ledger's header is simulated; None: it is not."""
    if not header["simulated"]:
        return None
    return header.get("simulated_because") or "public seed"
