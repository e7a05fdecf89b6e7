"""What a private optimizer sees in every forward pass of its model."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aadp_kernels import NoiseKey, UnsupportedLayerError, with_clipping
from aadp_kernels.integrations.optim import PrivateOptimizer, records
from tests.aadp_kernels.watched_networks import FOREIGN, Net, data, private

Way = Callable[[Any, Tensor], Tensor]
# torch.compile itself makes an instance of an autograd.Function, reads gradients, and warns of it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated.*"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
]
CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "by position": lambda model, x: model(x),
    "by keyword": lambda model, x: model(x=x),
    "by another keyword": lambda model, x: model(input_ids=x),
    "in a dictionary": lambda model, x: model({"x": x}),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("way", FOREIGN)
def test_parameters_used_outside_of_their_layer_raise_before_they_move(way: str, call: str) -> None:
    model, optimizer = private(FOREIGN[way])
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with pytest.raises(UnsupportedLayerError, match=r"'(fc|out)\.(weight|bias)' is used outs"):
            CALLS[call](model, data()).sum().backward()
        with pytest.raises(RuntimeError, match="outside of its layer"):
            optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert optimizer.steps_taken == 0


@pytest.mark.parametrize(
    "penalty",
    [
        lambda model, x: sum(p.square().sum() for p in model.parameters()),
        lambda model, x: model.fc.weight.norm(),
        lambda model, x: (x @ model.fc.weight).sum(),
    ],
)
def test_penalties_in_the_loss_raise_and_weight_decay_is_named(penalty: Any) -> None:
    model, _optimizer = private()
    x = data()
    with pytest.raises(UnsupportedLayerError, match="weight_decay"):
        (model(x).sum() + penalty(model, x)).backward()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("way", "match"),
    [
        (lambda self, x: self.fc(x) + self.fc(-x), "fc is used more than once"),
        (lambda self, x: self.fc(x.repeat(2, 1))[::2], "fc gets shape"),
        (lambda self, x: self.fc(input=x.repeat(2, 1))[::2], "fc gets shape"),
        (lambda self, x: self.fc(x.mean(0)).expand(len(x), 4), "fc gets shape"),
    ],
)
def test_layers_called_twice_or_on_something_else_raise(call: str, way: Way, match: str) -> None:
    model, _optimizer = private(way)
    for _ in range(2):
        with pytest.raises(UnsupportedLayerError, match=match):
            CALLS[call](model, data())


class Deep(nn.Module):
    """A layer that runs as often as the longest record is long."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        state = torch.zeros(len(x), 4)
        for t in range(int(length.max())):
            state = torch.tanh(self.cell(state + x[:, t]))
        return self.out(state)


def test_every_forward_is_watched_and_not_the_first() -> None:
    model = with_clipping(Deep(), p=2)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = PrivateOptimizer(
        sgd, model, clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=3.0,
        key=NoiseKey.random(),
    )  # fmt: skip
    x, length = torch.randn(3, 5, 4), torch.ones(3, dtype=torch.long)
    model(x, length).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    length[2] = 5
    with pytest.raises(UnsupportedLayerError, match="cell is used more than once"):
        model(x, length)


class First(nn.Module):
    """A layer that gets positions first, always or by chance."""

    def __init__(self, chance: float = 1.0, numbers: Any = torch.rand) -> None:
        super().__init__()
        self.fc, self.mix, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.chance, self.numbers = chance, numbers

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if float(self.numbers(())) < self.chance:
            x = self.mix(x.transpose(0, 1)).transpose(0, 1)
        return self.out(x.mean(1))


def watched(net: nn.Module) -> tuple[nn.Module, PrivateOptimizer]:
    model = with_clipping(net, p=2)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    return model, PrivateOptimizer(
        sgd, model, clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=3.0,
        key=NoiseKey.random(),
    )  # fmt: skip


@pytest.mark.parametrize("first", [(5, 4), (3, 4)])
def test_as_many_positions_as_records_are_not_records(first: tuple[int, int]) -> None:
    """Of every signature the first forward is tried with one record and with two."""
    model, _optimizer = watched(First())
    if first[0] == 5:
        with pytest.raises(UnsupportedLayerError, match="mix gets shape"):
            model(torch.randn(3, 5, 4))
    for _ in range(2):
        with pytest.raises(UnsupportedLayerError, match="mix gets shape"):
            model(torch.randn(3, 3, 4))


