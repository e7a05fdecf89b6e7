"""Norms and weighted sums of records whose weight gradient is a product over positions.

A record's gradient is g [P, out]ᵀ a [P, columns]. It is formed for neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aadp_kernels._dispatch import record_kernels
from aadp_kernels.clip_in_backward.clip import (
    needs_l1,
    piece_norms,
    plus,
    slice_elements,
    sums_of_products,
)
from aadp_kernels.contract import ClipRule

# What an entry of a Gram matrix costs more than one of a product in float32: it is float64, with
# its conversion; compiled, half of the entries are enough.
_WIDE, _COMPILED = 2.5, 1.0


def gram_is_cheaper(positions: int, columns: int, out: int, like: Tensor) -> bool:
    """Whether Gram matrices in float64 cost less than the product: P²(d + p) against P·d·p."""
    wide = _WIDE if record_kernels(like) is None else _COMPILED
    return wide * positions * (columns + out) <= columns * out


def gram_squares(a: Tensor, g: Tensor, *, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Squared L2 norms of the gradients g[r]ᵀ a[r], and of the bias: never too small, float64 [R].

    Then those of a[r] and of g[r].

    ‖gᵀa‖² = Σ_st (a_s·a_t)(g_s·g_t), and the bias is one more column of ones. What cancels in this
    sum leaves its rounding error, at most (d + p + P²)u (Σ_t ‖a_t‖‖g_t‖)², which is added twice.

    Args:
        a: [R, P, columns], finite (else the first result says nothing).
        g: [R, P, out], finite.
        bias: whether there is a bias that has a gradient.
    """
    positions, width = a.shape[1], a.shape[2] + g.shape[2]
    bound = (width + positions**2 + 16) * torch.finfo(torch.float64).eps
    kernels = record_kernels(a)
    if kernels is not None:
        return kernels.gram_squares(a, g, bias, bound)
    rows, found = max(1, slice_elements(a.device) // max(1, positions * width)), []
    for part, slope in zip(a.split(rows), g.split(rows), strict=True):
        of_a, of_g = _gram(part), _gram(slope)
        traces = [t.diagonal(dim1=1, dim2=2).sum(1) for t in (of_a, of_g)]
        if bias:
            of_a += 1
        lengths = of_a.diagonal(dim1=1, dim2=2) * of_g.diagonal(dim1=1, dim2=2)
        square = of_a.mul_(of_g).sum((1, 2)).clamp(min=0)
        found.append((square + bound * lengths.sqrt().sum(1).square(), *traces))
    square, of_a, of_g = (torch.cat(column) for column in zip(*found, strict=True))
    return square, of_a, of_g


def _gram(x: Tensor) -> Tensor:
    """Products of all pairs of rows of x [R, P, n]: float64 [R, P, P]."""
    wide = x.to(torch.float64)
    return torch.bmm(wide, wide.transpose(1, 2))


def gram_fits(a: Tensor, g: Tensor, rule: ClipRule) -> bool:
    """Whether norms of g[r]ᵀ a[r], a [R, P, columns] and g [R, P, out], are best taken by Gram."""
    fits = a.is_cpu and rule.needed.weight and not needs_l1(rule)
    return fits and gram_is_cheaper(a.shape[1], a.shape[2], g.shape[2], a)


def norms_of_products(
    a: Tensor, g: Tensor, count: torch.Size, rule: ClipRule
) -> tuple[Tensor | None, Tensor | None]:
    """L1 norms and squared L2 norms [K, B] of weight and bias, float64; None where not needed.

    Args:
        a: [K·B·groups, P, columns].
        g: [K·B·groups, P, out].
        count: (K, B).
        rule: which norms are needed, and of which gradients.
    """
    needed = rule.needed
    if gram_fits(a, g, rule):
        square, _, _ = gram_squares(a, g, bias=needed.bias)
        return None, square.view(*count, -1).sum(-1)
    bias = g.sum(1).view(*count, -1)
    norm1, square = piece_norms([bias if needed.bias else bias[..., :0]], rule)
    if needed.weight:
        more1, more2 = (
            None if n is None else n.view(*count, -1).sum(-1) for n in sums_of_products(a, g, rule)
        )
        norm1, square = plus(norm1, more1), plus(square, more2)
    return norm1, square


def weighted_products(
    a: Tensor, g: Tensor, factor: Tensor, *, weight: bool, bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Sums over records of factor [K, B] times their gradients: [K, out·columns] and [K, out].

    One matrix product over all records and positions.

    Args:
        a: [K·B·groups, P, columns], finite.
        g: [K·B·groups, P, out], finite.
        factor: of the dtype of g.
        weight: whether the sum of the weight is wanted.
        bias: whether that of the bias is.
    """
    groups = len(g) // max(1, factor.numel())
    scaled = g * factor.flatten().repeat_interleave(groups)[:, None, None]
    rows = _by_group(scaled, factor.shape, groups)
    sum_w = None
    if weight:
        columns = _by_group(a, factor.shape, groups)
        sum_w = torch.bmm(rows.transpose(1, 2), columns).view(factor.shape[0], -1)
    return sum_w, rows.sum(1).view(factor.shape[0], -1) if bias else None


def _by_group(t: Tensor, count: torch.Size, groups: int) -> Tensor:
    """[K·B·groups, P, n] as [K·groups, B·P, n]."""
    t = t.reshape(*count, groups, *t.shape[1:]).transpose(1, 2)
    return t.reshape(count[0] * groups, -1, t.shape[-1])
