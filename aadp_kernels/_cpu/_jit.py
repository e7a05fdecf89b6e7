"""Compilation and threads of the numba kernels."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import torch

_ELEMENTS_PER_THREAD = 1 << 17


def jit(function: Callable[..., Any]) -> Any:
    """Compile without the interpreter lock, fastmath or fused multiply-adds; cached on disk.

    Where no folder for the cache can be written, every process compiles anew.
    """
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:
        return numba.njit(**options)(function)


def spread(work: Callable[[int, int], None], count: int, *, align: int, elements: int) -> None:
    """Run work(begin, end) over [0, count), on as many threads as torch uses if it is much.

    Pieces begin at multiples of `align`. The threads live for this call only: a process may fork
    at any other time, and calls from several threads do not meet.
    """
    threads = min(torch.get_num_threads(), elements // _ELEMENTS_PER_THREAD, -(-count // align))
    if threads <= 1:
        work(0, count)
        return
    piece = -(-count // (threads * align)) * align
    begins = range(0, count, piece)
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, b, min(b + piece, count)) for b in begins]:
            done.result()
