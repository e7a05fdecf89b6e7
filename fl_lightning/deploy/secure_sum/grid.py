"""The public grid of a secure sum: a node's noised update as whole numbers, and the sum back.

A step is the largest power of two that is at most 2^-24 of the scale of one client's part of the
noise, so that dividing by it is exact. A node rounds each noised number to the nearest multiple.

What rounding means for the proof. Let h >= m honest clients be in the sum (m parts are the whole
noise), r >= 2^24 the scale of a part in steps, N(s²) a centred Gaussian of scale s, all in steps.
The probability that a rounded number is k is the density of x + N(r²) + U at k, with U uniform on
one step. If the characteristic function of that were zero beyond half a cycle a step, the sum of h
rounded numbers would be k with the density of Σx + N(h·r²) + U_1 + … + U_h at k. That is the
probability that Σx + N(h·r²) + U_2 + … + U_h, rounded, is k: the output of the Gaussian mechanism
with independent noise added, and rounded. It is post-processing and costs nothing. Beyond half a
cycle the characteristic function is not zero but at most exp(-π²·r²/2) < 10^-(6·10^14); what the
argument leaves out changes each probability by less than 7·h times that, all 2^64 sums of all
numbers together by less than 10^-(10^14). As everywhere in this setting real arithmetic is assumed:
that the noise itself comes in float64 is not in this argument. Laplace parts (differences of gamma
variables of shape 1/m) have no such characteristic function: the argument fails, and they are
refused.

Whole numbers are added modulo 2^64. No client's number is beyond its bound, which holds the clip
norm and a part's largest draw; all clients' bounds together are below 2^63, so the sum modulo 2^64
is the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

FINENESS = 24
# Scales of a part; no form of Gaussian noise has a larger draw.
LARGEST_DRAW = 16.0


@dataclass(frozen=True)
class Block:
    """Numbers of one noise scale: a layer, or the votes. Public.

    Args:
        size: how many, at least 1.
        reach: most that a client's number can be before noise (the clip norm), >= 0.
        scale: standard deviation of the whole noise, > 0.
    """

    size: int
    reach: float
    scale: float


@dataclass(frozen=True)
class Grid:
    """Steps and bounds of all blocks, from public facts alone.

    Args:
        blocks: in the order of the numbers.
        clients: most that may be in the sum.
        noise_parts: clients whose parts of the noise are the whole.

    Raises:
        ValueError: a block without noise, or a sum that could wrap around.
    """

    blocks: tuple[Block, ...]
    clients: int
    noise_parts: int

    def __post_init__(self) -> None:
        for block in self.blocks:
            good = math.isfinite(block.reach) and block.reach >= 0
            if not (good and block.size >= 1 and 0 < block.scale < math.inf):
                raise ValueError(f"{block}: a secure sum needs a clip norm and Gaussian noise")
        most = max(self.bounds, default=0) * self.clients
        if most >= 2**63:
            raise ValueError(
                f"the sum of {self.clients} clients could reach {most:.3g} steps and wrap around "
                "at 2^63: the noise is too small against the clip norm"
            )

    @property
    def size(self) -> int:
        """Numbers of all blocks."""
        return sum(block.size for block in self.blocks)

    @cached_property
    def steps(self) -> tuple[float, ...]:
        """Step of each block, a power of two."""
        scales = [block.scale / math.sqrt(self.noise_parts) for block in self.blocks]
        return tuple(math.ldexp(1.0, math.frexp(s)[1] - 1 - FINENESS) for s in scales)

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Most steps that one client's number can be away from 0, by block."""
        bounds = []
        for block, step in zip(self.blocks, self.steps, strict=True):
            most = block.reach + LARGEST_DRAW * block.scale / math.sqrt(self.noise_parts)
            bounds.append(math.ceil(most / step) + 1)
        return tuple(bounds)

    def whole(self, values: Sequence[Tensor]) -> Tensor:
        """A client's noised numbers on the grid: int64 [size].

        Args:
            values: float64, one tensor of `size` numbers a block, any shape.

        Raises:
            ValueError: another number of values, or one beyond its bound (not finite ones too);
                which one it is is not said.
        """
        found = [value.detach().double().cpu().reshape(-1) for value in values]
        if [len(value) for value in found] != [block.size for block in self.blocks]:
            raise ValueError("the update has other blocks than the grid")
        steps = [v / step for v, step in zip(found, self.steps, strict=True)]
        if not all(bool((s.abs() <= b).all()) for s, b in zip(steps, self.bounds, strict=True)):
            raise ValueError("a number of the update is beyond its clip norm and largest noise")
        return torch.cat([s.round().long() for s in steps])

    def real(self, total: Tensor) -> list[Tensor]:
        """What a sum stands for: float64, one tensor [size] a block.

        Sums below 2^53 steps are exact.

        Args:
            total: int64 [size].
        """
        parts = total.split([block.size for block in self.blocks])
        return [part.double() * step for part, step in zip(parts, self.steps, strict=True)]

    def holds(self, total: Tensor, clients: int) -> bool:
        """Whether a sum of so many clients can be one: a wrong mask leaves uniform numbers."""
        parts = total.split([block.size for block in self.blocks])
        return all(
            int(part.min()) >= -bound * clients and int(part.max()) <= bound * clients
            for part, bound in zip(parts, self.bounds, strict=True)
        )


def as_words(values: Tensor) -> np.ndarray:
    """The same 64 bits of int64 numbers as uint64 [n]; the memory is shared."""
    return values.numpy().view(np.uint64)
