"""Compiles kernels without a device: whatever a launch would compile, and into the same cache.

An operation is called on a few numbers on the CPU, in a process of its own, with a launch that asks
Triton for the kernel and runs nothing. So arguments and constants are those of a call on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from aadp_kernels import _triton
from aadp_kernels._triton.cases import Case
from aadp_kernels.addresses import key_words_needed
from aadp_kernels.contract import Bounds, DrawnAgain, Noise
from aadp_kernels.layout import Layout

_SIZE = 4096
_RECORDS, _POSITIONS = 2, 64


class _Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def compile_case(case: Case, target: tuple[str, int | str, int]) -> None:
    """Compile the kernel of a case for (back end, architecture, threads of a warp).

    It changes which driver Triton has: call it in a process of its own.
    """
    goal = GPUTarget(*target)
    driver.set_active(_Driver(goal))  # pyright: ignore[reportArgumentType]
    for kernel, arguments, constants in requested(case):
        if goal.backend == "hip":
            constants.pop("maxnreg", None)
        if "LANES" in constants:
            constants["LANES"] = goal.warp_size * constants["num_warps"]
        kernel.warmup(*arguments, grid=(1,), **constants)


def requested(case: Case) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(kernel, arguments, constants) of the launches of a case's kernel; nothing runs.

    Raises:
        RuntimeError: The operation does not launch the kernel.
    """
    found = []

    def launch(
        kernel: Any, _: tuple[int, ...], __: torch.device, /, *arguments: Any, **constants: Any
    ) -> None:
        if kernel.__name__ == case.kernel:
            found.append((kernel, arguments, constants))

    with _launching(launch):
        _OPERATIONS[case.kernel](case)
    if not found:
        raise RuntimeError(f"{case} launches no {case.kernel}")
    return found


@contextmanager
def _launching(launch: Callable[..., None]) -> Iterator[None]:
    """Another launch in every file that launches, for a while."""
    names = [f"{_triton.__name__}.{found.name}" for found in iter_modules(_triton.__path__)]
    modules: list[Any] = [m for m in map(import_module, names) if hasattr(m, "launch")]
    before = [module.launch for module in modules]
    for module in modules:
        module.launch = launch
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.launch = own


def _noise(case: Case) -> Noise | None:
    if not case.mechanism:
        return None
    words, clients = [0] * key_words_needed(case.rng), torch.zeros(1, dtype=torch.int64)
    if case.mechanism == "correlated":
        again = (DrawnAgain(1.0, words, 0),)
        return Noise(case.rng, words, "gaussian", case.form, 1, clients, again)
    return Noise(case.rng, words, case.mechanism, case.form, 0, clients)


def _bounds(case: Case) -> Bounds:
    one = torch.ones(1, dtype=torch.float64)
    return Bounds(one, case.p, one if case.votes else None)


def _tensors(case: Case, *lead: int) -> list[torch.Tensor]:
    return [torch.zeros(*lead, _SIZE, dtype=getattr(torch, case.dtype))]


def _privatize(case: Case) -> None:
    module: Any = import_module("aadp_kernels._triton.privatize")
    tensors = _tensors(case)
    module.privatize(
        tensors, tensors, Layout.build(tensors), bounds=_bounds(case), scale=_bounds(case).clip,
        noise=_noise(case), reference=_tensors(case) if case.reference else None,
    )  # fmt: skip


def _noise_alone(case: Case) -> None:
    module: Any = import_module("aadp_kernels._triton.backend")
    noise = _noise(case)
    assert noise is not None
    module.scaled_noise(noise, (0, 0, _SIZE), 1.0, getattr(torch, case.dtype))


def _clip_sum(case: Case) -> None:
    module: Any = import_module("aadp_kernels._triton.clip_sum")
    records = _tensors(case, _RECORDS)
    grid, layout = case.form == "grid", Layout.build(_tensors(case))
    before: Sequence[torch.Tensor] | None = None
    if case.sums not in ("all", "first"):
        before = [torch.zeros(_SIZE, dtype=torch.int64 if grid else torch.float64)]
    shared = {
        "bounds": _bounds(case), "mask": torch.ones(_RECORDS, dtype=torch.bool), "weights": None,
        "sums": before,
    }  # fmt: skip
    if grid or case.sums in ("first", "middle"):
        quanta = _bounds(case).clip if grid else None
        module.clip_sum(records, layout, quanta=quanta, **shared)
    else:
        module.clip_sum_noise(
            records, layout, scale=_bounds(case).clip, noise=_noise(case), **shared
        )


def _products(case: Case) -> None:
    module: Any = import_module("aadp_kernels._triton.product_norms")
    rows, columns = case.shape
    dtype = getattr(torch, case.dtype)
    module.product_norms(
        torch.zeros(_RECORDS, _POSITIONS, columns, dtype=dtype),
        torch.zeros(_RECORDS, _POSITIONS, rows, dtype=dtype),
    )


_OPERATIONS = {
    "privatize_kernel": _privatize,
    "noise_kernel": _noise_alone,
    "grid_kernel": _noise_alone,
    "norm_pieces": _clip_sum,
    "sum_tiles": _clip_sum,
    "linear_tiles": _products,
    "sum_slots": _products,
}