class Turned(First):
    """A layer that gets positions first where there are three of them."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 3:
            return self.mix(x.transpose(0, 1)).transpose(0, 1)
        return self.mix(x)


def test_every_signature_is_tried_with_two_numbers_of_records() -> None:
    model, _optimizer = watched(Turned())
    model(torch.randn(3, 5, 4))
    with pytest.raises(UnsupportedLayerError, match="mix gets shape"):
        model(torch.randn(3, 3, 4))
    model, _optimizer = watched(First())
    with pytest.raises(UnsupportedLayerError, match="mix gets one row for all records, and what"):
        model(torch.randn(1, 1, 4))


ROWS: dict[str, Way] = {
    "positions": lambda self, x: x + self.fc(torch.ones(1, 4)),
    "positions of a record's shape": lambda self, x: (
        x + self.fc(torch.ones(1, 3, 4)).sum(1) * torch.ones(len(x), 1)
    ),
}
MIXED: dict[str, Way] = {
    "the first row for all": lambda self, x: x + self.fc(torch.ones(1, 4))[0],
    "a mean of the rows": lambda self, x: x + self.fc(torch.ones(1, 4)).mean(0),
    "turned rows": lambda self, x: x + self.fc(torch.ones(1, 4)).flip(0),
}


@pytest.mark.parametrize("way", ROWS)
def test_one_row_for_all_records(way: str) -> None:
    """Every record is given its own copy, and clipped by its own gradient."""
    model, optimizer = private(ROWS[way])
    x, start = data(), {n: v.detach().clone() for n, v in model.state_dict().items()}
    model(x).square().sum().backward()
    optimizer.step()
    wanted = torch.zeros(4, 4)
    for row in x:
        plain = Net(ROWS[way])
        plain.load_state_dict(start)
        plain(row[None]).square().sum().backward()
        whole = torch.cat([plain.fc.weight.grad.flatten(), plain.fc.bias.grad])
        wanted += plain.fc.weight.grad * min(1.0, 0.1 / 2**0.5 / float(whole.norm()))
    torch.testing.assert_close(model.fc.weight.grad, wanted)


@pytest.mark.parametrize("way", MIXED)
def test_rows_for_all_records_that_are_mixed_raise(way: str) -> None:
    model, _optimizer = private(MIXED[way])
    with pytest.raises(UnsupportedLayerError, match="fc gets one row for all records, and what"):
        model(data())


def test_one_row_for_all_records_in_later_forwards_alone_raises() -> None:
    state = {"now": False}
    model, _optimizer = private(
        lambda self, x: x + self.fc(torch.ones(1, 4)) if state["now"] else self.fc(x)
    )
    model(data())
    state["now"] = True
    with pytest.raises(UnsupportedLayerError, match=r"fc gets shape \(1, 4\) for 6 record"):
        model(data())


@pytest.mark.parametrize("numbers", [torch.rand, lambda _: random.random()])
def test_a_layer_that_is_called_by_chance_is_tried_when_it_is_called(numbers: Any) -> None:
    torch.manual_seed(3)
    random.seed(3)
    model, _optimizer = watched(First(0.3, numbers))

    def call() -> None:
        for _ in range(40):
            model(torch.randn(3, 3, 4))

    with pytest.raises(UnsupportedLayerError, match="mix gets shape"):
        call()


def test_a_path_that_one_or_two_records_never_take_raises() -> None:
    model, _optimizer = private(lambda self, x: self.fc(x) if len(x) > 2 else x)
    with pytest.raises(UnsupportedLayerError, match="fc: called for 6 records, and in no forward"):
        model(data())


def test_trials_leave_the_random_numbers_as_they_were() -> None:
    def way(self: Any, x: Tensor) -> Tensor:
        return self.fc(x) * float(torch.rand(()) + random.random())

    model, _optimizer = private(way)
    plain = Net(way)
    plain.load_state_dict(model.state_dict())
    outputs = []
    for each in (model, plain):
        torch.manual_seed(5)
        random.seed(5)
        outputs.append(each(data()))
    assert torch.equal(*outputs)


def test_what_inputs_do_not_say_must_be_told() -> None:
    model, optimizer = private()
    x = data()
    with pytest.raises(UnsupportedLayerError, match=r"first axes of \[6, 9\].*records\(model, n\)"):
        model(x, torch.ones(9))
    with pytest.raises(UnsupportedLayerError, match="hold no tensor"):
        model({"x": x}.items() and type("Batch", (dict,), {})(x=x))
    with records(model, 6):
        model(x, torch.ones(9)).sum().backward()
    optimizer.step()
    with records(model, 5), pytest.raises(UnsupportedLayerError, match="for 5 record"):
        model(x, torch.ones(9))
    with pytest.raises(ValueError, match="records"), records(copy.deepcopy(model), 6):
        pass


def test_parts_of_a_model_are_called_within_records() -> None:
    model, optimizer = private()
    x = data()
    with pytest.raises(UnsupportedLayerError, match="fc is called outside of a forward"):
        model.fc(x)
    with records(model, 6):
        model.out(model.fc(x)).sum().backward()
        with pytest.raises(UnsupportedLayerError, match="more than once"):
            model.fc(x)
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(model.out(model.fc(x)), model(x))


def test_copies_are_run_once() -> None:
    seen = []
    model, _optimizer = private(lambda self, x: seen.append(len(x)) or self.fc(x))
    copy.deepcopy(model)(data())
    assert seen == [6]
    model(data())
    assert seen[:4] == [6, 1, 2, 6]
    assert {*seen[4:]} == {5, 1}  # compared once
    model(data())
    assert seen[-1] == 6
