"""Per-layer norms, certified clip factors and noise of client updates, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aadp_kernels._torch import grid
from aadp_kernels._torch.noise import standard_noise
from aadp_kernels._torch.ordered_sums import ordered_sums
from aadp_kernels.certified import ballots, by_rows, clip_factors, coarsest, noisy_layers
from aadp_kernels.contract import Bounds, ClipStats, Noise
from aadp_kernels.layout import Layout


def draw(noise: Noise, layout: Layout, scale: Tensor) -> list[Tensor | None]:
    """Per layer, noise of scale one, float64 [K, d_l]; None where nobody's scale is positive.

    In the grid form it is in quanta, int64. All layers come from one call, since small layers cost
    only dispatch.
    """
    layers = noisy_layers(layout, scale)
    drawn: list[Tensor | None] = [None] * layout.num_layers
    if layers and len(noise.clients):
        sample = grid.integer_noise if noise.form == "grid" else standard_noise
        values = sample(noise, [(i, 0, layout.dims[i]) for i in layers])
        for i, value in zip(layers, values, strict=True):
            drawn[i] = value
    return drawn


def norms(parts: Sequence[Tensor], p: int) -> Tensor:
    """Joint norm of the rows of several float64 [K, n_i]: [K]."""
    if parts[0].is_cpu:
        total = ordered_sums(parts, p)
        return total if p == 1 else total.sqrt()
    if p == 1:
        return sum((_row_sums(part.abs()) for part in parts[1:]), _row_sums(parts[0].abs()))
    squares = [_row_sums(part.square()) for part in parts]
    return sum(squares[1:], squares[0]).sqrt()


def _row_sums(x: Tensor) -> Tensor:
    """Sums of the rows [K, n], pairwise in an order that neither K nor the threads change."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        folded = x[:, :half] + x[:, half : 2 * half]
        if x.shape[1] % 2:
            folded[:, 0] += x[:, -1]
        x = folded
    return x.sum(1)


def add_noise(value: Tensor, noise: Tensor | None, scale: Tensor) -> Tensor:
    """value + scale * noise in float64; where the scale is zero the value keeps every bit.

    On an accelerator, where scales are not read before, noise that is missing or of a scale that
    is no scale gives NaN.
    """
    if value.device.type == "cpu":
        return value if noise is None else torch.where(scale > 0, value + noise * scale, value)
    noisy = torch.full_like(value, torch.nan) if noise is None else value + noise * scale
    noisy = torch.where(torch.isfinite(scale) & (scale >= 0), noisy, torch.nan)
    return torch.where(scale == 0, value, noisy)


def _rows(value: Tensor, shape: torch.Size) -> int:
    """Length of the leading dimension, 1 without one."""
    return value.shape[0] if value.dim() > len(shape) else 1


def update_parts(
    tensors: Sequence[Tensor], reference: Sequence[Tensor] | None, layout: Layout, layer: int
) -> list[Tensor]:
    """One layer's tensors minus their reference, float64 [K, n_i]."""
    parts = []
    for i in layout.members[layer]:
        value = tensors[i].detach().to(torch.float64)
        if reference is not None:
            value = value - reference[i].detach().to(torch.float64)
        parts.append(value.reshape(_rows(value, layout.shapes[i]), layout.sizes[i]))
    return parts


def layer_norms(
    tensors: Sequence[Tensor], layout: Layout, p: int, reference: Sequence[Tensor] | None
) -> Tensor:
    """Norms of the layers of every row, float64 [K, L]."""
    layers = range(layout.num_layers)
    return torch.stack(
        [norms(update_parts(tensors, reference, layout, layer), p) for layer in layers], -1
    )


@by_rows
def privatize(
    tensors: Sequence[Tensor],
    out: Sequence[Tensor],
    layout: Layout,
    *,
    bounds: Bounds,
    scale: Tensor,
    noise: Noise | None,
    reference: Sequence[Tensor] | None,
) -> ClipStats:
    """`Backend.privatize` of K updates; bounds and scale are [K, L]."""
    clip, p, votes_at = bounds
    drawn = [None] * layout.num_layers if noise is None else draw(noise, layout, scale)
    columns = []
    for layer, members in enumerate(layout.members):
        parts = update_parts(tensors, reference, layout, layer)
        norm1 = norms(parts, 1)
        norm = norm1 if p == 1 else norms(parts, p)
        finite = torch.isfinite(norm) & torch.isfinite(norm1)
        dtype = coarsest([out[i].dtype for i in members])
        gridded = noise is not None and noise.form == "grid"
        size, rows = scale[:, layer], (norm, clip[:, layer], finite, layout.dims[layer])
        factor, clipped = clip_factors(*rows, dtype)
        if gridded:
            factor = torch.where(size == 0, factor, clip_factors(*rows, torch.float64)[0])
        for i, part in zip(members, parts, strict=True):
            value = torch.where(finite[:, None], part * factor[:, None], 0.0)
            start = layout.offsets[i]
            piece = drawn[layer]
            if piece is not None:
                piece = piece[:, start : start + part.shape[1]]
            if noise is not None and gridded:
                released = grid.released(part, factor, finite, piece, size, noise.mechanism)
                value = torch.where(size[:, None] == 0, value, released)
            else:
                value = add_noise(value, piece, size[:, None])
            out[i].detach().copy_(value.view(out[i].shape))
        votes = ballots(norm1, None if votes_at is None else votes_at[:, layer], finite)
        columns.append((norm1, votes, clipped.to(torch.int64), (~finite).to(torch.int64)))
    return ClipStats(*(torch.stack(column, -1) for column in zip(*columns, strict=True)))
