"""Triton kernels for GPUs. Triton is imported with the first call that runs here."""

from __future__ import annotations

import os
from functools import cache

import torch

# The forms of each operation that exist here; plain torch has the others.
FORMS = {
    "noise": ("wide", "fast", "grid"),
    "privatize": ("wide", "fast", "grid"),
    "clip_sum": ("wide", "fast", "grid"),
    "backward": ("wide",),
    "correlation": ("wide", "fast"),
}

_MIN_CAPABILITY = (8, 0)


def missing(device: torch.device, form: str = "wide") -> str | None:
    """Why nothing can run here on `device`; None if it can. Triton's interpreter runs on a CPU."""
    reason = import_error()
    if reason is not None:
        return f"without the package triton: {reason}"
    if device.type == "cuda":
        if torch.version.hip is not None:
            if form == "fast":
                return "with form='fast' on an AMD device: that form is written in NVIDIA's PTX"
            return None
        capability = torch.cuda.get_device_capability(device)
        if capability < _MIN_CAPABILITY:
            return f"on a device of capability {capability}, below {_MIN_CAPABILITY}"
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"for tensors on {device}"


@cache
def import_error() -> str | None:
    """Why triton cannot be imported; None if it can."""
    try:
        import triton  # noqa: F401
    except (ImportError, OSError) as error:
        return str(error)
    return None
