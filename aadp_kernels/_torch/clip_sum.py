"""Sums of per-record gradients clipped layer by layer, with float64 products and accumulation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aadp_kernels._torch import grid
from aadp_kernels._torch.privatize import add_noise, draw, norms, update_parts
from aadp_kernels.certified import ballots, clip_factors
from aadp_kernels.contract import Bounds, ClipStats, Noise
from aadp_kernels.grid import RECORDS_AT_ONCE, SUM_LIMIT
from aadp_kernels.layout import Layout

_ELEMENTS_AT_ONCE = 1 << 22


def clip_sum(
    per_sample: Sequence[Tensor],
    layout: Layout,
    *,
    bounds: Bounds,
    mask: Tensor,
    weights: Tensor | None,
    sums: Sequence[Tensor] | None,
    quanta: Tensor | None,
) -> tuple[list[Tensor], ClipStats]:
    """`Backend.clip_sum`, some records at a time."""
    clip, p, votes_at = bounds
    kind = torch.float64 if quanta is None else torch.int64
    if sums is None:
        sums = [torch.zeros(s, dtype=kind, device=mask.device) for s in layout.shapes]
    batch = mask.shape[0]
    columns = []
    for layer, members in enumerate(layout.members):
        rows = max(1, _ELEMENTS_AT_ONCE // max(1, layout.dims[layer]))
        rows = min(rows, RECORDS_AT_ONCE)
        pieces = []
        for start in range(0, max(batch, 1), rows):
            piece = slice(start, min(batch, start + rows))
            records = [t[piece] for t in per_sample]
            parts = update_parts(records, None, layout, layer)
            norm = norms(parts, p)
            norm1 = norm if p == 1 else None
            if norm1 is None and votes_at is not None:
                norm1 = norms(parts, 1)
            finite = torch.isfinite(norm)
            live = finite & mask[piece]
            factor, clipped = clip_factors(
                norm, clip[layer], live, layout.dims[layer], torch.float64
            )
            if weights is not None:
                factor = factor * weights[piece]
            for i, part in zip(members, parts, strict=True):
                total = sums[i].view(-1)
                if quanta is None:
                    kept = torch.where(live[:, None], part, 0.0)
                    total.add_(torch.mv(kept.t(), factor))
                else:
                    counts = grid.quantise(part, factor, live, quanta[layer])
                    total.clamp_(-SUM_LIMIT, SUM_LIMIT).add_(counts.sum(0))
            vote = torch.zeros_like(norm)
            if norm1 is not None:
                vote = ballots(norm1, None if votes_at is None else votes_at[layer], live)
            pieces.append((norm1, vote, clipped, mask[piece] & ~finite))
        norm1s, votes, clipped, bad = zip(*pieces, strict=True)
        columns.append(
            (
                None if norm1s[0] is None else torch.cat(norm1s),
                torch.cat(votes).sum(),
                torch.cat(clipped).sum(),
                torch.cat(bad).sum(),
            )
        )
    norm1s, *counts = zip(*columns, strict=True)
    l1_norm = None if norm1s[0] is None else torch.stack(norm1s, -1)
    return list(sums), ClipStats(l1_norm, *(torch.stack(count) for count in counts))


def clip_sum_noise(
    per_sample: Sequence[Tensor],
    layout: Layout,
    *,
    bounds: Bounds,
    mask: Tensor,
    weights: Tensor | None,
    sums: Sequence[Tensor] | None,
    scale: Tensor,
    noise: Noise | None,
) -> tuple[list[Tensor], ClipStats]:
    """`Backend.clip_sum_noise`."""
    given = {"bounds": bounds, "mask": mask, "weights": weights, "sums": sums}
    sums, stats = clip_sum(per_sample, layout, **given, quanta=None)
    drawn = [None] * layout.num_layers if noise is None else draw(noise, layout, scale)
    results = []
    for i, (value, record) in enumerate(zip(sums, per_sample, strict=True)):
        layer, start = layout.layer_of[i], layout.offsets[i]
        piece = drawn[layer]
        if piece is not None:
            piece = piece[0, start : start + layout.sizes[i]].view(value.shape)
        results.append(add_noise(value, piece, scale[layer]).to(record.dtype))
    return results, stats
