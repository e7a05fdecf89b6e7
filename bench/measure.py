"""Times, memory and launches of one side against the other.

All sides take turns within every repeat, so that a slow moment of the machine hits each of them;
ratios are made within a repeat.
"""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

Timer = Callable[[], float]
CLEAR_PEAK = Path("/proc/self/clear_refs")


def interleaved(
    timers: Mapping[str, Timer],
    repeats: int,
    budget: float,
    failed: Callable[[str, Exception], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each side, `repeats` times or until `budget` seconds are spent, at least thrice.

    Every repeat has an order of its own, the same in every run, so that nobody always follows the
    same side.

    Args:
        timers: By side.
        repeats: Of every side at most.
        budget: In seconds.
        failed: Told of a side that raises, which is then left out; None: the error goes on.
    """
    samples: dict[str, list[float]] = {name: [] for name in timers}
    start = time.perf_counter()
    for repeat in range(repeats):
        if repeat >= 3 and time.perf_counter() - start > budget:
            break
        for name in random.Random(repeat).sample(list(timers), len(timers)):
            if name not in samples:
                continue
            try:
                samples[name].append(timers[name]())
            except Exception as error:
                if failed is None:
                    raise
                # What it compiles for other values, or the rest of its work, is not to be had.
                del samples[name]
                failed(name, error)
    return samples


def reason_of(error: Exception) -> str:
    """An error in a line."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def every_case(
    part: str, todo: Mapping[str, Callable[[float], dict]], budget: float
) -> dict[str, dict]:
    """What each case gives, called with its share of what is left of `budget` seconds.

    A case that raises does not end the others: of it there is {"failed": reason} alone.
    """
    results: dict[str, dict] = {}
    titles, start = list(todo), time.perf_counter()
    for i, title in enumerate(titles):
        left = budget - (time.perf_counter() - start)
        if left < 0:
            print(f"{part}: no time left for {titles[i:]}", flush=True)
            break
        print(f"\n{title}", flush=True)
        try:
            results[title] = todo[title](left / (len(titles) - i))
        except Exception as error:
            results[title] = {"failed": reason_of(error)}
            print(f"  failed, {reason_of(error)}", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    cuts = statistics.quantiles(samples, n=5, method="inclusive")
    return statistics.median(samples), cuts[0], cuts[3]


def ratios(samples: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the ratios within each repeat."""
    return quantiles([a / b for a, b in zip(samples, base, strict=True)])


def timer(
    run: Callable[[], object], device: torch.device, *, before: Callable[[], object], inner: int = 1
) -> Timer:
    """Seconds of one call; on a GPU between events around `inner` calls on rotating buffers.

    `before` runs outside the measured time.
    """
    if device.type != "cuda":

        def wall() -> float:
            before()
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

        return wall

    def events() -> float:
        before()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        first.record()
        for _ in range(inner):
            run()
        last.record()
        torch.cuda.synchronize(device)
        return first.elapsed_time(last) / 1e3 / inner

    return events


def in_a_row(timer: Timer, count: int) -> Timer:
    """Seconds of a call that follows its like: the median of `count` after one more."""

    def settled() -> float:
        timer()
        return statistics.median(timer() for _ in range(count))

    return settled


def first_call(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, with all that is compiled for it."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _resident() -> dict[str, int]:
    """Resident memory now and at its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.startswith(("VmRSS", "VmHWM")))
    return {name: 1024 * int(value.split()[0]) for name, value in pairs}


def peak_extra(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes beyond what was held before the call, at the peak; None where nothing tells.

    On a CPU from the peak of the resident memory, with the allocator's free memory given back
    first: it sees numpy and compiled code as well, to a few 100 kB.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR_PEAK.write_text("5")
        before = _resident()["VmRSS"]
    except (OSError, AttributeError, KeyError):
        return None
    run()
    return max(0, _resident()["VmHWM"] - before)


def launches(run: Callable[[], object], device: torch.device) -> int:
    """Kernels launched by a call on a GPU, operators dispatched by it on a CPU."""
    activity = torch.profiler.ProfilerActivity
    if device.type != "cuda":
        with torch.profiler.profile(activities=[activity.CPU]) as profile:
            run()
        return sum(event.cpu_parent is None for event in profile.events())
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
        run()
        torch.cuda.synchronize(device)
    calls = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
    return sum(event.name.startswith(calls) for event in profile.events())
