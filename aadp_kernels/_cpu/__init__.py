"""The fast path on a CPU, in numba: the noise of `_torch`, about ten times as fast.

Numba is imported with the first call that pays, never with the package; where it is
missing everything runs on `_torch`. Each kernel calls only kernels of its own file, since numba's
cache on disk notices changes of that file alone.
"""

from __future__ import annotations

from functools import cache

import torch

from aadp_kernels import _validate

IMPLS = ("auto", "torch", "numba")
AUTO_ELEMENTS = 64


@cache
def missing() -> str | None:
    """Why numba cannot be used; None if it can."""
    try:
        import numba  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: its LLVM library does not load
        return str(error)
    return None


def use_numba(impl: str, device: torch.device, elements: int, mechanism: str = "laplace") -> bool:
    """Whether a call runs in numba; `elements` counts one row, so that a cohort changes nothing.

    A Gaussian goes to numba whatever its size: torch's square root may round differently, and an
    element must not depend on the size of the call.

    Raises:
        ValueError: An unknown `impl`; "numba" on an accelerator or where numba is missing.
    """
    _validate.one_of("impl", impl, IMPLS)
    if impl == "torch":
        return False
    if impl == "auto":
        if device.type != "cpu" or torch.compiler.is_compiling():
            return False
        return (elements >= AUTO_ELEMENTS or mechanism == "gaussian") and missing() is None
    if device.type != "cpu":
        raise ValueError(f"impl must not be 'numba' for tensors on {device}")
    reason = missing()
    if reason is not None:
        raise ValueError(f"impl must not be 'numba' without the package numba: {reason}")
    return True
