"""Mistakes in which kernels a run takes."""

from __future__ import annotations

from tests.mutation.mutations import group

_WITHOUT = "tests/aadp_kernels/test_without_compiling.py"
_PLAN = "tests/fl_lightning/test_kernel_choice.py"

DISPATCH = group(
    "aadp_kernels/_dispatch.py",
    _WITHOUT,
    ("an inner choice ends an outer one", "_COMPILING.set(_COMPILING.get() and not really)", "_COMPILING.set(not really)"),
    ("plain torch for good", "        _COMPILING.reset(before)", "        pass"),
    ("compiled parts of backward all the same", "        and _COMPILING.get()\n    ):", "    ):"),
)  # fmt: skip

PLAN = group(
    "fl_lightning/kernel_choice.py",
    _PLAN,
    ("the first round decides", "releases = rounds * ", "releases = "),
    ("all clients every round", "rules.cohort_size(clients)", "clients"),
    ("local steps draw once", " * rules.steps_a_release", ""),
    ("tensors are free", " + _NUMBERS_A_TENSOR * len(layout.names)", ""),
    ("records are free", 'if rules.privacy.unit == "record":', "if False:"),
    ("always compiled", "return without_compiling(not ", "return without_compiling(False and not "),
)  # fmt: skip

MUTATIONS = [*DISPATCH, *PLAN]
