"""Norms, certified clipping and noise of updates in numba.

Norms are added in an order of their own, fixed whatever the threads: they can differ from `_torch`
in the last bits, and so can an element of a layer that is clipped. The rest of the wide form has
the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from aadp_kernels._cpu import clip as _clip
from aadp_kernels._cpu import grid
from aadp_kernels._cpu.passes import Plan, layer_sums
from aadp_kernels._cpu.pieces import Pieces, deliver, native, table, target
from aadp_kernels._torch.privatize import ClipStats, Noise, Precision
from aadp_kernels.layout import Layout


def coarsest(tensors: Sequence[Tensor], layout: Layout) -> Precision:
    """The precision of the coarsest dtype of each layer's tensors, [1, L]."""
    return _precision(tuple(t.dtype for t in tensors), layout)


@lru_cache(maxsize=64)
def _precision(dtypes: tuple[torch.dtype, ...], layout: Layout) -> Precision:
    known = [torch.finfo(dtype) for dtype in dtypes]
    infos = [max((known[i] for i in m), key=lambda info: info.eps) for m in layout.members]
    columns = [info.eps for info in infos], [info.smallest_normal for info in infos]
    return Precision(*(torch.tensor([column], dtype=torch.float64) for column in columns))


def norms(pieces: Pieces, rows: int, p: int) -> tuple[Tensor, Tensor]:
    """L1 norms, and norms of order p, of the layers of every row: float64 [K, L]."""
    sums = torch.from_numpy(layer_sums(pieces, rows, p))
    return sums[0], sums[0] if p == 1 else sums[1].sqrt()


def layer_norms(
    tensors: Sequence[Tensor], layout: Layout, p: int, reference: Sequence[Tensor] | None
) -> Tensor:
    """`_torch.privatize.layer_norms`: float64 [K, L]."""
    minus = None if reference is None else [native(t) for t in reference]
    rows = tensors[0].shape[0] if tensors[0].dim() > len(layout.shapes[0]) else 1
    return norms(Pieces.of_layout(layout, [native(t) for t in tensors], minus), rows, p)[1]


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
    """Clip and noise K updates layer by layer into `out`.

    clip, scale and votes_at are [K, L], or [L] of one update; statistics have the same shape.
    """
    minus = None if reference is None else [native(t) for t in reference]
    values = [native(t) for t in tensors]
    targets = values if out is tensors else [target(t) for t in out]
    pieces = Pieces.of_layout(layout, values, minus, targets)
    dtypes = coarsest(out, layout)
    if noise is not None and noise.form == "grid":
        stats = grid.privatize(
            pieces, layout, dtypes, noise, clip=clip, scale=scale, p=p, votes_at=votes_at
        )
        deliver(targets, out)
        return stats
    if noise is None:
        ids = torch.zeros(clip.numel() // layout.num_layers, dtype=torch.int64)
        noise = Noise("philox7", (0, 0), "laplace", "wide", 0, ids)
    plan = Plan.build(noise, table(scale))
    cells = _clip.Cells.build(layout, dtypes, clip, votes_at)
    _clip.privatize(pieces, p, cells, plan)
    deliver(targets, out)
    return cells.stats(alone=clip.dim() == 1)
