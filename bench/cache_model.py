"""A model of a GPU's L2 cache under the order of a plan: bytes an element, and who waits for whom.

The cache evicts what was used longest ago, of the lowest priority first. Programs take tickets in
order and take turns; a turn moves a piece of a chunk. Nothing here is a measurement:

    python -m bench traffic     writes bench/results/gpu_traffic.json
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from aadp_kernels import Layout
from aadp_kernels._triton import launch_plan
from bench.cases import CASES
from bench.machine import ROOT, git

RESULT = ROOT / "bench" / "results" / "gpu_traffic.json"
NAMES = ("resnet18", "resnet50", "gpt2", "bert_base", "llama_slice")
CAPACITIES = (25, 40, 50, 60)  # MB
# Programs of an H200 at once, with up to 64 and up to 128 registers a thread.
PROGRAMS = (1056, 528)
PIECE = 1024  # elements that a program moves in its turn
FIRST, NORMAL, LAST = range(3)  # evicted first, and so on


@dataclass(frozen=True)
class Traffic:
    """What a launch does to memory.

    Attributes:
        bytes_per_element: Read from memory and written to it.
        waiting: Share of all turns in which a program waited for the factor of its unit.
    """

    bytes_per_element: float
    waiting: float


class Cache:
    """Least recently used first, of the lowest priority that is there."""

    def __init__(self, capacity: int) -> None:
        self.free = capacity
        self.lines: tuple[OrderedDict[object, int], ...] = (
            OrderedDict(),
            OrderedDict(),
            OrderedDict(),
        )

    def touch(self, name: object, size: int, priority: int) -> bool:
        """Whether it was there; it is now."""
        found = None
        for lines in self.lines:
            if found is None:
                found = lines.pop(name, None)
        self.lines[priority][name] = size
        self.free -= size if found is None else 0
        while self.free < 0:
            lowest = next(lines for lines in self.lines if lines)
            self.free += lowest.popitem(last=False)[1]
        return found is not None


def traffic(
    tables: dict[str, np.ndarray],
    capacity: int,
    *,
    itemsize: int = 4,
    in_place: bool = True,
    hints: bool = True,
    programs: int = 1,
    piece: int | None = None,
) -> Traffic:
    """Model a launch over the tables of a plan.

    Args:
        tables: What `launch_plan.make` gives.
        capacity: Bytes of the cache.
        itemsize: Bytes of an element.
        in_place: Whether outputs overwrite inputs.
        hints: Whether norm tickets read with the highest priority and apply tickets read and write
            with the lowest, as the kernel does.
        programs: How many programs take turns.
        piece: Elements of a turn; a whole chunk by default.
    """
    chunks, cache = tables["chunks"], Cache(capacity)
    sizes = chunks[:, 4] - chunks[:, 3]
    step = launch_plan.CHUNK if piece is None else piece
    missing = np.diff(tables["units"].astype(np.int64)).ravel().tolist()
    unit_of, kept, dropped = (
        chunks[:, 6].tolist(),
        LAST if hints else NORMAL,
        FIRST if hints else NORMAL,
    )
    missed = turns = waits = 0

    def run(code: int) -> Iterator[bool]:
        """A ticket, a turn at a time; False for a turn that waits."""
        nonlocal missed
        chunk, kind = code >> launch_plan.KIND_BITS, code & 3
        starts = range(0, max(int(sizes[chunk]), 1), step)
        bytes_of = [itemsize * min(step, int(sizes[chunk]) - start) for start in starts]
        if kind & launch_plan.NORM:
            for start, size in zip(starts, bytes_of, strict=True):
                missed += 0 if cache.touch((chunk, start), size, kept) else size
                yield True
            missing[unit_of[chunk]] -= 1
        while kind == launch_plan.APPLY and missing[unit_of[chunk]]:
            yield False
        for start, size in zip(starts, bytes_of, strict=True) if kind & launch_plan.APPLY else ():
            missed += 0 if cache.touch((chunk, start), size, dropped) else size
            if not in_place:
                cache.touch((chunk, start, "out"), size, dropped)
            yield True

    tickets = iter(tables["tickets"].tolist())
    running = [run(code) for _, code in zip(range(programs), tickets, strict=False)]
    while running:
        after = []
        for ticket in running:
            worked = next(ticket, None)
            if worked is None:
                code = next(tickets, None)
                if code is None:
                    continue
                ticket = run(code)
                worked = next(ticket)
            turns, waits = turns + 1, waits + (not worked)
            after.append(ticket)
        running = after
    return Traffic(missed / int(sizes.sum()) + itemsize, waits / max(turns, 1))


def least(layout: Layout, capacity: int, itemsize: int = 4) -> float:
    """Bytes an element of the best order: of a unit all but what the cache holds is read twice."""
    again = sum(max(0, count * itemsize - capacity) for count in layout.dims)
    return 2 * itemsize + again / layout.elements


def tables_of(layout: Layout, window: int) -> dict[str, np.ndarray]:
    """The plan of one float32 update."""
    aligned = (True,) * len(layout.sizes)
    return launch_plan.make(layout, 1, tile=PIECE, itemsize=4, aligned=aligned, window=window)


def forward(tables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The plan with every unit applied from its beginning."""
    tickets, unit_of = tables["tickets"].copy(), tables["chunks"][:, 6]
    (places,) = np.nonzero(tickets & 3 == launch_plan.APPLY)
    by_unit = places[np.argsort(unit_of[tickets[places] >> 2], kind="stable")]
    in_order = tickets[places]
    tickets[by_unit] = in_order[np.lexsort((in_order, unit_of[in_order >> 2]))]
    return tables | {"tickets": tickets}


