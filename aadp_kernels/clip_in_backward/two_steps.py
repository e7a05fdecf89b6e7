"""Norms of the records of a layer, and their weighted sums, each by itself: no clipping here.

Tensors have two leading axes as in `clip.py`; a client is alone here, so the first has length 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aadp_kernels._dispatch import record_kernels
from aadp_kernels.clip_in_backward.clip import (
    blocks,
    bounded,
    needs_l1,
    per_record,
    piece_norms,
    plus,
    row_sums,
    zeroed,
)
from aadp_kernels.clip_in_backward.matrix_rules import Linear, Matrix
from aadp_kernels.clip_in_backward.other_rules import Bias, Embedding, Norm, token_sums
from aadp_kernels.clip_in_backward.products import (
    gram_fits,
    gram_squares,
    norms_of_products,
    weighted_products,
)
from aadp_kernels.contract import ClipRule, GradientsNeeded

Pair = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Held:
    """Gradients of records that are held as they are, of weight and bias [B, n].

    Those of a normalisation layer are smaller than what they are made of.
    """


def made_of(
    kind: Any, x: Tensor, g: Tensor, *, weight: bool, bias: bool
) -> tuple[Any, Tensor, Tensor]:
    """What gradients of records are made of: a rule, and two tensors [B, ...] for it.

    Args:
        kind: rule of the layer.
        x: its input [B, ...].
        g: gradient of the output [B, ...], float32 or float64.
        weight: whether the weight has a gradient.
        bias: whether the bias has one.

    Returns:
        The rule of the layer, with its input in the dtype of g and g; or `Held`, with gradients of
        the weight and of the bias [B, n], n = 0 where there is none.
    """
    if isinstance(kind, Embedding):
        return kind, x, g
    if not isinstance(kind, Norm | Bias):
        return kind, x.to(g.dtype), g
    needed = GradientsNeeded(2, x=False, weight=weight, bias=bias, counts=False)
    a: Any = kind.normalised(x[None]).to(g.dtype) if isinstance(kind, Norm) else None
    pieces = [piece[0] for piece in kind.pieces(a, g[None], needed)]
    nothing = g.new_empty((len(g), 0))
    return Held(), pieces[0] if weight else nothing, pieces[-1] if bias else nothing


def norms(
    kind: Any, a: Tensor, g: Tensor, weight: Any, needed: GradientsNeeded, *, l1: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """L1 norms and squared L2 norms [B], float64, None where not needed, and which are finite.

    Args:
        kind, a, g: see `made_of`.
        weight: of the layer, for its shape, or None.
        needed: which gradients count, and the norm.
        l1: whether L1 norms are needed for p = 2, too.
    """
    everyone = torch.ones(1, len(g), dtype=torch.bool, device=g.device)
    levels = torch.zeros(1, dtype=torch.float64, device=g.device) if l1 else None
    rule = ClipRule(needed, torch.empty(0), everyone, levels)
    a, g = a[None], g[None]
    if isinstance(kind, Held):
        found, finite = _held_norms(a, g, rule)
    elif isinstance(kind, Embedding):
        found, finite = _embedding_norms(kind, a, g, rule)
    elif isinstance(kind, Linear) and g.dim() == 3:
        found, finite = _outer_norms(a, g, rule)
    else:
        found, finite = _product_norms(kind, a, g, weight, rule)
    norm1, square = (None if n is None else n[0] for n in found)
    return norm1 if needs_l1(rule) else None, square if needed.p == 2 else None, finite[0]


def _held_norms(weight: Tensor, bias: Tensor, rule: ClipRule) -> tuple[Pair, Tensor]:
    norm1 = square = None
    for piece, wanted in ((weight, rule.needed.weight), (bias, rule.needed.bias)):
        if wanted:
            more1, more2 = row_sums(piece, l1=needs_l1(rule))
            norm1 = more1 if norm1 is None else plus(norm1, more1)
            square = more2 if square is None else plus(square, more2)
    return (norm1, square), bounded(square, dtype=weight.dtype)


def _outer_norms(a: Tensor, g: Tensor, rule: ClipRule) -> tuple[Pair, Tensor]:
    """‖g aᵀ‖ = ‖g‖ ‖a‖ in L1 and in L2; entries are finite where this is, for nothing is summed."""
    needed = rule.needed
    w, b = float(needed.weight), float(needed.bias)
    (a1, a2), (g1, g2) = (row_sums(t, l1=needs_l1(rule)) for t in (a, g))
    norm1 = None if a1 is None or g1 is None else (a1 * w + b) * g1
    square = None if a2 is None or g2 is None else (a2 * w + b) * g2
    assert a2 is not None
    assert g2 is not None
    return (norm1, square), (a2 * g2 + a2 + g2).isfinite()


def _product_norms(
    kind: Matrix, a: Tensor, g: Tensor, weight: Tensor, rule: ClipRule
) -> tuple[Pair, Tensor]:
    """Norms of products over positions, by slices that keep patches in the cache."""
    if isinstance(kind, Linear):
        left, right = kind.factors(a[0], g[0], weight)
        right = right.transpose(1, 2)
        if gram_fits(left, right, rule):
            square, *both = gram_squares(left, right, bias=rule.needed.bias)
            return (None, square[None]), bounded(*both, dtype=g.dtype)[None]
    finite = bounded(*(row_sums(t, l1=False)[1] for t in (a, g)), dtype=g.dtype)
    parts = []
    for k, b in blocks(g.shape[:2], kind.patch_size(weight, g), g.device):
        left, right = kind.factors(a[k, b].flatten(0, 1), g[k, b].flatten(0, 1), weight)
        part = ClipRule(rule.needed, rule.clip, rule.mask[k, b], rule.votes_at)
        parts.append(norms_of_products(left, right.transpose(1, 2), part.mask.shape, part))
    return _joined(parts), finite


def _embedding_norms(kind: Embedding, x: Tensor, g: Tensor, rule: ClipRule) -> tuple[Pair, Tensor]:
    index, rows = kind.rows(x, g)
    kernels = record_kernels(rows)
    if kernels is not None:
        found = kernels.embedding_norms(index[0].long(), rows[0], kind.padding_idx, needs_l1(rule))
        norm1, square, whole = (t[None] for t in found)
        return (norm1, square), bounded(whole, dtype=g.dtype)
    parts = []
    for k, b in blocks(index.shape[:2], 2 * rows[0, 0].numel(), g.device):
        parts.append(piece_norms([token_sums(index[k, b], rows[k, b])], rule))
    return _joined(parts), bounded(row_sums(rows, l1=False)[1], dtype=g.dtype)


def _joined(parts: list[Pair]) -> Pair:
    """Norms [1, B] of all records; None where those of no one are needed."""
    norm1, square = (
        None if any(n is None for n in column) else torch.cat(column, 1)  # pyright: ignore
        for column in zip(*parts, strict=True)
    )
    return norm1, square


def sums(
    kind: Any, a: Tensor, g: Tensor, like: Any, factor: Tensor, finite: Tensor, *,
    weight: bool, bias: bool,
) -> Pair:  # fmt: skip
    """Sums of weight and bias over records of factor times gradient; None where not wanted.

    Args:
        kind, a, g: see `made_of`.
        like: the weight, for its shape, or None.
        factor: [B].
        finite: which records count [B]; the others are zero.
        weight: whether the sum of the weight is wanted.
        bias: whether that of the bias is.
    """
    a, g, f, ok = a[None], g[None], factor[None].to(g.dtype), finite[None]
    (g,) = zeroed(ok, g)
    if not isinstance(kind, Embedding):
        (a,) = zeroed(ok, a)
    if isinstance(kind, Held):
        return f[0] @ a[0] if weight else None, f[0] @ g[0] if bias else None
    if isinstance(kind, Linear):
        return _linear_sums(kind, a[0], g[0], like, per_record(f, g)[0], weight=weight, bias=bias)
    if isinstance(kind, Matrix):
        return _product_sums(kind, a, g, like, f, weight=weight, bias=bias)
    index, rows = kind.rows(a, g)
    total = torch.zeros_like(like, dtype=g.dtype)
    rows = rows * per_record(f, rows)
    return total.index_add_(0, index.flatten(), rows.flatten(0, 2)), None


def _linear_sums(
    kind: Linear, a: Tensor, g: Tensor, like: Tensor, factor: Tensor, *, weight: bool, bias: bool
) -> Pair:
    """One matrix product over records and positions, of which the narrower side is scaled."""
    rows, slopes = a.flatten(0, -2), g.flatten(0, -2)
    if a.shape[-1] < g.shape[-1]:
        rows, sum_b = (a * factor).flatten(0, -2), None
        if bias:
            each = factor.expand(*g.shape[:-1], 1).flatten()
            sum_b = slopes.t() @ each
    else:
        slopes = (g * factor).flatten(0, -2)
        sum_b = slopes.sum(0) if bias else None
    sum_w = (slopes.t() @ rows).view(1, -1) if weight else None
    return None if sum_w is None else kind.weight_grad(sum_w, like)[0], sum_b


def _product_sums(
    kind: Matrix, a: Tensor, g: Tensor, like: Tensor, factor: Tensor, *, weight: bool, bias: bool
) -> Pair:
    """One matrix product over records and positions, by slices where patches are written."""
    totals: list[Tensor | None] = [None, None]
    for k, b in blocks(g.shape[:2], kind.patch_size(like, g), g.device):
        left, right = kind.factors(a[k, b].flatten(0, 1), g[k, b].flatten(0, 1), like)
        part = weighted_products(
            left, right.transpose(1, 2), factor[k, b], weight=weight, bias=bias
        )
        for i, value in enumerate(part):
            if value is not None:
                held = totals[i]
                totals[i] = value if held is None else held + value
    sum_w, sum_b = totals
    return (
        None if sum_w is None else kind.weight_grad(sum_w, like)[0],
        None if sum_b is None else sum_b[0],
    )
