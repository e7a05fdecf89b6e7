"""Per-layer norms, certified clip factors and noise of client updates, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aadp_kernels._torch import grid
from aadp_kernels._torch.noise import Segment, standard_noise
from aadp_kernels.layout import Layout


class ClipStats(NamedTuple):
    """What clipping saw. PRIVATE: never release, log or branch on it outside a simulation.

    Attributes:
        l1_norm: float64 L1 norms before clipping, [L] or [K, L] (updates), [B, L] (records); None
            where they were not needed. NaN or inf for a unit that is not finite.
        votes: float64 [L] or [K, L], sum over units of 1[L1 norm <= votes_at] - 1/2.
        clipped: int64 [L] or [K, L], units whose norm passed the clip norm.
        nonfinite: int64 [L] or [K, L], units that were zeroed.
    """

    l1_norm: Tensor | None
    votes: Tensor
    clipped: Tensor
    nonfinite: Tensor


class Noise(NamedTuple):
    """Where the noise of a release comes from."""

    rng: str
    key_words: Sequence[int]
    mechanism: str
    form: str
    step: int | Tensor
    clients: Tensor

    def draw(self, layout: Layout, scale: Tensor) -> list[Tensor | None]:
        """Per layer, noise of scale one, float64 [K, d_l]; None where nobody's scale is positive.

        In the grid form it is in quanta, int64. All layers come from one call, since small layers
        cost only dispatch.
        """
        layers = noisy_layers(layout, scale)
        drawn: list[Tensor | None] = [None] * layout.num_layers
        if layers and len(self.clients):
            segments = [(i, 0, layout.dims[i]) for i in layers]
            if self.form == "grid":
                values = self.integers(segments)
            else:
                values = standard_noise(
                    self.rng, self.key_words, segments, self.clients, step=self.step,
                    mechanism=self.mechanism, form=self.form,
                )  # fmt: skip
            for i, value in zip(layers, values, strict=True):
                drawn[i] = value
        return drawn

    def integers(self, segments: Sequence[Segment]) -> list[Tensor]:
        """Noise in quanta of the segments, int64 [K, count] each."""
        return grid.integer_noise(
            self.rng, self.key_words, segments, self.clients, step=self.step,
            mechanism=self.mechanism,
        )  # fmt: skip


def noisy_layers(layout: Layout, scale: Tensor) -> list[int]:
    """Layers where somebody's scale is positive; all on an accelerator, where none is read."""
    layers = [i for i, elements in enumerate(layout.dims) if elements]
    if not scale.is_cpu:
        return layers
    each = (scale if scale.dim() == 1 else scale.any(0)).tolist()
    return [i for i in layers if each[i]]


def norms(parts: Sequence[Tensor], p: int) -> Tensor:
    """Joint norm of the rows of several float64 [K, n_i]: [K]."""
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


class Precision(NamedTuple):
    """`torch.finfo` of the dtype of each of several layers: float64 [L]."""

    eps: Tensor
    smallest_normal: Tensor


def clip_factors(
    norm: Tensor, clip: Tensor, finite: Tensor, count: int | Tensor, dtype: torch.dtype | Precision
) -> tuple[Tensor, Tensor]:
    """Factors f with ‖f x‖ <= clip, certified, and which units were clipped.

    `count` elements in float64 give the norm a relative error below count * 2^-52. One unit of the
    output dtype's precision covers its rounding, its smallest number covers underflow. Below the
    clip norm f is exactly one; a unit that is not finite has zero. For [K, L] of several layers
    `count` is float64 [L] and a `Precision` stands for their dtypes.
    """
    info = torch.finfo(dtype) if isinstance(dtype, torch.dtype) else dtype
    bound = norm * (1 + (count + 16) * 2.0**-52)
    clipped = (bound > clip) & finite
    room = (clip - count * info.smallest_normal * info.eps).clamp(min=0)
    factor = torch.where(clipped, room / torch.where(clipped, bound * (1 + info.eps), 1.0), 1.0)
    # A subnormal factor has lost the digits that the bound counts on.
    normal = factor >= torch.finfo(torch.float64).tiny
    return torch.where(finite & (clip >= 0) & normal, factor, 0.0), clipped


def ballots(norm1: Tensor, votes_at: Tensor | None, counts: Tensor) -> Tensor:
    """1[norm1 <= votes_at] - 1/2 for units that count, zero for the others."""
    if votes_at is None:
        return torch.zeros_like(norm1)
    vote = torch.where(norm1 <= votes_at, 0.5, -0.5).to(torch.float64)
    return torch.where(counts & ~torch.isnan(votes_at), vote, 0.0)


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


def by_rows(privatize: Callable[..., ClipStats]) -> Callable[..., ClipStats]:
    """For an implementation that knows rows only: an update alone is one row.

    Then clip, scale, votes_at and statistics are [L] outside, [1, L] within.
    """

    @wraps(privatize)
    def either(*args: Any, clip: Tensor, scale: Tensor, votes_at: Tensor | None, **kwargs: Any):
        if clip.dim() == 2:
            return privatize(*args, clip=clip, scale=scale, votes_at=votes_at, **kwargs)
        row = None if votes_at is None else votes_at[None]
        stats = privatize(*args, clip=clip[None], scale=scale[None], votes_at=row, **kwargs)
        l1_norm = None if stats.l1_norm is None else stats.l1_norm[0]
        return ClipStats(l1_norm, stats.votes[0], stats.clipped[0], stats.nonfinite[0])

    return either


@by_rows
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
    drawn = [None] * layout.num_layers if noise is None else noise.draw(layout, scale)
    columns = []
    for layer, members in enumerate(layout.members):
        parts = update_parts(tensors, reference, layout, layer)
        norm1 = norms(parts, 1)
        norm = norm1 if p == 1 else norms(parts, p)
        finite = torch.isfinite(norm) & torch.isfinite(norm1)
        dtype = max((out[i].dtype for i in members), key=lambda d: torch.finfo(d).eps)
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