@contextmanager
def _chunks_of(elements: int) -> Iterator[None]:
    before, launch_plan.CHUNK = launch_plan.CHUNK, elements
    try:
        yield
    finally:
        launch_plan.CHUNK = before


def _row(name: str, megabytes: int) -> dict[str, object]:
    """Bytes an element of a case, as it was (a window of 32 MB, from the beginning) and now."""
    layout, capacity = CASES[name].layout(), megabytes << 20
    with _chunks_of(1 << 14):
        old = forward(tables_of(layout, 32 << 20))
        before = [traffic(old, capacity, in_place=i, hints=False) for i in (True, False)]
    new = tables_of(layout, capacity // launch_plan.WINDOWS_IN_L2)
    row: dict[str, object] = {"case": name, "l2_mb": megabytes, "least": least(layout, capacity)}
    for i, in_place in enumerate((True, False)):
        now = {
            hints: traffic(new, capacity, in_place=in_place, hints=hints) for hints in (True, False)
        }
        row["in place" if in_place else "out of place"] = {
            "before": before[i].bytes_per_element,
            "now": now[True].bytes_per_element,
            "now, hints ignored": now[False].bytes_per_element,
        }
    return row


def _crowd(megabytes: int, programs: int) -> dict[str, object]:
    """GPT-2 on an L2 cache of 50 MB of which some may be usable, by so many programs in turns."""
    row: dict[str, object] = {"l2_mb": megabytes, "programs": programs}
    layout, window = CASES["gpt2"].layout(), (50 << 20) // launch_plan.WINDOWS_IN_L2
    for elements in (launch_plan.CHUNK, 1 << 14):
        with _chunks_of(elements):
            found = traffic(
                tables_of(layout, window), megabytes << 20, programs=programs, piece=PIECE
            )
        row[f"chunks of {elements}"] = vars(found)
    return row


def run_all() -> None:
    """Model all cases and write them down."""
    rows = [_row(name, megabytes) for name in NAMES for megabytes in CAPACITIES]
    crowds = [_crowd(megabytes, count) for megabytes in (25, 50) for count in PROGRAMS]
    data = {"commit": git("rev-parse", "HEAD"), "rows": rows, "gpt2": crowds}
    RESULT.write_text(json.dumps(data, indent=1) + "\n")
    print(json.dumps(data, indent=1))
