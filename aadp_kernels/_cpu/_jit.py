"""Compilation, threads and memory of the numba kernels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import torch
from numba import types
from numba.extending import intrinsic

_ELEMENTS_PER_THREAD = 1 << 16
_OPTIONS = {"nogil": True, "error_model": "numpy"}
_SOURCES = sorted(Path(__file__).parent.glob("*.py"))
_STAMP = hashlib.blake2b(b"\0".join(path.read_bytes() for path in _SOURCES)).hexdigest()


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """Compile without the interpreter lock; cached on disk until any file of this folder changes.

    Floating point follows IEEE 754 operation by operation. Where no folder for the cache can be
    written, every process compiles anew.
    """
    options = {**_OPTIONS, **options}
    try:
        kernel: Any = numba.njit(cache=True, **options)(function)
        # Numba itself looks at the file of the kernel only, not at those of kernels that it calls.
        index = kernel._cache._cache_file
        if not hasattr(index, "_source_stamp"):
            raise AttributeError("numba keeps its stamps elsewhere")
        index._source_stamp = _STAMP
        return kernel
    except (RuntimeError, AttributeError):
        return numba.njit(**options)(function)


def jit_contract(function: Callable[..., Any]) -> Any:
    """`jit` with fused multiply-adds."""
    return jit(function, fastmath={"contract"})


def jit_inline(function: Callable[..., Any]) -> Any:
    """For parts of a kernel: never compiled alone, since that would double the time."""
    return numba.njit(inline="always", **_OPTIONS)(function)


def _pointer(_context, address, dtype):
    """pointer(address, dtype): an integer as a pointer to a numpy dtype."""

    def cast(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(types.int64, dtype), cast


pointer: Any = intrinsic(_pointer)


def spread(work: Callable[[int, int], object], count: int, *, elements: int) -> None:
    """Run work(begin, end) over [0, count), on as many threads as torch uses if it is much.

    The threads live for this call only: a process may fork at any other time, and calls from
    several threads do not meet.
    """
    threads = max(1, min(torch.get_num_threads(), elements // _ELEMENTS_PER_THREAD, count))
    edges = [count * i // threads for i in range(threads + 1)]
    if threads == 1:
        work(0, count)
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work, *edges[i : i + 2]) for i in range(1, threads)]
        work(*edges[:2])
        for done in others:
            done.result()
