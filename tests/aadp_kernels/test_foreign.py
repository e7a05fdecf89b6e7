"""Layers that other libraries bring along: RMS norms by other names, against `nn.RMSNorm`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from aadp_kernels import UnsupportedLayerError, check_single_use, with_clipping
from aadp_kernels.clip_in_backward.kept import record_gradients, with_kept_gradients
from tests.aadp_kernels.test_transposed import buffers

WIDTH = 6


class OtherNorm(nn.Module):
    """As that of Llama and T5 in transformers, which the tests do not install."""

    offset = 0.0

    def __init__(self, size: int, eps: float = 1e-2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2.0, size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.offset + self.weight) * wide.to(hidden_states.dtype)


class OffsetNorm(OtherNorm):
    """As that of Gemma: another function of the same numbers."""

    offset = 1.0


def networks(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    first, last, other = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3), OtherNorm(WIDTH)
    usual = nn.RMSNorm(WIDTH, eps=1e-2)
    usual.load_state_dict({"weight": other.weight.detach()})
    return (
        nn.Sequential(first, other, last).to(dtype), nn.Sequential(first, usual, last).to(dtype)
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [1, 2])
def test_clipped_gradients_are_those_of_the_ordinary_norm(p: int, dtype: torch.dtype) -> None:
    x = torch.randn(9, 4, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    for network in networks(dtype):
        model = with_clipping(network, p=p)
        y = functional_call(model, buffers(model, 2.0 if p == 2 else 5.0, 9), (x,))
        y.float().square().sum().backward()
        found.append([y, *(q.grad for q in model.parameters())])
        check_single_use(model, x)
    close = {"rtol": 3e-2, "atol": 1e-1} if dtype == torch.bfloat16 else {}
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, **close)


def test_norms_first_and_sums_later() -> None:
    x = torch.randn(9, 4, 5)
    norms = []
    for network in networks(torch.float32):
        model = with_kept_gradients(network)
        norms.append(
            [
                each.norms(2, l1=False)[0]
                for each in record_gradients(model, model(x).square().sum())
            ]
        )
    assert len(norms[0]) == 3
    for got, want in zip(*norms, strict=True):
        torch.testing.assert_close(got, want)


def test_what_computes_something_else_is_refused() -> None:
    class Two(OtherNorm):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            self.bias = nn.Parameter(torch.zeros(size))

    class Broken(OtherNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            raise RuntimeError("wants another input")

    for other in (OffsetNorm(WIDTH), Two(WIDTH), Broken(WIDTH)):
        with pytest.raises(UnsupportedLayerError, match="has the parameter 'weight' itself"):
            with_clipping(nn.Sequential(other), p=2)
    frozen = OffsetNorm(WIDTH).requires_grad_(False)
    with_clipping(nn.Sequential(nn.Linear(5, WIDTH), frozen), p=2)
