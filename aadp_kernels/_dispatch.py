"""Which back end runs a call. It is chosen here and nowhere else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from aadp_kernels import _late, _validate
from aadp_kernels.contract import HostBackend, RecordKernels

IMPLS = ("auto", "torch", "numba", "triton")
AUTO_ELEMENTS = 64
_LARGE = 1 << 20

_PACKAGES = {"torch": "_torch", "numba": "_cpu", "triton": "_triton"}
_FASTEST = {"cpu": "numba", "cuda": "triton"}
# Whose noise is as much as what it is added to, so that its arithmetic sets the time.
_NOISE_BOUND = ("noise", "privatize")
_CPU = torch.device("cpu")


@cache
def package(impl: str) -> ModuleType | None:
    """The package of a back end; importing it imports neither numba nor triton."""
    name = f"aadp_kernels.{_PACKAGES[impl]}"
    return import_module(name) if find_spec(name) else None


def unavailable(impl: str, operation: str, form: str, device: torch.device) -> str | None:
    """Why a back end cannot run an operation; None if it can."""
    found = package(impl)
    if found is None:
        return f"without aadp_kernels.{_PACKAGES[impl]}"
    if form not in found.FORMS.get(operation, ()):
        return f"for {operation} with form={form!r}"
    return found.missing(device, form)


def choose(
    impl: str,
    operation: str,
    *,
    device: torch.device,
    elements: int,
    form: str = "wide",
    correlated: bool = False,
) -> str:
    """Name of the back end; `elements` counts one row, so that a cohort changes nothing.

    It must have the operation and, for a `Correlation`, be able to draw noise again.

    Only the wide form has the same bits in torch and numba, so only there may a small call leave
    numba: an element must not depend on the size of the call.

    Raises:
        ValueError: An unknown `impl`; one that cannot run here or lacks the form.
    """
    _validate.one_of("impl", impl, IMPLS)
    if impl == "auto":
        impl = _fastest(device)
        if impl == "numba" and elements < AUTO_ELEMENTS and form != "fast":
            return "torch"
        return impl if _reason(impl, operation, form, device, correlated) is None else "torch"
    if impl == "numba" and (operation, form) in _left_to_torch():
        return "torch"
    reason = _reason(impl, operation, form, device, correlated)
    if reason is not None:
        raise ValueError(f"impl must not be {impl!r} {reason}")
    return impl


def _fastest(device: torch.device) -> str:
    """The back end to try first. No kernel has run on an AMD device: Triton must be asked for."""
    if device.type == "cuda" and torch.version.hip is not None:
        return "torch"
    return _FASTEST.get(device.type, "torch")


def _reason(
    impl: str, operation: str, form: str, device: torch.device, correlated: bool
) -> str | None:
    """`unavailable` for everything that is asked of a call."""
    needed = (operation, "correlation") if correlated else (operation,)
    return next(filter(None, (unavailable(impl, each, form, device) for each in needed)), None)


@cache
def _left_to_torch() -> set[tuple[str, str]]:
    found = package("numba")
    return set() if found is None else found.LEFT_TO_TORCH


def backend(
    impl: str,
    operation: str,
    *,
    device: torch.device,
    elements: int,
    form: str = "wide",
    correlated: bool = False,
    numbers: int = _LARGE,
) -> HostBackend:
    """The chosen back end; numba or triton is imported here.

    `numbers` is what the whole call draws or reads, see `_late.waits`. A back end on an accelerator
    has `coins` and `layer_norms` only where its `FORMS` say so, and is not chosen for them
    otherwise.
    """
    if impl not in IMPLS:
        _validate.one_of("impl", impl, IMPLS)
    small = elements < AUTO_ELEMENTS
    if impl == "auto" and device.type == "cpu" and not small:
        small = _late.waits(operation, form, numbers, partial(_at_hand, operation, form))
    return _backend(impl, operation, device, form, small, correlated)


def _at_hand(operation: str, form: str) -> bool:
    """Whether numba has the compiled code of an operation, or will never have any."""
    if unavailable("numba", operation, form, _CPU) is not None:
        return True
    return import_module("aadp_kernels._cpu.at_hand").at_hand(operation, form)


@cache
def _backend(
    impl: str, operation: str, device: torch.device, form: str, small: bool, correlated: bool
) -> HostBackend:
    """`backend`, found once for all calls of a kind, with a warning where it is slow."""
    elements = 0 if small else AUTO_ELEMENTS
    name = choose(
        impl, operation, device=device, elements=elements, form=form, correlated=correlated
    )
    if name == "triton" and operation in _NOISE_BOUND:
        note = import_module("aadp_kernels._triton.float64").note(device, form)
        if note is not None:
            warnings.warn(note, UserWarning, stacklevel=5)
    return cast(HostBackend, import_module(f"aadp_kernels.{_PACKAGES[name]}.backend"))


def record_kernels(x: Tensor) -> RecordKernels | None:
    """The compiled parts of clip-in-backward for a plain tensor on a CPU; never in a trace."""
    if (
        type(x) is Tensor
        and x.dtype in (torch.float32, torch.float64)
        and x.is_cpu
        and not torch.compiler.is_compiling()  # first: a trace cannot look at a context
        and not _late.never()
    ):
        return _record_kernels()
    return None


@cache
def _record_kernels() -> RecordKernels | None:
    if choose("auto", "backward", device=_CPU, elements=_LARGE) != "numba":
        return None
    return cast(RecordKernels, import_module("aadp_kernels._cpu.records"))


def product_norms(x: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """A kernel for norms of products that are not written, float32 on an accelerator, or None."""
    if x.device.type == "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return None
    if choose("auto", "backward", device=x.device, elements=_LARGE) != "triton":
        return None
    module: Any = import_module("aadp_kernels._triton.product_norms")
    return module.product_norms
