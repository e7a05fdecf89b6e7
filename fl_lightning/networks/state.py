"""Trying a network out: what it holds is put back afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fl_lightning.networks.functional import apply_with

Found = TypeVar("Found")


def held(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, not copied."""
    return dict(network.named_parameters()) | dict(network.named_buffers())


@contextmanager
def left_as_it_was(network: nn.Module) -> Iterator[None]:
    """Put back parameters, buffers, `.grad`, modes and random states, bit by bit."""
    modes = [(layer, layer.training) for layer in network.modules()]
    before = [(value, value.detach().clone(), value.grad) for value in held(network).values()]
    device = next(network.parameters()).device
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []):
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
        for layer, mode in modes:
            layer.training = mode
        with torch.no_grad():
            for value, old, grad in before:
                value.copy_(old)
                value.grad = grad


@contextmanager
def in_place(network: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters of these names hold these values meanwhile."""
    parameters = dict(network.named_parameters())
    before = {name: parameters[name].detach().clone() for name in values}

    def write(found: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in found.items():
                parameters[name].copy_(value)

    try:
        write(values)
        yield
    finally:
        write(before)


def moved_parameters(network: nn.Module) -> dict[str, Tensor]:
    """Trained parameters a little off: behind a layer of zeros nothing would be seen."""
    generator, moved = torch.Generator().manual_seed(0), {}
    for name, p in network.named_parameters():
        if p.requires_grad:
            size = 0.3 / (p[0].numel() if p.ndim > 1 else 10) ** 0.5
            by = torch.empty(p.shape).normal_(std=size, generator=generator)
            moved[name] = p.detach() + by.to(p)
    return moved


class _Holder(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, work: Callable[[nn.Module], Any]) -> Any:
        return work(self.network)


def with_parameters(
    network: nn.Module, tensors: Mapping[str, Tensor], work: Callable[[nn.Module], Found]
) -> Found:
    """`work(network)` while the network holds these tensors as parameters and buffers.

    A backward pass belongs into `work`: what recomputes activations would otherwise recompute them
    with the network's own parameters.
    """
    return apply_with(_Holder(network), {f"network.{n}": t for n, t in tensors.items()}, work)
