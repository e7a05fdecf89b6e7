"""Gradients of records of a weight that several layers use: an embedding and its softmax.

A record's gradient is the sum of its uses, G = Σ_u R_uᵀ C_u: over positions, rows of the weight
(the gradients of a dense layer's outputs, or the one row of a token) times columns (a dense layer's
inputs, or the gradients of an embedding's outputs). Its squared norm is the sum of the uses' own
and of twice their products <G_u, G_v> = Σ_st (C_us · C_vt)(R_us · R_vt), which need no gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from aadp_kernels.clip_in_backward.clip import plus, slice_elements
from aadp_kernels.clip_in_backward.gradients import RecordGradients
from aadp_kernels.clip_in_backward.other_rules import Embedding

# Layers that may share a weight with others of these types.
SHARING = (nn.Linear, nn.Embedding)
Norms = tuple[Tensor | None, Tensor | None, Tensor]


@dataclass(frozen=True)
class _Use:
    """Rows [B, P, out], or tokens int64 [B, P], and columns [B, P, in] of one layer."""

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, layer: RecordGradients) -> _Use:
        if isinstance(layer.kind, Embedding):
            index, slopes = layer.kind.rows(layer.a[None], layer.g[None])
            return cls(index[0].long(), slopes[0])
        return cls(*(t.reshape(len(t), -1, t.shape[-1]) for t in (layer.g, layer.a)))

    def block(self, low: int, high: int) -> Tensor:
        """Records' gradients of the rows from `low` to `high` of the weight, [B, rows, in]."""
        if self.rows.is_floating_point():
            return torch.bmm(self.rows[..., low:high].transpose(1, 2), self.columns)
        inside = (self.rows >= low) & (self.rows < high)
        total = self.columns.new_zeros(len(self.rows), high - low, self.columns.shape[-1])
        index = (self.rows - low).where(inside, 0)[..., None].expand_as(self.columns)
        return total.scatter_add_(1, index, self.columns * inside[..., None])


def _products(one: _Use, other: _Use) -> Tensor:
    """<G_one, G_other> of each record, float64 [B]."""
    columns = torch.bmm(one.columns.double(), other.columns.double().transpose(1, 2))
    if one.rows.is_floating_point() and other.rows.is_floating_point():
        rows = torch.bmm(one.rows.double(), other.rows.double().transpose(1, 2))
    elif one.rows.is_floating_point():
        at = other.rows[:, None, :].expand(-1, one.rows.shape[1], -1)
        rows = one.rows.gather(2, at).double()
    elif other.rows.is_floating_point():
        return _products(other, one)
    else:
        rows = (one.rows[:, :, None] == other.rows[:, None, :]).double()
    return (columns * rows).sum((1, 2))


@dataclass(frozen=True)
class SharedGradients:
    """`RecordGradients` of a weight that several layers use, without their biases.

    Attributes:
        uses: two layers or more, each with the name of the weight and none of a bias.
    """

    uses: Sequence[RecordGradients]

    @property
    def weight_name(self) -> str | None:
        """The weight."""
        return self.uses[0].weight_name

    @property
    def bias_name(self) -> None:
        """Biases stand by themselves."""

    def norms(self, p: int, *, l1: bool) -> Norms:
        """As `RecordGradients.norms`.

        Guarantees:
            What cancels between two uses leaves the rounding of their norms, of the dtype's
            epsilon: it is added, so that no norm is too small.
        """
        uses = [_Use.of(layer) for layer in self.uses]
        found = [layer.norms(2, l1=False) for layer in self.uses]
        finite = torch.stack([f for _, _, f in found]).all(0)
        if l1 or p == 1:
            norm1, square = self._block_norms(uses)
        else:
            norm1, square = None, sum(s for _, s, _ in found if s is not None)
            for one, other in itertools.combinations(uses, 2):
                square = square + 2 * _products(one, other)
            square = torch.as_tensor(square).clamp(min=0)
        if square is not None:
            eps = torch.finfo(uses[0].columns.dtype).eps
            lengths = sum(s.sqrt() for _, s, _ in found if s is not None)
            square = square + eps * torch.as_tensor(lengths).square()
        return norm1, square if p == 2 else None, finite

    def _block_norms(self, uses: Sequence[_Use]) -> tuple[Tensor, Tensor]:
        """L1 norms and squared L2 norms from the gradients, some rows of the weight at once."""
        columns = uses[0].columns
        like, norm1, square = self.uses[0].likes[0], None, None
        assert like is not None
        size = len(like)
        rows = max(1, slice_elements(columns.device) // max(1, len(columns) * columns.shape[-1]))
        for low in range(0, size, rows):
            block = torch.stack([use.block(low, min(size, low + rows)) for use in uses]).sum(0)
            block = block.double()
            norm1 = plus(norm1, block.abs().sum((1, 2)))
            square = plus(square, block.square().sum((1, 2)))
        assert norm1 is not None
        assert square is not None
        return norm1, square

    def sums(self, factor: Tensor, finite: Tensor) -> dict[str, Tensor]:
        """As `RecordGradients.sums`."""
        total: dict[str, Tensor] = {}
        for layer in self.uses:
            for name, value in layer.sums(factor, finite).items():
                total[name] = total[name] + value if name in total else value
        return total


def joined(found: Sequence[RecordGradients]) -> list[RecordGradients | SharedGradients]:
    """The same, with all uses of a weight in one entry and their biases in entries of their own."""
    uses: dict[str, list[RecordGradients]] = {}
    for layer in found:
        if layer.weight_name is not None:
            uses.setdefault(layer.weight_name, []).append(layer)
    shared = {name: layers for name, layers in uses.items() if len(layers) > 1}
    result: list[RecordGradients | SharedGradients] = [
        layer for layer in found if layer.weight_name not in shared
    ]
    for layers in shared.values():
        result.append(SharedGradients([replace(layer, bias_name=None) for layer in layers]))
        result += [replace(each, weight_name=None) for each in layers if each.bias_name is not None]
    return result
