"""Work on as many threads as torch uses, where possible on torch's own.

Torch's OpenMP workers spin for a while after every operation, so that threads of another kind find
the cores taken. Its libgomp is found where it is loaded, as on Linux; elsewhere threads are started
for a call. Neither holds for longer than a call.

`run_on_threads` takes any Python function. The interpreter lock then goes from thread to thread,
which takes longer than many a call. With `region_for`, `_parallel.parallel` keeps to compiled code.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from threading import Thread

import torch

_ELEMENTS_PER_THREAD = 1 << 16
_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PROCESS = os.getpid()

Work = Callable[[int, int], object]


def threads_for(elements: int) -> int:
    """How many threads are worth their start: at most as many as torch uses."""
    return max(1, min(torch.get_num_threads(), elements // _ELEMENTS_PER_THREAD))


def run_on_threads(work: Work, count: int, *, elements: int) -> None:
    """Run work(begin, end) over [0, count), on several threads if it is much.

    Whatever one of them raises is raised here, when all have ended.
    """
    threads = min(threads_for(elements), count)
    if threads <= 1:
        work(0, count)
        return
    edges = [count * i // threads for i in range(threads + 1)]
    errors: list[BaseException] = []

    def part(i: int) -> None:
        try:
            work(edges[i], edges[i + 1])
        except BaseException as error:
            errors.append(error)

    library = _usable()
    if library is not None:
        _on_openmp(library, part, threads)
    else:
        _on_threads(part, threads)
    if errors:
        raise errors[0]


def region_for(elements: int) -> tuple[int, int]:
    """(threads, address of GOMP_parallel) for `parallel`; address 0 where that is of no use.

    Then `run_on_threads` finds other threads, if more than one is worth it.
    """
    threads = threads_for(elements)
    return threads, _region() if threads > 1 and _usable() is not None else 0


def _usable() -> ctypes.CDLL | None:
    """The libgomp whose workers are there: not any more in a process that was forked."""
    return _openmp() if os.getpid() == _PROCESS else None


@cache
def _region() -> int:
    """The address of GOMP_parallel."""
    library = _openmp()
    assert library is not None
    return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0


@cache
def _openmp() -> ctypes.CDLL | None:
    """The libgomp that is loaded, or None."""
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        library.GOMP_parallel.argtypes = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        return library
    except (OSError, AttributeError):
        return None


def _on_openmp(library: ctypes.CDLL, part: Callable[[int], None], threads: int) -> None:
    def body(_: int | None) -> None:
        for i in range(library.omp_get_thread_num(), threads, library.omp_get_num_threads()):
            part(i)

    library.GOMP_parallel(_BODY(body), None, threads, 0)


def _on_threads(part: Callable[[int], None], threads: int) -> None:
    others = [Thread(target=part, args=(i,)) for i in range(1, threads)]
    for thread in others:
        thread.start()
    part(0)
    for thread in others:
        thread.join()
