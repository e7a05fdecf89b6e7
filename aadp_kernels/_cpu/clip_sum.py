"""Sums of clipped per-record gradients in numba: a pass for the norms, a pass for the sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu.grid import GridNoise
from aadp_kernels._cpu.passes import Pieces, Plan, clipped_sums, native, target, write
from aadp_kernels._cpu.privatize import norms
from aadp_kernels._cpu.rng import Generator
from aadp_kernels._torch import clip_sum as _torch
from aadp_kernels._torch.privatize import ClipStats, Noise, ballots, clip_factors
from aadp_kernels.layout import Layout


def clip_sum(
    per_sample: Sequence[Tensor],
    layout: Layout,
    *,
    clip: Tensor,
    p: int,
    mask: Tensor,
    votes_at: Tensor | None,
    sums: Sequence[Tensor],
    quanta: Tensor | None,
) -> ClipStats:
    """Add the clipped records to the float64 `sums` in place; clip and votes_at are [L]."""
    if quanta is not None:
        return _torch.clip_sum(
            per_sample, layout, clip=clip, p=p, mask=mask, votes_at=votes_at, sums=sums,
            quanta=quanta,
        )  # fmt: skip
    batch = len(mask)
    pieces = Pieces.of_layout(layout, [native(t) for t in per_sample], None, sums)
    norm1, norm = norms(pieces, batch, p)
    finite = torch.isfinite(norm)
    live = finite & mask[:, None]
    dims = torch.tensor(layout.dims, dtype=torch.float64)
    factor, clipped = clip_factors(norm, clip, live, dims, torch.float64)
    clipped_sums(pieces, live.numpy(), factor.numpy())
    seen = p == 1 or votes_at is not None
    return ClipStats(
        norm1 if seen else None, ballots(norm1, votes_at, live).sum(0), clipped.sum(0),
        (mask[:, None] & ~finite).sum(0),
    )  # fmt: skip


def finish(
    sums: Sequence[Tensor],
    layout: Layout,
    *,
    scale: Tensor,
    noise: Noise | None,
    dtypes: Sequence[torch.dtype],
    quanta: Tensor | None,
) -> list[Tensor]:
    """The sums with noise, in the dtypes of the records."""
    if quanta is not None:
        noise = None if noise is None else GridNoise(*noise)
        return _torch.finish(sums, layout, scale=scale, noise=noise, dtypes=dtypes, quanta=quanta)
    results = [torch.empty(s.shape, dtype=d) for s, d in zip(sums, dtypes, strict=True)]
    if noise is None:
        return [result.copy_(value) for result, value in zip(results, sums, strict=True)]
    targets = [target(t) for t in results]
    one = np.ones((1, layout.num_layers))
    pieces = Pieces.of_layout(layout, list(sums), None, targets)
    plan = Plan.build(
        pieces, Generator.build(noise.rng, noise.key_words, int(noise.step)), noise.clients.numpy(),
        mechanism=noise.mechanism, form=noise.form, scale=scale.numpy().reshape(1, -1),
        layers=np.arange(layout.num_layers),
    )  # fmt: skip
    write(pieces, plan, factor=one, dead=one == 0)
    return [made.to(dtype) for made, dtype in zip(targets, dtypes, strict=True)]
