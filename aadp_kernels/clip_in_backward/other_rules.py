"""Clip-in-backward rules of embeddings, normalisation layers and biases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from aadp_kernels._dispatch import record_kernels
from aadp_kernels.clip_in_backward.clip import (
    blocks,
    bounded,
    compute_dtype,
    factors_and_counts,
    finite_records,
    narrow,
    part_of,
    per_record,
    piece_norms,
    row_sums,
    single,
    slack_of,
    weighted_sum,
    zeroed,
)
from aadp_kernels.clip_in_backward.matrix_rules import Results
from aadp_kernels.contract import ClipRule, GradientsNeeded


@dataclass(frozen=True)
class Embedding:
    """y = W[x] on token indices x [B, ...]."""

    padding_idx: int | None

    def forward(self, x: Tensor, weight: Tensor, bias: None) -> Tensor:
        """The ordinary layer."""
        return F.embedding(x, weight, self.padding_idx)

    def kept(self, x: Tensor, weight: Tensor, bias: None) -> tuple[Tensor, ...]:
        """`LayerKind.kept`."""
        return (self.forward(x, weight, bias),)

    def single_client(
        self, saved: Sequence[Any], kept: Sequence[Tensor], grad: Tensor, needs: Sequence[bool],
        p: int,
    ) -> tuple[Tensor | None, ...] | None:  # fmt: skip
        """`LayerKind.single_client`."""
        x, weight = saved[:2]
        short = single(saved, grad, needs, p, weight)
        if short is None:
            return None
        index = x.reshape(len(x), -1).to(torch.int64)
        sums, counts = short.kernels.embedding_single(
            index, grad.reshape(*index.shape, -1), len(weight), self.padding_idx, short.needed,
            short.one,
        )  # fmt: skip
        return short.results(None, sums, None, counts)

    def backward(self, x: Tensor, grad: Tensor, weight: Tensor, rule: ClipRule) -> Results:
        """Rows of equal tokens of a record add up before its norm is taken."""
        tokens, dim = weight.shape[1:]
        index, g = self.rows(x, grad.to(compute_dtype(grad)))
        kernels = record_kernels(g)
        if kernels is not None:
            found = kernels.embedding_sums(index.long(), g, tokens, self.padding_idx, rule)
            return _embedding_results(*found, rule.needed)
        sums = g.new_zeros(index.shape[0] * tokens, dim)
        counts = g.new_zeros(index.shape[0], 3, dtype=torch.float64)
        first = torch.arange(index.shape[0], device=x.device)[:, None, None] * tokens
        for k, b in blocks(index.shape[:2], 2 * index.shape[2] * dim, x.device):
            part, rows, own = g[k, b], index[k, b], part_of(rule, k, b)
            finite = bounded(row_sums(part, l1=False)[1], dtype=part.dtype)
            (part,) = zeroed(finite, part)
            norm1, square = piece_norms([token_sums(rows, part)], own)
            factor, seen = factors_and_counts(norm1, square, finite, own, slack_of(dim, part))
            part = part * per_record(narrow(factor, part.dtype), part)
            sums.index_add_(0, (rows + first[k]).flatten(), part.flatten(0, 2))
            if seen is not None:
                counts[k] += seen
        return _embedding_results(sums.view(-1, tokens, dim), counts, rule.needed)

    def rows(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [K, B, T] and the gradients of their rows [K, B, T, D], zero for padding."""
        index = x.flatten(2) if x.dim() > 2 else x[..., None]
        g = g.reshape(*index.shape, g.shape[-1])
        if self.padding_idx is not None:
            g = torch.where((index == self.padding_idx)[..., None], 0.0, g)
        return index, g


def _embedding_results(sums: Tensor, counts: Tensor, needed: GradientsNeeded) -> Results:
    """Sums and counts, None where they are not needed."""
    return None, sums if needed.weight else None, None, counts if needed.counts else None


def token_sums(index: Tensor, g: Tensor) -> Tensor:
    """Sums of g [K, B, T, D] over the positions of each record's equal tokens; zeros elsewhere."""
    if index.shape[-1] <= 1:
        return g
    ordered, position = index.sort(dim=-1)
    new = torch.zeros_like(ordered)
    new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    rank = torch.empty_like(new).scatter_(-1, position, new.cumsum(-1))
    row = torch.arange(index.shape[0] * index.shape[1], device=g.device) * index.shape[-1]
    flat = (rank + row.view(*index.shape[:2], 1)).flatten()
    return torch.zeros_like(g).view(-1, g.shape[-1]).index_add_(0, flat, g.flatten(0, 2)).view_as(g)


