"""Dense layers that hold their weight as [in, out], against `clipped_linear`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from aadp_kernels import (
    UnsupportedLayerError,
    WatchedForward,
    check_single_use,
    record_gradients,
    with_clipping,
    with_kept_gradients,
)


class Conv1D(nn.Module):
    """As that of GPT-2 in transformers, which the tests do not install."""

    def __init__(self, out: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, out))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


def two_networks() -> tuple[nn.Module, nn.Module]:
    """A transposed layer between two others, and the same with an ordinary one."""
    torch.manual_seed(0)
    first, last, turned = nn.Linear(5, 6), nn.Linear(7, 3), Conv1D(7, 6)
    usual = nn.Linear(6, 7)
    usual.load_state_dict({"weight": turned.weight.t(), "bias": turned.bias})
    return nn.Sequential(first, turned, last), nn.Sequential(first, usual, last)


def buffers(model: nn.Module, clip: float, records: int) -> dict[str, Tensor]:
    mask = (torch.arange(records) != 1).float()
    return {
        name: torch.tensor(clip) if name.endswith("clip_norm") else mask
        for name, _ in model.named_buffers()
        if name.endswith(("clip_norm", "mask"))
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 5), (9, 4, 5), (9, 2, 2, 5)])
@pytest.mark.parametrize("p", [1, 2])
def test_gradients_are_those_of_the_ordinary_layer(p, shape, dtype):
    found = []
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for network in two_networks():
        model = with_clipping(network.to(dtype), p=p)
        held = x.clone().requires_grad_()
        y = functional_call(model, buffers(model, 4.0 if p == 2 else 20.0, 9), (held,))
        y.float().square().sum().backward()
        found.append([y, held.grad, *(q.grad for q in model.parameters())])
        check_single_use(model, x)
    turned, usual = found
    turned[4] = turned[4].t()
    for got, want in zip(turned, usual, strict=True):
        close = {"rtol": 2e-2, "atol": 1e-1} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(got, want, **close)


@pytest.mark.parametrize("shape", [(9, 5), (9, 4, 5), (9, 2, 2, 5)])
def test_norms_and_sums_in_two_steps_are_those_of_the_ordinary_layer(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    factor, everyone = torch.linspace(0, 1, 9), torch.ones(9, dtype=torch.bool)
    found = []
    for network in two_networks():
        model = with_kept_gradients(network)
        with WatchedForward(model).forward(
            {n: q.detach().requires_grad_() for n, q in network.named_parameters()}, 9
        ):
            y = model(x)
        layers = record_gradients(model, y.square().sum())
        norms = torch.stack([layer.norms(2, l1=False)[1] for layer in layers]).float()
        sums: dict[str, Tensor] = {}
        for layer in layers:
            sums |= layer.sums(factor, everyone)
        found.append([norms, *(sums[name] for name, _ in network.named_parameters())])
    turned, usual = found
    turned[3] = turned[3].t()
    for got, want in zip(turned, usual, strict=True):
        torch.testing.assert_close(got, want)


def test_clients_under_vmap():
    found = []
    x = torch.randn(3, 9, 4, 5, generator=torch.Generator().manual_seed(1))
    for network in two_networks():
        model = with_clipping(network, p=2)
        held = {n: q.detach().expand(3, *q.shape) for n, q in model.named_parameters()}
        given = buffers(model, 4.0, 9)

        def loss(values: dict[str, Tensor], x: Tensor, model=model, given=given) -> Tensor:
            return functional_call(model, {**values, **given}, (x,)).square().sum()

        found.append(list(vmap(grad(loss))(held, x).values()))
    turned, usual = found
    turned[2] = turned[2].transpose(1, 2)
    for got, want in zip(turned, usual, strict=True):
        torch.testing.assert_close(got, want)


def test_only_the_class_of_that_name_is_known():
    other = type("Conv1D", (nn.Module,), {"__init__": Conv1D.__init__, "forward": Conv1D.forward})
    other.__init__ = lambda self: (nn.Module.__init__(self), setattr(
        self, "weight", nn.Parameter(torch.ones(2, 2))))[0]  # fmt: skip
    with pytest.raises(UnsupportedLayerError, match="has the parameter 'weight' itself"):
        with_clipping(other(), p=2)
