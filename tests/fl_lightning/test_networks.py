"""Networks that users have: clipped exactly or refused, and docs/networks.md says which."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.networks.blocks import Block, Net, vectors
from tests.networks.measure import measured, rule_of, some_records, subject
from tests.networks.oracle import Rule, clipped_sum, record_gradients
from tests.networks.product import Setting


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
