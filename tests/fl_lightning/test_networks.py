"""Networks that users have: clipped exactly or refused, and docs/networks.md says which."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.networks import page, rows
from tests.networks.blocks import Block, Net, vectors
from tests.networks.measure import Seen, measured, rule_of, some_records, subject
from tests.networks.oracle import Rule, clipped_sum, record_gradients
from tests.networks.product import Setting

VERSIONS, ROWS = rows.kept()
# Cheap ones of each kind; the slow test makes all of them.
FEW = (
    "MLP",
    "learned temperature, 0-d",
    "Embedding, padding_idx",
    "lazy layers",
    "tied layers",
    "one layer under two names",
    "centred gradients (mixes records)",
)
SOME = ("layer", "PrivateOptimizer")


def cells():
    """(name, column, what was seen) of all cells that are kept."""
    return [(name, column, seen) for name, row in ROWS.items() for column, seen in row.items()]


def same(found: rows.Row, name: str) -> None:
    """Hold that cells and reasons are those that are kept."""
    want = {**found, **ROWS.get(name, {})}  # not all are made yet
    for column, seen in found.items():
        assert seen.move <= page.BOUND or name in page.LOSS_MIXES, column
        assert page.cell(seen) != "fails", (column, seen)
        assert page.cell(seen) == page.cell(want[column]), column
        assert page.reason(name, seen) == page.reason(name, want[column]), column


def test_the_page_is_what_the_rows_give():
    assert page.PAGE.read_text(encoding="utf-8") == page.page(VERSIONS, ROWS)


def test_rows_are_of_networks_that_there_are_and_have_the_columns_of_runs():
    names = [block.name for block in rows.BLOCKS]
    assert len(set(names)) == len(names)
    assert list(ROWS) == [name for name in names if name in ROWS]
    assert len(ROWS) >= 40
    runs = (*rows.RECORD, "clients", "PrivateOptimizer")
    assert all(tuple(row)[: len(runs)] == runs for row in ROWS.values())


def test_every_cell_is_within_the_clip_norm_and_exact_or_says_why():
    for name, column, seen in cells():
        what = page.cell(seen)
        if "moves" in what:
            assert name in page.LOSS_MIXES, (name, column, seen)
            assert column.startswith(("Opacus", "PrivateOptimizer")), (name, column, seen)
            assert page.reason(name, seen), (name, column, seen)
        assert what != "fails", (name, column, seen)
        if what == "inexact":
            assert column.startswith("Opacus"), (name, column, seen)
        if what in (*page.STOPPED, "inexact"):
            assert page.reason(name, seen), (name, column, seen)


def test_what_mixes_records_is_refused_in_every_setting_that_clips_records():
    mixing = [name for name in ROWS if "(mixes records)" in name]
    assert mixing
    for name in mixing:
        assert {ROWS[name][column].way for column in rows.RECORD} == {"refused"}, name
        if name not in page.LOSS_MIXES:
            assert ROWS[name]["PrivateOptimizer"].way == "raises", name


def test_a_cell_that_moves_too_far_is_not_hidden():
    row = {"layer": Seen("backward", 1.0 + 2e-6, 0.0), "flat": Seen("vmap", 1.0, 2e-4)}
    assert "backward, but moves by 1.000002 | not made | inexact |" in page.line("net", row)


@pytest.mark.parametrize("name", FEW)
def test_a_row_is_what_the_code_does(name):
    (block,) = (block for block in rows.BLOCKS if block.name == name)
    same(rows.made(block, SOME), name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # as in the rows: where vmap warns, it is no error
@pytest.mark.parametrize(
    "block", [block for block in rows.BLOCKS if not block.missing()], ids=lambda block: block.name
)
def test_every_row_is_what_the_code_does(block):
    same(rows.made(block), block.name)


def test_the_definition_clips_what_is_longer_and_leaves_the_rest():
    """The judge is judged by numbers that can be seen."""
    long, short = {"a.weight": torch.tensor([3.0, 4.0])}, {"a.weight": torch.tensor([0.3, 0.4])}
    strange = {"a.weight": torch.tensor([math.nan, 1.0])}
    rule = Rule("layer", 2, 2, {"a": 1.0})
    total = clipped_sum([long, short, strange], rule, {"a.weight": torch.zeros(2)})
    torch.testing.assert_close(total["a.weight"], torch.tensor([0.9, 1.2]))
    two = {"a.weight": torch.tensor([3.0]), "b.weight": torch.tensor([8.0])}
    both = {"a": 1.0, "b": 2.0}, {"a": 0.36, "b": 0.64}
    assert Rule("joint", 2, 2, *both).moves(two)["all"] == pytest.approx(math.hypot(1.8, 3.2))
    assert Rule("joint", 1, 1, *both).moves(two)["all"] == pytest.approx(3 * 0.36 + 4 * 0.64)
    assert Rule("flat", 2, 2, {"all": 2.0}).moves(two)["all"] == pytest.approx(73**0.5 / 2)


def test_the_measure_sees_what_moves_too_far(monkeypatch):
    """A clip that is one per cent too long, and one that is left out."""
    from fl_lightning.privacy import clipping

    block = Block("MLP", vectors, lambda: nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3)))
    found = subject(block, Setting())
    down = clipping.round_down
    monkeypatch.setattr(clipping, "round_down", lambda clip: 1.01 * down(clip))
    assert measured(found, Setting()).move == pytest.approx(1.01, abs=1e-5)  # type: ignore


def test_records_gradients_are_those_of_autograd():
    block = Block("product", vectors, lambda: Net(lambda n, x: n.a(x), a=nn.Linear(8, 3)))
    x, y = some_records(block, 6)
    network = block.network().double()
    gradients = record_gradients(network, nn.CrossEntropyLoss(reduction="none"), x, y)
    nn.functional.cross_entropy(network(x.double()), y, reduction="sum").backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(sum(g[name] for g in gradients), parameter.grad)
    rule = rule_of(Setting(), list(gradients[0]), gradients)
    moves = [rule.moves(g)["a"] for g in gradients]
    assert min(moves) < 1 < max(moves)
