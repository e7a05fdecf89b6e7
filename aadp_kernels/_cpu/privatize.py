"""Norms, certified clipping and noise of updates in numba: two passes over all layers and rows.

Factors, votes and counts come from the functions of `_torch.privatize`. Norms are added in an
order of their own, fixed whatever the threads: they can differ from `_torch` in the last bits, and
so can an element of a layer that is clipped. The rest of the wide form has the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu.passes import Pieces, layer_sums, native, write
from aadp_kernels._cpu.rng import Generator
from aadp_kernels._torch.privatize import ClipStats, Noise, Precision, ballots, clip_factors
from aadp_kernels.layout import Layout


def coarsest(tensors: Sequence[Tensor], layout: Layout) -> Precision:
    """The precision of the coarsest dtype of each layer's tensors."""
    infos = [
        max((torch.finfo(tensors[i].dtype) for i in members), key=lambda info: info.eps)
        for members in layout.members
    ]
    eps = torch.tensor([info.eps for info in infos], dtype=torch.float64)
    tiny = torch.tensor([info.smallest_normal for info in infos], dtype=torch.float64)
    return Precision(eps, tiny)


def norms(
    tensors: Sequence[Tensor], layout: Layout, rows: int, p: int, reference: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """L1 norms and norms of order p of the layers of every row, float64 [K, L]."""
    minus = None if reference is None else [native(t) for t in reference]
    pieces = Pieces.of_layout(layout, [native(t) for t in tensors], minus)
    sums = torch.from_numpy(layer_sums(pieces, rows, p))
    return sums[0], sums[0] if p == 1 else sums[1].sqrt()


def privatize(
    tensors: Sequence[Tensor],
    out: Sequence[Tensor],
    layout: Layout,
    *,
    clip: Tensor,
    scale: Tensor,
    p: int,
    noise: Noise | None,
    reference: Sequence[Tensor] | None,
    votes_at: Tensor | None,
) -> ClipStats:
    """Clip and noise K updates layer by layer into `out`; clip, scale and votes_at are [K, L]."""
    rows, layers = clip.shape
    minus = None if reference is None else [native(t) for t in reference]
    targets = [native(t) for t in out]
    pieces = Pieces.of_layout(layout, [native(t) for t in tensors], minus, targets)
    sums = torch.from_numpy(layer_sums(pieces, rows, p))
    norm1 = sums[0]
    norm = norm1 if p == 1 else sums[1].sqrt()
    finite = torch.isfinite(norm) & torch.isfinite(norm1)
    factor, clipped = clip_factors(
        norm, clip, finite, torch.tensor(layout.dims, dtype=torch.float64), coarsest(out, layout)
    )
    if noise is None:
        noise = Noise("philox7", (0, 0), "laplace", "wide", 0, torch.zeros(rows, dtype=torch.int64))
    write(
        pieces, Generator.build(noise.rng, noise.key_words, int(noise.step)), noise.clients.numpy(),
        mechanism=noise.mechanism, form=noise.form, scale=scale.contiguous().numpy(),
        factor=factor.numpy(), dead=~finite.numpy(), layers=np.arange(layers),
    )  # fmt: skip
    for target, tensor in zip(targets, out, strict=True):
        if target.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(target)
        elif not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
    votes = ballots(norm1, votes_at, finite)
    return ClipStats(norm1, votes, clipped.to(torch.int64), (~finite).to(torch.int64))
