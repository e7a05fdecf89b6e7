"""Plain-torch implementations: the specification that every faster implementation must meet."""

from __future__ import annotations

import torch

FORMS = {
    "noise": ("wide", "fast"),
    "coins": ("wide",),
    "privatize": ("wide", "fast"),
    "clip_sum": ("wide", "fast"),
}


def missing(device: torch.device) -> None:
    """It runs everywhere."""
