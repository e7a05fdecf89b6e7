"""What the noise of a sum is drawn over: the layers and their votes, and updates of nobody."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from aadp_kernels import Layout


@lru_cache(maxsize=8)
def with_votes(layout: Layout) -> Layout:
    """The layout with one layer more, of a vote for each of its layers."""
    names = layout.names, layout.layer_names
    count = layout.num_layers
    return Layout(
        (*names[0], ""),  # no parameter has this name
        (*layout.shapes, torch.Size([count])),
        (*names[1], ""),
        (*layout.layer_of, count),
    )


@lru_cache(maxsize=8)
def nobody(layout: Layout) -> list[Tensor]:
    """The updates of no client."""
    return [torch.empty(0, *shape, dtype=torch.float64) for shape in layout.shapes]
