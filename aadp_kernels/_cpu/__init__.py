"""The fast path on a CPU, in numba: the noise of the specification, tens of times as fast.

Numba is imported with the first call that pays, never with the package; where it is missing
everything runs in plain torch.
"""

from __future__ import annotations

from functools import cache

import torch

# The forms of each operation that exist here.
FORMS = {
    "noise": ("wide", "fast", "grid"),
    "coins": ("wide",),
    "correlation": ("wide", "fast"),
    "privatize": ("wide", "fast", "grid"),
    "norms": ("wide",),
    "clip_sum": ("wide", "fast"),
    "backward": ("wide",),
}
# What plain torch does in the place of this back end, also where a caller asks for numba: sums of
# integers, whose noise is drawn here.
LEFT_TO_TORCH = {("clip_sum", "grid")}


def missing(device: torch.device, form: str = "wide") -> str | None:
    """Why nothing can run here on `device`; None if it can."""
    if device.type != "cpu":
        return f"for tensors on {device}"
    reason = _import_error()
    return None if reason is None else f"without the package numba: {reason}"


@cache
def _import_error() -> str | None:
    """Why numba cannot be imported; None if it can."""
    try:
        import numba  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: its LLVM library does not load
        return str(error)
    from aadp_kernels._cpu import _fence

    return None if _fence.has("addresses") else f"it has no {_fence.missing_name('addresses')}"
