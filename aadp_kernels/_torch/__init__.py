"""Plain-torch implementations: the specification that every faster implementation must meet."""

from __future__ import annotations

import torch

FORMS = {
    "noise": ("wide", "fast", "grid"),
    "coins": ("wide",),
    "correlation": ("wide", "fast"),
    "privatize": ("wide", "fast", "grid"),
    "norms": ("wide",),
    "clip_sum": ("wide", "fast", "grid"),
}


def missing(device: torch.device, form: str = "wide") -> None:
    """It runs everywhere."""
