"""Which implementation runs a call. It is chosen here and nowhere else."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from aadp_kernels import _validate

IMPLS = ("auto", "torch", "numba", "triton")
AUTO_ELEMENTS = 64

_PACKAGES = {"torch": "_torch", "numba": "_cpu", "triton": "_triton"}
_FASTEST = {"cpu": "numba", "cuda": "triton"}
# Modules of operations that have no module of their own.
_MODULES = {"coins": "noise", "norms": "privatize"}


@cache
def package(impl: str) -> ModuleType | None:
    """The package of an implementation; importing it imports neither numba nor triton."""
    name = f"aadp_kernels.{_PACKAGES[impl]}"
    return import_module(name) if find_spec(name) else None


def unavailable(impl: str, operation: str, form: str, device: torch.device) -> str | None:
    """Why an implementation cannot run an operation; None if it can.

    A package names in `FORMS` the forms that it has of each operation, and says in
    `missing(device)` why it cannot run there.
    """
    found = package(impl)
    if found is None:
        return f"without aadp_kernels.{_PACKAGES[impl]}"
    forms = getattr(found, "FORMS", {})
    if form not in forms.get(operation, ()):
        return f"for {operation} with form={form!r}"
    return found.missing(device)


def choose(
    impl: str, operation: str, *, device: torch.device, elements: int, form: str = "wide"
) -> str:
    """Name of the implementation; `elements` counts one row, so that a cohort changes nothing.

    Only the wide form has the same bits in torch and numba, so only there may a small call leave
    numba: an element must not depend on the size of the call.

    Raises:
        ValueError: An unknown `impl`; one that cannot run here or lacks the form.
    """
    _validate.one_of("impl", impl, IMPLS)
    if impl == "auto":
        impl = _FASTEST.get(device.type, "torch")
        if impl == "numba" and elements < AUTO_ELEMENTS and form != "fast":
            return "torch"
        return impl if unavailable(impl, operation, form, device) is None else "torch"
    reason = unavailable(impl, operation, form, device)
    if reason is not None:
        raise ValueError(f"impl must not be {impl!r} {reason}")
    return impl


def backend(
    impl: str, operation: str, *, device: torch.device, elements: int, form: str = "wide"
) -> ModuleType:
    """The module of the chosen implementation; numba or triton is imported here."""
    if impl not in IMPLS:
        _validate.one_of("impl", impl, IMPLS)
    return _backend(impl, operation, device, form, elements < AUTO_ELEMENTS)


@cache
def _backend(impl: str, operation: str, device: torch.device, form: str, small: bool) -> ModuleType:
    """`backend`, found once for all calls of a kind."""
    elements = 0 if small else AUTO_ELEMENTS
    name = choose(impl, operation, device=device, elements=elements, form=form)
    grid = form == "grid" and operation == "noise"
    module = "grid" if grid else _MODULES.get(operation, operation)
    return import_module(f"aadp_kernels.{_PACKAGES[name]}.{module}")
