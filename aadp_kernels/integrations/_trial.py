"""A forward that is run to see what it calls, and leaves nothing behind."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def trial(seed: int | None) -> Iterator[None]:
    """The global generators of torch, Python and NumPy are put back at the end.

    Tensors that are saved for backward within are none of those of a checkpoint around it.

    Args:
        seed: seed of all three; None: they go on from where they are.
    """
    numpy: Any = sys.modules.get("numpy")
    state = random.getstate(), numpy and numpy.random.get_state()
    hooks = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda t: t)
    try:
        with torch.random.fork_rng(), hooks:
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


def shape_of_record(leaf: Any) -> object:
    """What of an input may decide the way that it takes through a model, without the records."""
    if isinstance(leaf, Tensor):
        return (leaf.dtype, *leaf.shape[1:])
    return leaf if isinstance(leaf, bool | int | str | None) else type(leaf)
