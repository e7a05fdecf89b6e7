"""A forward that is run to see what it calls, and leaves nothing behind."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def trial(seed: int | None) -> Iterator[None]:
    """A forward within: random states are put back, and a checkpoint around it sees nothing.

    Args:
        seed: As for `random_states_as_they_were`.
    """
    with random_states_as_they_were(seed), saved_apart():
        yield


def saved_apart() -> torch.autograd.graph.saved_tensors_hooks:
    """What is saved for backward within is none of a checkpoint around it."""
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda t: t)


@contextmanager
def random_states_as_they_were(seed: int | None) -> Iterator[None]:
    """The global generators of torch, Python and NumPy are put back at the end.

    Args:
        seed: Seed of all three; None: they go on from where they are.
    """
    numpy: Any = sys.modules.get("numpy")
    state = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            if seed is not None:
                torch.manual_seed(seed)
                random.seed(seed)
                if numpy is not None:
                    numpy.random.seed(seed)
            yield
    finally:
        random.setstate(state[0])
        if numpy is not None:
            numpy.random.set_state(state[1])


@contextmanager
def buffers_as_they_were(model: nn.Module) -> Iterator[None]:
    """Buffers of the model are put back at the end: the tensors themselves, and what they hold."""
    before = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, version, value in before:
            module._buffers[name] = buffer
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)


def shape_of_record(leaf: Any, axis: int = 0) -> object:
    """What of an input may decide the way that it takes through a model, without the records."""
    if isinstance(leaf, Tensor):
        return (leaf.dtype, *leaf.shape[:axis], *leaf.shape[axis + 1 :])
    return leaf if isinstance(leaf, bool | int | str | None) else type(leaf)
