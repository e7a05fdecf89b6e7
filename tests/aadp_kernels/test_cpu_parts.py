"""What kernels call is compiled into them; called from Python it is a kernel of its own."""

from __future__ import annotations

import pytest

_jit = pytest.importorskip("aadp_kernels._cpu._jit")
pytestmark = pytest.mark.skipif(
    not _jit.has("parts of kernels"), reason="this numba keeps its libraries elsewhere"
)


@_jit.jit
def half(x):
    if x < 0:
        raise ValueError("x is below zero")
    return x / 2


@_jit.jit
def quarter(x):
    return half(half(x))


@_jit.jit
def eighth(x):
    return half(quarter(x))


def test_only_what_python_calls_has_machine_code():
    assert eighth(24.0) == 3.0
    assert "kernel" in vars(eighth)
    assert not {"kernel"} & (vars(half).keys() | vars(quarter).keys())
    compiled = [*quarter.overloads.values()]
    # Of an earlier run's machine code for `eighth` nothing is compiled again.
    kept = sum(vars(eighth)["kernel"].stats.cache_hits.values())
    assert len(compiled) == (0 if kept else 1)
    for result in compiled:
        assert result.library.get_pointer_to_function(result.fndesc.llvm_func_name) == 0
    assert quarter(24.0) == 6.0


def test_what_a_part_raises_reaches_the_caller():
    for kernel in (eighth, half):
        with pytest.raises(ValueError, match="x is below zero"):
            kernel(-1.0)
