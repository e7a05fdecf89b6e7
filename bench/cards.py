"""How much longer the wide form takes than memory on graphics cards: predicted from builds."""

from __future__ import annotations

from types import SimpleNamespace

from aadp_kernels._triton import float64
from bench.predictions import builds

# Capability, multiprocessors, clock and memory clock in kHz, and bits of the bus, as they are sold.
CARDS = {
    "RTX 3090": ((8, 6), 82, 1_695_000, 9_751_000, 384),
    "RTX 4090": ((8, 9), 128, 2_520_000, 10_501_000, 384),
    "RTX 5090": ((12, 0), 170, 2_407_000, 14_001_000, 512),
    "A100": ((8, 0), 108, 1_410_000, 1_593_000, 5120),
    "H200": ((9, 0), 132, 1_980_000, 3_201_000, 6144),
}
BUILD = {"capability": 89, "dtype": "fp32", "p": 1, "mechanism": "laplace", "which": "after"}
FORMS = ("wide", "fast")


def properties(name: str) -> SimpleNamespace:
    """What torch would say of a device."""
    (major, minor), *rest = CARDS[name]
    names = ("multi_processor_count", "clock_rate", "memory_clock_rate", "memory_bus_width")
    return SimpleNamespace(
        name=name, major=major, minor=minor, **dict(zip(names, rest, strict=True))
    )


def operations(form: str) -> float | None:
    """Float64 operations on a number in the build for graphics cards; None if none is committed."""
    fits = [b for b in builds() if all(b.get(k) == v for k, v in (BUILD | {"form": form}).items())]
    counts = [b["float64"] for b in fits if b.get("float64") is not None]
    return max(counts, default=None)


def rows() -> list[list[str]]:
    """Device, float64 results a clock, and the time of float64 over that of memory, by form."""
    found = []
    for name in CARDS:
        card = properties(name)
        row = [f"{name} ({card.major}.{card.minor})"]
        row.append(str(float64.per_clock(card.major, card.minor)))
        for form in FORMS:
            count = operations(form)
            ratio = None if count is None else float64.times_memory(card, count)
            row.append("–" if ratio is None else f"{ratio:.1f}")
        found.append(row)
    return found
