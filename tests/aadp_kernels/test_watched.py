"""WatchedForward: layers take their parameters from the watch, once a forward, for the records."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from aadp_kernels import UnsupportedLayerError, WatchedForward, with_clipping


class Net(nn.Module):
    """Calls `self.way(self, x)` and applies its second layer."""

    def __init__(self, way=lambda self, x: self.fc(x)) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)
        self.way = way

    def forward(self, x):
        return self.out(self.way(self, x))


def watched(way=lambda self, x: self.fc(x)):
    torch.manual_seed(0)
    return WatchedForward(with_clipping(Net(way), p=2))


def run(watch, x, records=None):
    leaves = {n: v.clone().requires_grad_() for n, v in watch.values.items()}
    with watch.forward(leaves, len(x) if records is None else records):
        output = watch.model(x)
    return torch.autograd.grad(output.sum(), list(leaves.values()))


FOREIGN = {
    "attribute": lambda self, x: self.fc(x) @ self.fc.weight,
    "F.linear": lambda self, x: self.fc(x) + F.linear(x, self.fc.weight),
    "parameters": lambda self, x: self.fc(x) + sum(p.sum() for p in self.parameters()),
    "data": lambda self, x: self.fc(x) + self.fc.weight.data.sum(),
    "indexed": lambda self, x: self.fc(x) + self.fc.bias[0],
    "in place": lambda self, x: self.fc.weight.mul_(2) is None or self.fc(x),
    "numpy": lambda self, x: self.fc(x) + float(self.fc.weight.detach().numpy().sum()),
}


@pytest.mark.parametrize("way", FOREIGN)
def test_parameters_beside_their_layer_raise(way):
    with pytest.raises(UnsupportedLayerError, match=r"'fc\.(weight|bias)' is used outside of its"):
        run(watched(FOREIGN[way]), torch.randn(3, 4))


def test_a_captured_parameter_raises():
    held = []
    model = Net(lambda self, x: self.fc(x) + x @ self.held[0])
    model.held = [model.fc.weight]
    watch = WatchedForward(with_clipping(model, p=2))
    with pytest.raises(UnsupportedLayerError, match=r"'fc\.weight' is used outside"):
        run(watch, torch.randn(3, 4))
    assert not held


METADATA = {
    "dtype": lambda self, x: self.fc(x.to(self.fc.weight.dtype)),
    "shape": lambda self, x: self.fc(x) * self.fc.weight.shape[0] / self.fc.weight.size(0),
    "device": lambda self, x: self.fc(x.to(next(self.parameters()).device)),
    "new_zeros": lambda self, x: self.fc(x) + next(self.parameters()).new_zeros(4),
}


@pytest.mark.parametrize("way", METADATA)
def test_metadata_of_parameters_is_free(way):
    x = torch.randn(3, 4)
    for found, plain in zip(run(watched(METADATA[way]), x), run(watched(), x), strict=True):
        torch.testing.assert_close(found, plain)


CALLS = {
    "twice": (lambda self, x: self.fc(self.fc(x)), "fc is used more than once"),
    "positions": (lambda self, x: self.fc(x.view(-1, 2, 2).transpose(0, 1).reshape(2, -1)[:, :4]),
                  r"fc gets shape \(2, 4\) for 3 record"),
}  # fmt: skip


@pytest.mark.parametrize("way", CALLS)
def test_calls_and_rows_are_seen_in_every_forward(way):
    make, message = CALLS[way]
    state = {"now": False}
    watch = watched(lambda self, x: make(self, x) if state["now"] else self.fc(x))
    run(watch, torch.randn(3, 4))
    state["now"] = True
    with pytest.raises(UnsupportedLayerError, match=message):
        run(watch, torch.randn(3, 4))
    state["now"] = False
    run(watch, torch.randn(3, 4))  # a refused forward leaves nothing behind


def test_inputs_by_keyword_are_seen():
    watch = watched(lambda self, x: self.fc(input=x.repeat(2, 1))[: len(x)])
    with pytest.raises(UnsupportedLayerError, match=r"gets shape \(6, 4\) for 3"):
        run(watch, torch.randn(3, 4))


def test_as_many_positions_as_records_are_told_apart_by_the_check():
    watch = watched(lambda self, x: self.fc(x[0])[None] if x.dim() == 3 else self.fc(x))
    model = with_clipping(nn.Sequential(nn.Linear(4, 4)), p=2)

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    watch = WatchedForward(First())
    x = torch.randn(3, 3, 4)
    with watch.forward(watch.values, 3):
        watch.model(x)
    with pytest.raises(UnsupportedLayerError, match="must be the records"):
        watch.check(x)


def test_a_row_for_all_records_is_given_to_each():
    watch = watched(lambda self, x: x + self.fc(torch.ones(1, 4)))
    x = torch.randn(3, 4)
    with pytest.raises(UnsupportedLayerError, match=r"fc gets shape \(1, 4\) for 3 record"):
        run(watch, x)
    watch.check(x)
    plain = watched(lambda self, x: x + self.fc(torch.ones(len(x), 4)))
    for found, wanted in zip(run(watch, x), run(plain, x), strict=True):
        torch.testing.assert_close(found, wanted)


MIXED = {
    "the first row": lambda self, x: x + self.fc(torch.ones(1, 4))[0],
    "their mean": lambda self, x: x + self.fc(torch.ones(1, 4)).mean(0),
    "turned": lambda self, x: x + self.fc(torch.ones(1, 4)).flip(0),
}


@pytest.mark.parametrize("way", MIXED)
def test_a_row_for_all_records_that_is_mixed_raises(way):
    model = Net(MIXED[way])
    nn.init.zeros_(model.out.weight)  # the check looks behind it
    with pytest.raises(UnsupportedLayerError, match="fc gets one row for all records"):
        WatchedForward(with_clipping(model, p=2)).check(torch.randn(3, 4))


def test_a_row_for_all_records_without_outputs_by_record_raises():
    model = Net(lambda self, x: x + self.fc(torch.ones(1, 4)))
    watch = WatchedForward(with_clipping(Summed(model), p=2))
    with pytest.raises(UnsupportedLayerError, match="no output of the model has a row a record"):
        watch.check(torch.randn(3, 4))


class Summed(nn.Module):
    """One number of a batch."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).sum()