@dataclass(frozen=True)
class Norm:
    """y = x̂ · W + b, x̂ the normalised x.

    Attributes:
        kind: "layer" and "rms" normalise over the last axes, "group" over groups of channels of
            [B, channels, ...].
        shape: shape of the weight.
        groups: number of groups.
        eps: added to the variance (mean square); None for the dtype's own with "rms".
    """

    kind: Literal["layer", "rms", "group"]
    shape: tuple[int, ...]
    groups: int
    eps: float | None

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The ordinary layer."""
        if self.kind == "rms":
            return F.rms_norm(x, self.shape, weight, self.eps)
        assert self.eps is not None
        if self.kind == "layer":
            return F.layer_norm(x, self.shape, weight, bias, self.eps)
        return F.group_norm(x, self.groups, weight, bias, self.eps)

    def kept(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        """`LayerKind.kept`: mean and scale of every position, where kernels will ask for them."""
        if self.kind != "layer" or not self._plain(x, weight, bias):
            return (self.forward(x, weight, bias),)
        assert self.eps is not None
        return torch.native_layer_norm(x, self.shape, weight, bias, self.eps)

    def _plain(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
        """Whether the short way of a backward will be open."""
        same = all(t is None or t.dtype == x.dtype for t in (weight, bias))
        return same and record_kernels(x) is not None and not torch.is_autocast_enabled("cpu")

    def single_client(
        self, saved: Sequence[Any], kept: Sequence[Tensor], grad: Tensor, needs: Sequence[bool],
        p: int,
    ) -> tuple[Tensor | None, ...] | None:  # fmt: skip
        """`LayerKind.single_client`."""
        x, weight, bias = saved[:3]
        short = single(saved, grad, needs, p, x) if kept else None
        if short is None:
            return None
        mean, scale = kept
        sums = short.kernels.norm_layer_single(
            x, grad, mean, scale, math.prod(self.shape), short.needed, short.one
        )
        grad_x = None
        if needs[0]:
            grad_x = torch.ops.aten.native_layer_norm_backward(
                grad, x, self.shape, mean, scale, weight, bias, (True, False, False)
            )[0]
        weights, biases = (t.view(self.shape) for t in sums[:2])
        return short.results(grad_x, weights, biases, sums[2])

    def backward(self, x: Tensor, grad: Tensor, weight: Tensor | None, rule: ClipRule) -> Results:
        """A record's gradient has the weight's own size, so the whole batch is held at once."""
        needed, dtype = rule.needed, compute_dtype(grad)
        a, g = x.to(compute_dtype(x)), grad.to(dtype)
        h = g if weight is None or not needed.x else g * self._spread(weight.to(dtype), g)
        normed, grad_x = self._normalise(self._rows(a), self._rows(h), x.dtype, back=needed.x)
        if grad_x is not None:
            grad_x = grad_x.reshape(x.shape).to(x.dtype)
        if not (needed.weight or needed.bias or needed.counts):
            return grad_x, None, None, None
        normed = normed.reshape(x.shape).to(dtype)
        kernels = record_kernels(g) if self.kind != "group" else None
        if kernels is not None:
            sums = kernels.norm_layer_sums(normed, g, math.prod(self.shape), rule)
            return (
                grad_x,
                sums[0].view(-1, *self.shape) if needed.weight else None,
                sums[1].view(-1, *self.shape) if needed.bias else None,
                sums[2] if needed.counts else None,
            )
        finite, a, g = finite_records(normed, g)
        sums, counts = clip_pieces(self.pieces(a, g, needed), finite, rule)
        shaped = [s.view(-1, *self.shape) for s in sums]
        return (
            grad_x,
            shaped[0] if needed.weight else None,
            shaped[-1] if needed.bias else None,
            counts,
        )

    def _rows(self, x: Tensor) -> Tensor:
        """x [K, B, ...] with everything that is normalised together in the last axis."""
        if self.kind == "group":
            return x.reshape(*x.shape[:2], self.groups, -1)
        return x.reshape(*x.shape[: x.dim() - len(self.shape)], -1)

    def pieces(self, a: Tensor, g: Tensor, needed: GradientsNeeded) -> list[Tensor]:
        """Gradients of weight and bias of each record [K, B, elements], those that are needed."""
        found = [self._record_sums(a * g)] if needed.weight else []
        return found + ([self._record_sums(g)] if needed.bias else [])

    def normalised(self, x: Tensor) -> Tensor:
        """x [K, B, ...] normalised, in half precision by way of float32."""
        a = x.to(compute_dtype(x))
        return self._normalise(self._rows(a), a, x.dtype, back=False)[0].reshape(x.shape)

    def _normalise(
        self, rows: Tensor, grad: Tensor, dtype: torch.dtype, *, back: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The rows normalised, and their gradient from that of the normalised rows if asked for."""
        if self.kind == "rms":
            eps = torch.finfo(dtype).eps if self.eps is None else self.eps
            scale = (rows.square().mean(-1, keepdim=True) + eps).rsqrt()
            normed = rows * scale
            if not back:
                return normed, None
            return normed, scale * (grad - normed * (grad * normed).mean(-1, keepdim=True))
        assert self.eps is not None
        size = rows.shape[-1:]
        normed, mean, scale = torch.native_layer_norm(rows, size, None, None, self.eps)
        if not back:
            return normed, None
        return normed, torch.ops.aten.native_layer_norm_backward(
            grad.to(rows.dtype), rows, size, mean, scale, None, None, (True, False, False)
        )[0]

    def _spread(self, weight: Tensor, like: Tensor) -> Tensor:
        """The weight [K or 1, *shape] so that it broadcasts against [K, B, ...]."""
        if self.kind == "group":
            return weight.reshape(len(weight), 1, -1, *[1] * (like.dim() - 3))
        return weight.reshape(len(weight), *[1] * (like.dim() - 1 - len(self.shape)), *self.shape)

    def _record_sums(self, g: Tensor) -> Tensor:
        """Sums over everything but the weight's own axes: [K, B, elements]."""
        if self.kind == "group":
            return g.flatten(3).sum(-1) if g.dim() > 3 else g
        return g.reshape(*g.shape[:2], -1, math.prod(self.shape)).sum(2)


