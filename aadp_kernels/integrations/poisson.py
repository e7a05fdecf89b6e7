"""Poisson batches: the sampling that amplification is proven for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from aadp_kernels.noise import poisson_mask
from aadp_kernels.noise_key import NoiseKey


class PoissonBatches:
    """Batches of record indices in which every record is with probability `rate`, independently.

    This is the sampling that amplification is proven for; a shuffled epoch of fixed batches is not.

    Args:
        n: Number of records, public.
        rate: Sampling rate in (0, 1], public.
        steps: Batches of one pass over this object.
        key: Secret key; may be the one of the noise.
        first_step: Address of the first batch.
        device: Device of the indices.

    Guarantees:
        The batch of a step is a function of (key, step). A second pass goes on with new steps.

    Edge cases:
        A batch can be empty, and its size is private.
    """

    def __init__(
        self,
        n: int,
        *,
        rate: float,
        steps: int,
        key: NoiseKey,
        first_step: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {rate}")
        self.n, self.rate, self.steps = n, rate, steps
        self.next_step = first_step
        self._key, self._device = key, device

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.steps):
            step, self.next_step = self.next_step, self.next_step + 1
            mask = poisson_mask(self.n, self.rate, key=self._key, step=step, device=self._device)
            yield mask.nonzero().flatten()
