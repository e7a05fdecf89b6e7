"""One claim for every kind of release: draw it, compare it with the ledger, pay, write it down.

Noise and coins are a function of the secret and of all that a release depends on. (In a simulated
run they are a function of the public seed and the rules.) Equal inputs give equal bytes: that is
the same release, and it costs nothing. Other inputs get other noise and are charged. If equal
inputs ever gave other bytes, new coins and noise would be drawn and charged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_lightning.accounting.budget import Budget
from fl_lightning.ledger import Ledger
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.processes.together import Processes
from fl_lightning.values.release import Release
from fl_lightning.values.round import PrivateUpdate


@dataclass(frozen=True)
class Books:
    """The history, budget and ledger that releases change.

    Args:
        history: what earlier releases showed; a release moves it forward.
        budget: noise multipliers, and steps that each client has spent.
        ledger: the file in process 0, a copy elsewhere.
        processes: those that share a release.
    """

    history: ReleasedHistory
    budget: Budget
    ledger: Ledger
    processes: Processes


@dataclass(frozen=True)
class Draw:
    """A release that nobody has seen yet.

    Args:
        update: of this process; private until it is claimed.
        lines: ledger lines of all processes.
        first: place among them of the first row of `update`.
    """

    update: PrivateUpdate
    lines: list[Release]
    first: int = 0


def claim(
    books: Books, rows: Tensor, draw: Callable[[int, dict[str, Tensor]], Draw]
) -> PrivateUpdate:
    """Make a release public: after it returns, the ledger holds what it costs.

    Args:
        books: history, budget and ledger of the run.
        rows: rows of the history that belong to the rows of the update, [k].
        draw: (number of the redraw, those rows of the history) → a release; it moves the history.

    Returns:
        The part of the update that is in the ledger, now or since before a crash. Whoever cannot
        pay is left out, and its history stays as it was.

    Raises:
        LedgerError: the ledger cannot be written; nothing was released and no history moved.
    """
    before = books.history.rows(rows)
    try:
        drawn, paid = _draw_unlike_the_ledger(books, rows, before, draw)
        keep = [i for i, line in enumerate(drawn.lines) if paid[i] or books.budget.can_pay(line)]
        _leave_out_the_others(books.history, rows, before, drawn, keep)
        fresh = [drawn.lines[i] for i in keep if not paid[i]]
        write_lines(books, fresh)
    except BaseException:
        # What is not in the ledger must not be in a history that a checkpoint could keep.
        books.history.restore(rows, before)
        raise
    for line in fresh:
        books.budget.spend(line)
    own = [i - drawn.first for i in keep if 0 <= i - drawn.first < len(rows)]
    return drawn.update if len(own) == len(rows) else drawn.update.select(own)


def _draw_unlike_the_ledger(
    books: Books,
    rows: Tensor,
    before: dict[str, Tensor],
    draw: Callable[[int, dict[str, Tensor]], Draw],
) -> tuple[Draw, list[bool]]:
    """A release whose noise no other bytes in the ledger have, and which lines stand there."""
    redraw = 0
    while True:
        drawn = draw(redraw, before)
        known = [books.ledger.find(line.client, line.round) for line in drawn.lines]
        if not any(map(same_noise_other_bytes, drawn.lines, known)):
            break
        books.history.restore(rows, before)
        redraw += 1
    paid = [
        any(old.digest == line.digest and old.clients == line.clients for old in lines)
        for line, lines in zip(drawn.lines, known, strict=True)
    ]
    return drawn, paid


def same_noise_other_bytes(line: Release, known: list[Release]) -> bool:
    """Whether the ledger has other bytes with the noise of a line: it must be drawn anew."""
    return any(old.binding == line.binding and old.digest != line.digest for old in known)


def _leave_out_the_others(
    history: ReleasedHistory, rows: Tensor, before: dict[str, Tensor], drawn: Draw, keep: list[int]
) -> None:
    """Put the history of those back whose release is not made."""
    kept = {i - drawn.first for i in keep}
    left = [i for i in range(len(rows)) if i not in kept]
    if left:
        index = torch.tensor(left)
        history.restore(rows[index], {name: value[index] for name, value in before.items()})


def write_lines(books: Books, lines: list[Release]) -> None:
    """Write lines down, once, before any process hands out what they stand for.

    Raises:
        LedgerError: in every process, if process 0 cannot write; none of the lines counts.
    """

    if not lines:
        return

    def write() -> str:
        books.ledger.append(lines)
        return books.ledger.head_hash

    head = books.processes.first(write)
    if books.processes.rank:
        books.ledger.follow(lines, head)
