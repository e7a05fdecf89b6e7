"""Mistakes in which kernels a run takes."""

from __future__ import annotations

from tests.mutation.mutations import group

_LATE = "tests/aadp_kernels/test_late.py"
_PLAN = "tests/fl_lightning/test_kernel_choice.py"

LATE = group(
    "aadp_kernels/_late.py",
    _LATE,
    ("an inner choice ends an outer one", '"never" if _WHEN.get() == "never" else when', "when"),
    ("the choice for good", "        _WHEN.reset(before)", "        pass"),
    ("numba at the first call", "_drawn[what] > PATIENCE or", "True or"),
    ("numba never", "_drawn[what] > PATIENCE or at_hand()", "False"),
    ("the cache is not looked at", " or at_hand():", ":"),
    ("all operations count together", "_drawn.get(what, 0) +", "sum(_drawn.values()) +"),
    ("the fast form waits too", '"privatize": ("wide", "grid")', '"privatize": ("wide", "grid", "fast")'),
    ("one client's work", "rows = 1 if clients is None else len(clients)", "rows = 1"),
    ("the grid is cheap", 'A_GRID_NUMBER if form == "grid" else 1', "1"),
    ("noise of earlier steps is free", "layout.elements * (1 + len(again))", "layout.elements"),
    ("tensors are free", " + NUMBERS_A_TENSOR * len(layout.names)", ""),
)  # fmt: skip

DISPATCH = group(
    "aadp_kernels/_dispatch.py",
    _LATE,
    ("compiled parts of backward all the same", "        and not _late.never()\n    ):", "    ):"),
    ("who asks for numba waits too", 'if impl == "auto" and device.type', "if device.type"),
)  # fmt: skip

ORDER = group(
    "aadp_kernels/_torch/ordered_sums.py",
    "tests/aadp_kernels/test_ordered_sums.py",
    ("a sum in any order", "cumsum(1)[:, -1]\n        total", "sum(1)\n        total"),
    ("units of a tensor, not of a layer", "unit = (first + start) // SUM_UNIT", "unit = start // SUM_UNIT"),
    ("blocks added from the right", "return (a + b) + (c + d)", "return a + (b + (c + d))"),
    ("units from the last to the first", "in units.values():", "in reversed(units.values()):"),
)  # fmt: skip

PLAN = group(
    "fl_lightning/kernel_choice.py",
    _PLAN,
    ("the first round decides", "releases = rounds * ", "releases = "),
    ("all clients every round", "rules.cohort_size(clients)", "clients"),
    ("local steps draw once", " * rules.steps_a_release", ""),
    ("tensors are free", " + _NUMBERS_A_TENSOR * len(layout.names)", ""),
    ("records are free", 'if rules.privacy.unit == "record":', "if False:"),
    ("always compiled", '"now" if worth else "never"', '"now"'),
)  # fmt: skip

MUTATIONS = [*LATE, *DISPATCH, *ORDER, *PLAN]