def test_the_check_leaves_random_numbers_and_works_without_records():
    watch = watched()
    before = torch.get_rng_state()
    watch.check(torch.randn(5, 4).mul_(0))
    watch.check(torch.zeros(0, 4))
    torch.set_rng_state(before)
    first = torch.rand(3)
    torch.set_rng_state(before)
    watch.check(torch.zeros(5, 4))
    assert torch.equal(torch.rand(3), first)


def test_under_vmap_and_grad_the_gradients_are_those_of_the_plain_model():
    watch, model = watched(), with_clipping(Net(), p=2)
    x = torch.randn(2, 3, 4)

    def of_watched(params, x):
        with watch.forward(params, len(x)):
            return functional_call(watch.model, {}, (x,), tie_weights=False).square().sum()

    def plain(params, x):
        return functional_call(model, params, (x,)).square().sum()

    found, want = (vmap(grad(f), in_dims=(None, 0))(watch.values, x) for f in (of_watched, plain))
    for name in want:
        torch.testing.assert_close(found[name], want[name])


def test_layers_outside_of_a_forward_raise():
    watch = watched()
    with pytest.raises(UnsupportedLayerError, match="outside of the model's forward"):
        watch.model(torch.randn(3, 4))


def test_copies_and_pickles_of_a_watched_layer_are_not_watched():
    layer = with_clipping(nn.Sequential(nn.Linear(2, 2)), p=2)[0]
    layer.__dict__["watch"] = object()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.watch is None
        other(torch.zeros(1, 2))


def test_frozen_parameters_are_free_and_stay():
    model = Net(lambda self, x: self.fc(x) + x @ self.fc.weight)
    model.fc.weight.requires_grad_(False)
    watch = WatchedForward(with_clipping(model, p=2))
    assert "fc.weight" not in watch.values
    run(watch, torch.randn(3, 4))


@pytest.mark.filterwarnings("ignore")
def test_compiled_code_is_refused_by_the_check():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    watch = WatchedForward(with_clipping(torch.compile(model, backend="eager"), p=2))
    with pytest.raises(UnsupportedLayerError, match="compiled"):
        watch.check(torch.zeros(3, 4))
