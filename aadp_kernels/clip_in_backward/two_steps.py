"""Norms of the records of a layer, and their weighted sums, each by itself: no clipping here.

Tensors have two leading axes as in `clip.py`; a client is alone here, so the first has length 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aadp_kernels.clip_in_backward.clip import (
    blocks,
    bounded,
    per_record,
    piece_norms,
    row_sums,
    weighted_sum,
    zeroed,
)
from aadp_kernels.clip_in_backward.matrix_rules import Linear, Matrix
from aadp_kernels.clip_in_backward.other_rules import Bias, Embedding, Norm, token_sums
from aadp_kernels.clip_in_backward.products import norms_of_products, weighted_products
from aadp_kernels.contract import ClipRule, GradientsNeeded

Pair = tuple[Tensor | None, Tensor | None]


def input_of(kind: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What of the input a weight's gradient is made of [B, ...]: normalised for a norm layer."""
    if isinstance(kind, Embedding):
        return x
    if isinstance(kind, Norm):
        return kind.normalised(x[None])[0].to(dtype)
    return x if isinstance(kind, Bias) else x.to(dtype)


def norms(
    kind: Any, a: Tensor, g: Tensor, weight: Any, needed: GradientsNeeded, *, l1: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """L1 norms and squared L2 norms [B], float64, None where not needed, and which are finite.

    Args:
        kind: rule of the layer.
        a: see `input_of`.
        g: gradient of the output [B, ...].
        weight: of the layer, for its shape, or None.
        needed: which gradients count, and the norm.
        l1: whether L1 norms are needed for p = 2, too.
    """
    everyone = torch.ones(1, len(g), dtype=torch.bool, device=g.device)
    levels = torch.zeros(1, dtype=torch.float64, device=g.device) if l1 else None
    rule = ClipRule(needed, torch.empty(0), everyone, levels)
    a, g = a[None], g[None]
    made_of = [g] if isinstance(kind, Embedding | Bias) else [a, g]
    finite = bounded(*(row_sums(t, l1=False)[1] for t in made_of), dtype=g.dtype)
    if isinstance(kind, Linear) and g.dim() == 3:
        found, finite = _outer_norms(a, g, rule, l1=l1)
    elif isinstance(kind, Matrix):
        found = _product_norms(kind, a, g, weight, rule)
    elif isinstance(kind, Embedding):
        found = _embedding_norms(kind, a, g, rule)
    else:
        found = piece_norms(kind.pieces(a, g, needed), rule)
    norm1, square = (None if n is None else n[0] for n in found)
    return norm1, square, finite[0]


def _outer_norms(a: Tensor, g: Tensor, rule: ClipRule, *, l1: bool) -> tuple[Pair, Tensor]:
    """‖g aᵀ‖ = ‖g‖ ‖a‖ in L1 and in L2; entries are finite where this is, for nothing is summed."""
    needed = rule.needed
    w, b = float(needed.weight), float(needed.bias)
    (a1, a2), (g1, g2) = (row_sums(t, l1=l1 or needed.p == 1) for t in (a, g))
    norm1 = None if a1 is None or g1 is None else (a1 * w + b) * g1
    square = None if a2 is None or g2 is None else (a2 * w + b) * g2
    assert a2 is not None
    assert g2 is not None
    return (norm1, square if needed.p == 2 else None), (a2 * g2 + a2 + g2).isfinite()


def _product_norms(kind: Matrix, a: Tensor, g: Tensor, weight: Tensor, rule: ClipRule) -> Pair:
    """Norms of products over positions, by slices that keep patches in the cache."""
    parts = []
    for k, b in blocks(g.shape[:2], kind.patch_size(weight, g), g.device):
        left, right = kind.factors(a[k, b].flatten(0, 1), g[k, b].flatten(0, 1), weight)
        part = ClipRule(rule.needed, rule.clip, rule.mask[k, b], rule.votes_at)
        parts.append(norms_of_products(left, right.transpose(1, 2), part.mask.shape, part))
    norm1, square = (
        None if any(n is None for n in column) else torch.cat(column, 1)  # pyright: ignore
        for column in zip(*parts, strict=True)
    )
    return norm1, square


def _embedding_norms(kind: Embedding, x: Tensor, g: Tensor, rule: ClipRule) -> Pair:
    index, rows = kind.rows(x, g)
    parts = []
    for k, b in blocks(index.shape[:2], 2 * rows[0, 0].numel(), g.device):
        parts.append(piece_norms([token_sums(index[k, b], rows[k, b])], rule))
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
        kind: rule of the layer.
        a: see `input_of`.
        g: gradient of the output [B, ...].
        like: the weight, for its shape, or None.
        factor: [B].
        finite: which records count [B]; the others are zero.
        weight: whether the sum of the weight is wanted.
        bias: whether that of the bias is.
    """
    a, g, f, ok = a[None], g[None], factor[None].to(g.dtype), finite[None]
    (g,) = zeroed(ok, g)
    if not isinstance(kind, Embedding | Bias):
        (a,) = zeroed(ok, a)
    if isinstance(kind, Linear) and g.dim() == 3:
        scaled = g[0] * f[0][:, None]
        return scaled.t() @ a[0] if weight else None, scaled.sum(0) if bias else None
    if isinstance(kind, Matrix):
        return _product_sums(kind, a, g, like, f, weight=weight, bias=bias)
    if isinstance(kind, Embedding):
        index, rows = kind.rows(a, g)
        total = torch.zeros_like(like, dtype=g.dtype)
        rows = rows * per_record(f, rows)
        return total.index_add_(0, index.flatten(), rows.flatten(0, 2)), None
    needed = GradientsNeeded(2, x=False, weight=weight, bias=bias, counts=False)
    found = [weighted_sum(f, piece)[0] for piece in kind.pieces(a, g, needed)]
    return found[0] if weight else None, found[-1] if bias else None


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
