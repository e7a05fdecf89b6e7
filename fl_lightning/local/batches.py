"""Which records a local step takes, padded to one length for clients trained together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from aadp_kernels import NoiseKey, poisson_mask


@dataclass(frozen=True)
class Batch:
    """One local step's records of k clients, padded to one length.

    Attributes:
        x: inputs [k, B, ...]; zeros where padded.
        y: labels [k, B].
        mask: 1 for a record, 0 for padding, float [k, B].
        divisor: what the sum of gradients is divided by, [k]: the public q·n_k under Poisson
            sampling, the number of records otherwise.
        active: whether the client takes this step, bool [k].
    """

    x: Tensor
    y: Tensor
    mask: Tensor
    divisor: Tensor
    active: Tensor

    def split(self, size: int) -> Iterator[Batch]:
        """Micro-batches of at most `size` records a client."""
        for start in range(0, self.x.shape[1], size):
            part = slice(start, start + size)
            yield replace(self, x=self.x[:, part], y=self.y[:, part], mask=self.mask[:, part])


def poisson_rows(
    sizes: list[int], rate: float, steps: int, *, key: NoiseKey, clients: list[int]
) -> Iterator[list[np.ndarray]]:
    """Positions of each client's Poisson batch, for each local step: fresh secret coins."""
    for step in range(steps):
        yield [
            poisson_mask(n, rate, key=key, step=step, client=k).nonzero()[:, 0].cpu().numpy()
            for n, k in zip(sizes, clients, strict=True)
        ]


def shuffled_rows(
    sizes: list[int], batch_size: int, steps: int | None, epochs: int, *, seeds: list[list[int]]
) -> Iterator[list[np.ndarray]]:
    """Positions of each client's shuffled minibatches: `steps` of them, or those of `epochs`.

    Clients with fewer batches than the longest get empty ones at the end.
    """
    plans = []
    for n, seed in zip(sizes, seeds, strict=True):
        generator = np.random.default_rng(seed)
        passes = epochs if steps is None else -(-steps * batch_size // n)
        plan = []
        for _ in range(passes):
            order = generator.permutation(n)
            plan += [order[i : i + batch_size] for i in range(0, n, batch_size)]
        plans.append(plan if steps is None else plan[:steps])
    for step in range(max(len(plan) for plan in plans)):
        yield [plan[step] if step < len(plan) else np.empty(0, np.int64) for plan in plans]


def gather(
    x: Tensor,
    y: Tensor,
    records: list[np.ndarray],
    *,
    divisor: Tensor | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Batch:
    """Padded batch of the given records; `divisor` None divides by their number.

    `dtype` is that of the inputs, None: their own.
    """
    lengths = np.array([len(r) for r in records])
    held = np.arange(max(1, lengths.max())) < lengths[:, None]
    rows = np.zeros(held.shape, np.int64)
    rows[held] = np.concatenate(records)
    counts, mask, index = (torch.from_numpy(a) for a in (lengths, held, rows))
    inputs = x.index_select(0, index.view(-1)).view(*index.shape, *x.shape[1:])
    if not held.all():
        # A record that stands in for padding must not bring its NaNs along.
        inputs.masked_fill_(~mask.view(*mask.shape, *[1] * (inputs.ndim - 2)), 0)
    active = torch.ones_like(counts, dtype=torch.bool) if divisor is not None else counts > 0
    divisor = counts.clamp(min=1) if divisor is None else divisor
    return Batch(
        inputs.to(device=device, dtype=dtype),
        y[index].to(device),
        mask.to(device, torch.float32),
        divisor.to(device, torch.float32),
        active.to(device),
    )
