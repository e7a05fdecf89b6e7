"""Every back end has the functions of the contract, by name and by argument."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import FunctionType

import pytest

from aadp_kernels.contract import Backend, HostBackend, RecordKernels

PACKAGES = {"_torch": (), "_cpu": ("numba",), "_triton": ("triton",)}


def functions(*protocols: type) -> dict[str, list[str]]:
    """Arguments of the functions that protocols ask for."""
    return {
        name: list(inspect.signature(value).parameters)[1:]
        for protocol in protocols
        for name, value in vars(protocol).items()
        if isinstance(value, FunctionType) and not name.startswith("_")
    }


def check(module: str, wanted: dict[str, list[str]]) -> None:
    found = import_module(module)
    for name, arguments in wanted.items():
        own = list(inspect.signature(getattr(found, name)).parameters)
        assert len(own) == len(arguments), f"{module}.{name}{own}"
        # The noise of a function may have a name of its own where a module is called so.
        assert [a for a in own if a != "source"] == [
            a for a, b in zip(arguments, own, strict=True) if b != "source"
        ]
    assert set(found.__all__) == set(wanted)


@pytest.mark.parametrize("package", PACKAGES)
def test_back_ends_have_what_the_contract_asks_for(package: str) -> None:
    for needed in PACKAGES[package]:
        pytest.importorskip(needed)
    host = () if package == "_triton" else (HostBackend,)
    check(f"aadp_kernels.{package}.backend", functions(Backend, *host))


def test_numba_has_the_parts_of_clip_in_backward() -> None:
    pytest.importorskip("numba")
    check("aadp_kernels._cpu.records", functions(RecordKernels))


@pytest.mark.parametrize("package", PACKAGES)
def test_forms_name_operations_and_forms(package: str) -> None:
    found = import_module(f"aadp_kernels.{package}")
    operations = {"noise", "coins", "correlation", "privatize", "norms", "clip_sum", "backward"}
    assert set(found.FORMS) <= operations
    assert {form for forms in found.FORMS.values() for form in forms} <= {"wide", "fast", "grid"}
