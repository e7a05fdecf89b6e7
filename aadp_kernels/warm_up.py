"""Compile the Triton kernels before they are needed, by many processes, into Triton's cache.

    python -m aadp_kernels.warm_up                       for the GPU of this machine
    python -m aadp_kernels.warm_up --form fast --rng philox10 --dtype float32 bfloat16
    python -m aadp_kernels.warm_up --target cuda:90      where that GPU is not, for a copied cache

A kernel takes seconds to compile, and the first call that needs it waits. Which kernels there are
depends on dtypes, forms, generators and mechanisms, not on a model; norms of products alone depend
on the layers' sizes as well. The cache is where Triton has it: `TRITON_CACHE_DIR`, or a folder of
the home directory.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import NamedTuple

import torch

from aadp_kernels import _triton, _validate
from aadp_kernels._triton.cases import Case, Needs, cases
from aadp_kernels.addresses import RNGS
from aadp_kernels.layout import Layout

Target = tuple[str, int | str, int]  # back end, architecture, threads of a warp
_FORMS = ("wide", "fast", "grid")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_SUMS = ("all", "first", "middle", "last")
_KINDS = {
    "laplace": ("laplace", 1), "gaussian": ("gaussian", 2), "gaussian-l1": ("gaussian", 1),
    "correlated": ("correlated", 2),
}  # fmt: skip


class Outcome(NamedTuple):
    """A kernel that was compiled, or found in the cache, or why not.

    Attributes:
        case: The kernel.
        seconds: That it took.
        error: Why it was not compiled, or None.
    """

    case: Case
    seconds: float
    error: str | None


def matrices(layout: Layout) -> list[tuple[int, int]]:
    """`Needs.shapes` of a model: (out, in) of weights of linear layers and convolutions."""
    return sorted({(s[0], math.prod(s[1:])) for s in layout.shapes if len(s) > 1})


def target_of(name: str | None = None) -> Target:
    """The architecture to compile for: "cuda:90", "hip:gfx942", or None for this machine's GPU.

    Raises:
        ValueError: A name of another kind, or no GPU and no name.
    """
    if name is not None:
        kind, _, arch = name.partition(":")
        if kind == "cuda" and arch.isdecimal():
            return kind, int(arch), 32
        if kind == "hip" and arch.startswith("gfx"):
            return kind, arch, 64 if arch.startswith("gfx9") else 32
        raise ValueError(f"target must be like cuda:90 or hip:gfx942, got {name!r}")
    if not torch.cuda.is_available():
        raise ValueError("target must be given, such as cuda:90, where there is no GPU")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip is not None:
        return "hip", properties.gcnArchName.partition(":")[0], properties.warp_size
    return "cuda", 10 * properties.major + properties.minor, 32


def warm_up(
    needs: Needs | None = None, *, target: Target | None = None, processes: int | None = None
) -> Iterator[Outcome]:
    """Compile all kernels that calls will ask for, and yield the outcome of each.

    Args:
        needs: What calls will ask for, all common things by default.
        target: A GPU as `target_of` reads it; None: the GPU of this machine.
        processes: How many compile at once; None: one for each core that this process may use.

    Raises:
        ValueError: Triton is missing; no GPU and no target; an unknown form, generator, mechanism,
            dtype or kind of sums; processes below 1.

    Guarantees:
        A kernel that does not compile, or ends its process, is an outcome with an error.
    """
    needs = Needs() if needs is None else needs
    if _triton.import_error() is not None:
        raise ValueError(f"impl must not be 'triton' without triton: {_triton.import_error()}")
    for name, values, known in (
        ("form", needs.forms, _FORMS), ("rng", needs.rngs, RNGS), ("dtype", needs.dtypes, _DTYPES),
        ("(mechanism, p)", needs.kinds, tuple(_KINDS.values())), ("sums", needs.sums, _SUMS),
    ):  # fmt: skip
        for value in values:
            _validate.one_of(name, value, known)
    if processes is not None and processes < 1:
        raise ValueError(f"processes must be 1 or more, got {processes}")
    goal = target_of() if target is None else target
    todo = cases(needs)
    if goal[0] == "hip":
        todo = [case for case in todo if case.form != "fast"]
    return _outcomes(todo, goal, processes or _cores())


def _cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _outcomes(todo: Sequence[Case], target: Target, processes: int) -> Iterator[Outcome]:
    # Spawned, not forked: a child must not inherit what this process has imported of Triton.
    with ProcessPoolExecutor(max(1, min(processes, len(todo))), get_context("spawn")) as pool:
        futures = {pool.submit(_compile, case, target): case for case in todo}
        for future in as_completed(futures):
            try:
                yield Outcome(futures[future], future.result(), None)
            except Exception as error:
                lines = str(error).splitlines() or [""]
                yield Outcome(futures[future], 0.0, f"{type(error).__name__}: {lines[0][:200]}")


def _compile(case: Case, target: Target) -> float:
    """Compile a case in this process, which has no other use; seconds."""
    # Triton reads it when it is imported, and its interpreter compiles nothing.
    os.environ.pop("TRITON_INTERPRET", None)
    from aadp_kernels._triton.ahead import compile_case

    start = time.perf_counter()
    compile_case(case, target)
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 if everything compiled."""
    parser = argparse.ArgumentParser(
        prog="python -m aadp_kernels.warm_up", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    several = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--dtype", default=["float32"], choices=_DTYPES, **several)
    parser.add_argument("--form", default=_FORMS, choices=_FORMS, **several)
    parser.add_argument("--rng", default=RNGS, choices=RNGS, **several)
    parser.add_argument(
        "--mechanism", default=["laplace", "gaussian"], choices=_KINDS, **several,
        help="gaussian and correlated clip the L2 norm, gaussian-l1 the L1 norm",
    )  # fmt: skip
    parser.add_argument("--votes", action="store_true", help="with and without votes")
    parser.add_argument("--reference", action="store_true", help="with and without a reference")
    parser.add_argument("--micro-batches", action="store_true", help="clipped sums of several")
    parser.add_argument("--target", help="such as cuda:90; by default this machine's GPU")
    parser.add_argument("--processes", type=int, help="by default one for each core")
    options = parser.parse_args(arguments)
    needs = Needs(
        options.dtype, options.form, options.rng, [_KINDS[m] for m in options.mechanism],
        (False, True) if options.votes else (False,),
        (False, True) if options.reference else (False,),
        _SUMS if options.micro_batches else _SUMS[:1],
    )  # fmt: skip
    start, count, failed = time.perf_counter(), 0, 0
    try:
        found = warm_up(needs, target=target_of(options.target), processes=options.processes)
    except ValueError as error:
        parser.error(str(error))
    for case, seconds, error in found:
        count, failed = count + 1, failed + (error is not None)
        what = f"{case.kernel}: {case.dtype}, {case.form}, {case.rng}, {case.mechanism or 'silent'}"
        said = f"failed, {error}" if error else f"{seconds:.1f} s"
        print(f"{what}, L{case.p}, sums {case.sums}: {said}", flush=True)
    print(f"{count} kernels, {failed} failed, {time.perf_counter() - start:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
