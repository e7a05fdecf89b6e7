"""Whether an operation is compiled, in this process or on disk: no call of it waits then."""

from __future__ import annotations

from aadp_kernels._cpu import clip, grid_release, noise, sum_and_write
from aadp_kernels._cpu._jit import is_compiled

# Kernels that Python calls, of one thread or of several.
_KERNELS = {
    ("privatize", "wide"): (clip._privatize, clip._privatize_rows),
    ("privatize", "grid"): (grid_release.write_units,),
    ("noise", "wide"): (sum_and_write.write_part, sum_and_write._write_parallel),
    ("noise", "grid"): (grid_release.integer_units,),
    ("norms", "wide"): (sum_and_write.sum_part, sum_and_write._sum_parallel),
    ("coins", "wide"): (noise.flip_coins,),
}


def at_hand(operation: str, form: str) -> bool:
    """Whether one of the kernels of an operation of `SAME_BITS` is there."""
    return any(map(is_compiled, _KERNELS[operation, form]))
