"""One claim for every release: paid once, written before it is seen, or as if it had never been."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_lightning import PrivacyConfig
from fl_lightning.ledger import Ledger, LedgerError
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.processes.together import Processes
from fl_lightning.release.claim import Books, Draw, claim
from fl_lightning.values.client_set import encode
from fl_lightning.values.release import ALL_CLIENTS, Release
from fl_lightning.values.round import PrivateUpdate
from tests.fl_lightning.filled_ledger import HEADER, release

ROWS = torch.arange(3)


class Purse:
    """A budget: releases that each client can pay for, and those that it has paid for."""

    def __init__(self, *affordable: int) -> None:
        self.affordable, self.spent = list(affordable), [0] * len(affordable)

    def can_pay(self, line: Release) -> bool:
        ids = line.members(len(self.spent))
        return all(self.spent[k] < self.affordable[k] for k in ids)

    def spend(self, line: Release) -> None:
        for k in line.members(len(self.spent)):
            self.spent[k] += 1


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    with Ledger.create(tmp_path, HEADER) as ledger:
        history = ReleasedHistory(PrivacyConfig(), 3, (4, 2))
        yield Books(history, Purse(2, 2, 2), ledger, Processes())


def drawing(books: Books, rows: Tensor, tries: list[list[Release]], seen: list[int]):
    """What draws the releases of one try after another, moves the history and notes the redraw."""

    def draw(redraw: int, before: dict[str, Tensor]) -> Draw:
        assert all(torch.equal(v, before[n]) for n, v in books.history.rows(rows).items())
        seen.append(redraw)
        books.history.releases[rows] += 1
        lines = tries[redraw]
        found = [
            replace(line, attempt=len(books.ledger.find(line.client, line.round))) for line in lines
        ]
        events = [line.event for line in lines]
        values = {"weight": torch.arange(float(len(rows)))[:, None]}
        return Draw(PrivateUpdate(rows, values, events, 1, None), found)

    return draw


def claimed(books: Books, *tries: list[Release], rows: Tensor = ROWS) -> tuple[list[int], list]:
    """Clients of the update that may be seen, and the redraws."""
    seen: list[int] = []
    update = claim(books, rows, drawing(books, rows, list(tries), seen))
    return update.clients.tolist(), seen


def each(digest: str = "d", binding: str = "b") -> list[Release]:
    return [release(k, digest=f"{digest}{k}", binding=f"{binding}{k}") for k in range(3)]


def a_sum(digest: str, clients: list[int]) -> Release:
    whole = {"largest_weight": 1.0, "spent": "", "clients": encode(np.array(clients))}
    return release(ALL_CLIENTS, digest=digest, binding="b" + digest, **whole)


def test_a_release_is_paid_once_and_again_if_it_is_another(books: Books) -> None:
    assert claimed(books, each()) == ([0, 1, 2], [0])
    assert books.budget.spent == [1, 1, 1]
    assert claimed(books, each()) == ([0, 1, 2], [0])  # as after a crash
    assert books.budget.spent == [1, 1, 1]
    assert len(books.ledger) == 3
    assert claimed(books, each("other", "unlike")) == ([0, 1, 2], [0])
    assert books.budget.spent == [2, 2, 2]
    assert [line.attempt for line in books.ledger] == [0, 0, 0, 1, 1, 1]


def test_who_cannot_pay_is_left_out_and_keeps_its_history(books: Books) -> None:
    books.budget.affordable[1] = 0
    assert claimed(books, each())[0] == [0, 2]
    assert books.history.releases.tolist() == [1, 0, 1]
    assert [line.client for line in books.ledger] == [0, 2]
    books.budget.affordable[0] = 1
    assert claimed(books, each())[0] == [0, 2], "what is paid may be seen again"


def test_equal_bytes_of_a_sum_of_others_are_paid_for(books: Books) -> None:
    row = torch.tensor([0])
    claimed(books, [a_sum("d", [0, 1])], rows=row)
    claimed(books, [a_sum("d", [0, 1])], rows=row)
    assert books.budget.spent == [1, 1, 0]
    claimed(books, [a_sum("d", [1, 2])], rows=row)
    assert books.budget.spent == [1, 2, 1]
    assert len(books.ledger) == 2


def test_the_same_noise_is_never_on_other_bytes(books: Books) -> None:
    claimed(books, each())
    same_noise, other_noise = each("other"), each("other", "unlike")
    assert claimed(books, same_noise, same_noise, other_noise) == ([0, 1, 2], [0, 1, 2])
    found = {(line.binding, line.digest) for line in books.ledger}
    assert len({binding for binding, _ in found}) == len(found) == 6
    assert books.history.releases.tolist() == [2, 2, 2]


@pytest.mark.parametrize("fails", ["ledger", "draw"])
def test_a_release_that_fails_was_never_made(
    books: Books, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    claimed(books, each())
    lines = each("other", "unlike")
    if fails == "ledger":

        def full(_: object, __: object) -> None:
            raise LedgerError("disk full")

        monkeypatch.setattr(Ledger, "append", full)
    else:
        lines = [
            replace(line, binding=old.binding) for line, old in zip(lines, each(), strict=True)
        ]
    with pytest.raises((LedgerError, IndexError)):  # drawn anew until there is nothing to draw
        claimed(books, lines)
    assert books.history.releases.tolist() == [1, 1, 1]
    assert books.budget.spent == [1, 1, 1]
    assert len(books.ledger) == 3