@dataclass(frozen=True)
class Bias:
    """y = x + b, b broadcast against a record.

    Attributes:
        shape: shape of b.
    """

    shape: tuple[int, ...]

    def forward(self, x: Tensor, weight: None, bias: Tensor) -> Tensor:
        """The ordinary sum."""
        return x + bias

    def kept(self, x: Tensor, weight: None, bias: Tensor) -> tuple[Tensor, ...]:
        """`LayerKind.kept`."""
        return (self.forward(x, weight, bias),)

    def single_client(
        self, saved: Sequence[Any], kept: Sequence[Tensor], grad: Tensor, needs: Sequence[bool],
        p: int,
    ) -> tuple[Tensor | None, ...] | None:  # fmt: skip
        """`LayerKind.single_client`: there is none."""
        return None

    def backward(self, x: Tensor, grad: Tensor, weight: None, rule: ClipRule) -> Results:
        """A record's gradient is that of its output, summed to the bias's shape."""
        needed = rule.needed
        grad_x = grad.to(x.dtype) if needed.x else None
        if not (needed.bias or needed.counts):
            return grad_x, None, None, None
        g = grad.to(compute_dtype(grad))
        finite = bounded(row_sums(g, l1=False)[1], dtype=g.dtype)
        (g,) = zeroed(finite, g)
        sums, counts = clip_pieces(self.pieces(None, g, needed), finite, rule)
        return grad_x, None, sums[0].view(-1, *self.shape) if needed.bias else None, counts

    def pieces(self, a: Tensor | None, g: Tensor, needed: GradientsNeeded) -> list[Tensor]:
        """Gradients of each record [K, B, elements]."""
        lead = [1] * (g.dim() - 2 - len(self.shape))
        return [g.sum_to_size(*g.shape[:2], *lead, *self.shape).flatten(2)]


def clip_pieces(
    pieces: list[Tensor], finite: Tensor, rule: ClipRule
) -> tuple[list[Tensor], Tensor | None]:
    """Clipped sums [K, n] of records that are given in pieces [K, B, n], and counts [K, 3]."""
    norm1, square = piece_norms(pieces, rule)
    slack = slack_of(max(piece.shape[-1] for piece in pieces), pieces[0])
    factor, counts = factors_and_counts(norm1, square, finite, rule, slack)
    return [weighted_sum(narrow(factor, piece.dtype), piece) for piece in pieces], counts
