"""What a private optimizer sees in every backward pass of its model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aadp_kernels import UnsupportedLayerError
from tests.aadp_kernels.watched_networks import FOREIGN, data, private

Way = Callable[[Any, Tensor], Tensor]
# torch.compile itself makes an instance of an autograd.Function, reads gradients, and warns of it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated.*"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
]


def test_the_gradient_is_that_of_the_clipped_records() -> None:
    model, optimizer = private()
    twin = copy.deepcopy(model)
    F.cross_entropy(model(data()), torch.arange(6) % 2, reduction="sum").backward()
    F.cross_entropy(twin(data()), torch.arange(6) % 2, reduction="sum").backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
        assert float(p.grad.abs().sum()) > 0
    optimizer.step()


def test_two_backward_passes_before_a_step() -> None:
    model, optimizer = private()
    x = data()
    model(x).sum().backward()
    with pytest.raises(ValueError, match="micro_batches"):
        model(x).sum().backward()
    optimizer.zero_grad()
    first, second = model(x), model(x)
    with pytest.raises(ValueError, match="micro_batches"):
        (first.sum() + second.sum()).backward()
    with pytest.raises(RuntimeError, match="half-way"):
        optimizer.step()
    for zero in (optimizer.zero_grad, model.zero_grad, lambda: optimizer.zero_grad(False)):
        zero()
        model(x).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("micro_batches", [False, True])
def test_two_backward_passes_of_one_forward_always_raise(micro_batches: bool) -> None:
    model, optimizer = private(micro_batches=micro_batches)
    output = model(data())
    output.sum().backward(retain_graph=True)
    with pytest.raises(UnsupportedLayerError, match="second gradient"):
        output.square().sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(UnsupportedLayerError, match="second gradient"):
        output.sum().backward()


def test_a_backward_pass_that_failed_is_not_released(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = private(lambda self, x: Fails.apply(self.fc(x)), micro_batches=True)
    output = model(data())
    monkeypatch.setattr(Fails, "armed", True)
    with pytest.raises(MemoryError):
        output.sum().backward()
    assert model.out.weight.grad is not None
    with pytest.raises(RuntimeError, match="half-way"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="half-way"):
        model(data()).sum().backward()


class Fails(torch.autograd.Function):
    """No memory in backward, once it is armed."""

    armed = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if Fails.armed:
            raise MemoryError
        return grad


@pytest.mark.parametrize("whole", [False, True])
def test_checkpointed_activations(whole: bool) -> None:
    def way(self: Any, x: Tensor) -> Tensor:
        return checkpoint(self.fc, x, use_reentrant=False)

    plain, _plain_optimizer = private()
    model, optimizer = private((lambda self, x: self.fc(x)) if whole else way)
    plain(data()).sum().backward()
    output = checkpoint(model, data(), use_reentrant=False) if whole else model(data())
    output.sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    optimizer.step()


def test_reentrant_checkpoints_raise() -> None:
    model, _optimizer = private(lambda self, x: checkpoint(self.fc, x, use_reentrant=True))
    x = data().requires_grad_()
    with pytest.raises(UnsupportedLayerError, match="use_reentrant=False"):
        model(x).sum().backward()


def test_second_derivatives_raise() -> None:
    model, _optimizer = private()
    x = data().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        slope.square().sum().backward()


@pytest.mark.parametrize("compiled", ["model", "layer", "method"])
def test_compiled_code_is_watched(compiled: str) -> None:
    torch._dynamo.reset()

    def build(way: Way) -> tuple[Any, Any]:
        model, optimizer = private(way)
        if compiled == "method":
            model.compile(backend="aot_eager")
        elif compiled == "layer":
            model.fc.compile(backend="aot_eager")
        return (
            torch.compile(model, backend="aot_eager") if compiled == "model" else model,
            optimizer,
        )

    plain, _plain_optimizer = private()
    plain(data()).sum().backward()
    model, optimizer = build(lambda self, x: self.fc(x))
    for _ in range(2):
        optimizer.zero_grad()
        model(data()).sum().backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    model, optimizer = build(FOREIGN["attribute"])
    with pytest.raises(UnsupportedLayerError, match="outside of its layer"):
        model(data()).sum().backward()
    model, optimizer = build(lambda self, x: self.fc(x) + self.fc(-x))
    with pytest.raises(UnsupportedLayerError, match="more than once"):
        model(data()).sum().backward()


def test_other_tensors_in_the_place_of_parameters_raise() -> None:
    model, _optimizer = private()
    others = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    with pytest.raises(UnsupportedLayerError, match="another tensor"):
        torch.func.functional_call(model, others, (data(),))
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(UnsupportedLayerError, match="another tensor"):
        model(data())
