"""Sums of |x|^p in the one order in which plain torch and numba add on a CPU: equal bits.

A layer is cut into units of SUM_UNIT elements. In a unit every tensor is padded with zeros to whole
blocks of 4 · SUM_LANES numbers; a block (a, b, c, d) of SUM_LANES numbers each adds
(a + b) + (c + d) to SUM_LANES running sums, which begin at zero and are added up one by one at the
end. Units are added in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from aadp_kernels.addresses import SUM_LANES, SUM_UNIT


def ordered_sums(parts: Sequence[Tensor], p: int) -> Tensor:
    """Σ|x|^p over the rows of a layer's tensors: float64 [K].

    Args:
        parts: float64 [K, n_i], at least one, on a CPU.
        p: 1 or 2.
    """
    units: dict[int, list[Tensor]] = {}
    first = 0
    for part in parts:
        start, size = 0, part.shape[1]
        while start < size:
            unit = (first + start) // SUM_UNIT
            stop = min(size, (unit + 1) * SUM_UNIT - first)
            units.setdefault(unit, []).append(_blocks(part[:, start:stop], p))
            start = stop
        first += size
    total = parts[0].new_zeros(len(parts[0]))
    for blocks in units.values():
        # A cumulative sum adds one after another; a sum may add in any order.
        lanes = torch.cat(blocks, 1).cumsum(1)[:, -1]
        total = total + lanes.cumsum(1)[:, -1]
    return total


def _blocks(x: Tensor, p: int) -> Tensor:
    """What the blocks of x [K, n] add to the running sums, [K, blocks, SUM_LANES]."""
    powers = F.pad(x.abs() if p == 1 else x.square(), (0, -x.shape[1] % (4 * SUM_LANES)))
    a, b, c, d = powers.unflatten(1, (-1, 4, SUM_LANES)).unbind(2)
    return (a + b) + (c + d)
