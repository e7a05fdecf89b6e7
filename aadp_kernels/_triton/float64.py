"""What float64 costs on a GPU: graphics cards do it at 1/64 of the rate of float32.

The forms wide and grid are float64 arithmetic. On such a card they are bound by it, and not by
memory as the form fast is. Neither takes the place of the other by itself: they draw other numbers,
and what is charged for their tails differs.
"""

from __future__ import annotations

from typing import Any

import torch

# Operations on a number in float64, arithmetic and conversions, for its norm and for Laplace noise
# of the wide form. Gates hold it to the machine code that is built; the fast form has two.
OPERATIONS = 60
BYTES = 8  # of a float32 that is read and written
NOTABLE = 5.0  # data centre devices stay below

# Results of float64 arithmetic that a multiprocessor gives in a clock: CUDA's programming guide.
_PER_CLOCK = {
    (7, 5): 2, (8, 0): 32, (8, 6): 2, (8, 7): 2, (8, 9): 2, (9, 0): 64, (10, 0): 64, (10, 3): 2,
    (11, 0): 2, (12, 0): 2, (12, 1): 2,
}  # fmt: skip
# Bytes of memory traffic for each clock of a multiprocessor, where a device does not tell: graphics
# cards have 3 to 7.
_BYTES_PER_CLOCK = 4.0


def per_clock(major: int, minor: int) -> int | None:
    """Results of float64 arithmetic a clock and multiprocessor; None for an unknown capability."""
    return _PER_CLOCK.get((major, minor))


def times_memory(properties: Any, operations: float = OPERATIONS) -> float | None:
    """Time of the wide form's float64 arithmetic over that of its memory traffic, as predicted.

    Args:
        properties: Of `torch.cuda.get_device_properties`. Clocks and the width of the memory are
            used where they are known.
        operations: In float64, on a number.

    Returns:
        The ratio; below one memory is the bound. None for an unknown capability.
    """
    rate = per_clock(properties.major, properties.minor)
    if rate is None:
        return None
    clock = getattr(properties, "clock_rate", 0) * properties.multi_processor_count
    # Two transfers a clock of the memory, 8 bits a byte.
    moved = getattr(properties, "memory_clock_rate", 0) * 2
    moved *= getattr(properties, "memory_bus_width", 0) / 8
    bytes_per_clock = moved / clock if clock and moved else _BYTES_PER_CLOCK
    return operations / rate / (BYTES / bytes_per_clock)


def note(device: torch.device, form: str) -> str | None:
    """What to say about a form on a device: None if nothing, as for all but NVIDIA's devices.

    Nothing is said about the form grid, in whose place no other has its proof.
    """
    if form != "wide" or device.type != "cuda" or torch.version.hip is not None:
        return None
    properties = torch.cuda.get_device_properties(device)
    ratio = times_memory(properties)
    if ratio is None or ratio < NOTABLE:
        return None
    return (
        f"form='wide' computes noise in float64, of which {properties.name} (capability "
        f"{properties.major}.{properties.minor}) has little: predicted {ratio:.0f} times the time "
        "of form='fast', which draws other numbers, 32 bits each, and has tails of its own; it is "
        "taken if you ask for it"
    )
