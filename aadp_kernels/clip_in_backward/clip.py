"""What every clip-in-backward rule shares: norms of records, clip factors, counts, slices.

Tensors have two leading axes, clients [K] and records [B]: `torch.func.vmap` over clients becomes
an axis here, and a single client has K = 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aadp_kernels._dispatch import product_norms, record_kernels
from aadp_kernels.certified import largest
from aadp_kernels.contract import ClipRule, GradientsNeeded, OneClient, RecordKernels

# Neighbours that an accelerator sums in their own dtype; sums of these sums are float64.
RUN = 16
SLICE = {"cpu": 1 << 20}
_DEVICE_SLICE = 1 << 26


def rule_of(
    needed: GradientsNeeded, clip: Tensor, mask: Tensor | None, votes_at: Tensor | None, x: Tensor
) -> ClipRule:
    """The rule of an operation on x [K, B, ...], from its arguments."""
    count = x.shape[:2]
    if mask is None:
        live = torch.ones(count, dtype=torch.bool, device=x.device)
    else:
        live = (mask != 0).expand(count)
    if not needed.counts:
        votes_at = None
    elif votes_at is not None:
        votes_at = votes_at.detach().to(torch.float64).expand(count[0])
        if branches_on_data(votes_at) and record_kernels(votes_at) is None:
            votes_at = None if bool(votes_at.isnan().all()) else votes_at
    return ClipRule(needed, clip.detach().to(torch.float64).expand(count[0]), live, votes_at)


class Single(NamedTuple):
    """One client's backward of a layer, outside of vmap, where compiled kernels do all of it.

    A small layer's step is mostly the time of calls, so nothing is made here that they need not.

    Attributes:
        kernels: The kernels.
        needed: Gradients that are wanted.
        one: How to clip.
        counted: What the counts are the gradient of, or None.
    """

    kernels: RecordKernels
    needed: GradientsNeeded
    one: OneClient
    counted: Tensor | None

    def results(
        self, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, counts: Any
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments of a layer, None for those that are not wanted."""
        seen = None
        if self.counted is not None:
            seen = torch.as_tensor(counts).to(self.counted.dtype)
        needed = self.needed
        return (
            x if needed.x else None, weight if needed.weight else None,
            bias if needed.bias else None, None, None, None, seen, None, None,
        )  # fmt: skip


def single(
    saved: Sequence[Any], grad: Tensor, needs: Sequence[bool], p: int, *same: Tensor | None
) -> Single | None:
    """How one client's backward is computed in a short way; None if that way is not open.

    Args:
        saved: x, weight, bias, clip, mask, votes_at and probe of a layer.
        grad: gradient of its output.
        needs: which of the arguments need a gradient.
        p: norm of the clipping.
        *same: what must have the dtype of the gradient.
    """
    kernels = record_kernels(grad)
    if kernels is None or not grad.numel() or torch.is_autocast_enabled("cpu"):
        return None
    if any(t is not None and t.dtype != grad.dtype for t in same):
        return None
    _, _, _, clip, mask, votes_at, probe = saved
    counted = probe if needs[6] else None
    needed = GradientsNeeded(p, needs[0], needs[1], needs[2], counted is not None)
    one = OneClient(clip, mask, None if counted is None else votes_at)
    return Single(kernels, needed, one, counted)


def needs_l1(rule: ClipRule) -> bool:
    """Whether L1 norms are needed: to clip or to vote."""
    return rule.needed.p == 1 or rule.votes_at is not None


def without_votes(rule: ClipRule) -> ClipRule:
    """The rule without votes if nobody votes and Python may look: L1 norms cost a product."""
    level = rule.votes_at
    if level is None or not branches_on_data(level) or not bool(level.isnan().all()):
        return rule
    return replace(rule, votes_at=None)


def part_of(rule: ClipRule, clients: slice, records: slice) -> ClipRule:
    """The rule of some clients' records."""
    votes_at = None if rule.votes_at is None else rule.votes_at[clients]
    return ClipRule(rule.needed, rule.clip[clients], rule.mask[clients, records], votes_at)


def factors_and_counts(
    norm1: Tensor | None, square: Tensor | None, finite: Tensor, rule: ClipRule, slack: float
) -> tuple[Tensor, Tensor | None]:
    """Clip factors [K, B], 0 for records that do not count, and counts [K, 3].

    Args:
        norm1: L1 norms [K, B], float64; None where `needs_l1` is false.
        square: squared L2 norms [K, B], float64; None where p is 1.
        finite: which records are finite, bool [K, B].
        rule: how to clip.
        slack: relative error bound of the norms; they are inflated by it, so that
            factor · norm <= clip holds for the true norm.
    """
    norm, counted = norm1 if square is None else square.sqrt(), rule.needed.counts
    assert norm is not None
    kernels = record_kernels(norm)
    if kernels is not None:
        factor, counts = kernels.factors_and_counts(norm1, norm, finite, rule, slack)
        return factor, counts if counted else None
    norm = norm * (1 + slack)
    live = finite & rule.mask
    over = ~(norm <= rule.clip[:, None])
    # A clip norm that is NaN or negative silences the client instead of not clipping it.
    bound = torch.where(rule.clip >= 0, rule.clip * (1 - 1e-12), 0.0)
    factor = torch.where(over, bound[:, None] / torch.where(over, norm, 1.0), 1.0)
    factor = torch.where(live, factor, 0.0)
    if not counted:
        return factor, None
    votes = torch.zeros_like(norm)
    if rule.votes_at is not None:
        assert norm1 is not None
        level = rule.votes_at[:, None]
        votes = torch.where(norm1 <= level, 0.5, -0.5).to(torch.float64)
        votes = torch.where(live & ~level.isnan(), votes, 0.0)
    counts = torch.stack([votes, (over & live).double(), (rule.mask & ~finite).double()], -1)
    return factor, counts.sum(1)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Half precision is clipped in float32."""
    return torch.promote_types(x.dtype, torch.float32)


def branches_on_data(x: Tensor) -> bool:
    """Whether Python may look at values: not on a device (it would wait) nor in a trace."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def finite_records(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which records are finite [K, B], and a and g [K, B, ...] with the others set to zero.

    The product of the L2 norms of a record's input and output gradient bounds each entry of its
    weight gradient. Far below the square root of the dtype's maximum no norm can overflow.
    """
    finite = bounded(*(row_sums(t, l1=False)[1] for t in (a, g)), dtype=a.dtype)
    a, g = zeroed(finite, a, g)
    return finite, a, g


def bounded(*squares: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Which records are finite, from the squared L2 norms of what their gradient is made of."""
    norms = [square.sqrt() for square in squares if square is not None]
    bound = norms[0] if len(norms) == 1 else norms[0] * norms[1] + norms[0] + norms[1]
    return bound <= largest(dtype)


def row_sums(x: Tensor, *, l1: bool = True, l2: bool = True) -> tuple[Tensor | None, Tensor | None]:
    """L1 norms and squared L2 norms of records [K, B, ...]: float64 [K, B], None if not asked for.

    On a CPU every sum is float64. Elsewhere a wide copy of all elements would take three times the
    memory, so `RUN` neighbours are summed in the dtype of x first.
    """
    kernels = record_kernels(x)
    if kernels is not None:
        return kernels.row_sums(x)
    sums = _wide_sums if x.is_cpu else run_sums
    return sums(x, 1) if l1 else None, sums(x, 2) if l2 else None


def _wide_sums(x: Tensor, p: int) -> Tensor:
    """Σ|x|^p of records [K, B, ...], float64."""
    if p == 1:
        rows = x.abs().sum(-1, dtype=torch.float64)
    else:
        rows = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64).square()
    return rows.reshape(*x.shape[:2], -1).sum(-1)


def run_sums(x: Tensor, p: int) -> Tensor:
    """`_wide_sums` from norms of runs of the last axis, and of what is left of it."""
    whole = x.shape[-1] // RUN * RUN
    runs = [x[..., :whole].unflatten(-1, (-1, RUN))] if whole else []
    if whole < x.shape[-1] or not whole:
        runs.append(x[..., whole:])
    total = None
    for run in runs:
        norms = torch.linalg.vector_norm(run, p, dim=-1).to(torch.float64)
        total = plus(total, norms.reshape(*x.shape[:2], -1).pow(p).sum(-1))
    assert total is not None
    return total


def zeroed(finite: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors [K, B, ...] with the records that are not finite set to zero."""
    # Zeroing costs a pass over each.
    if branches_on_data(finite) and bool(finite.all()):
        return tensors
    return tuple(torch.where(per_record(finite, t), t, 0.0) for t in tensors)


def per_record(values: Tensor, like: Tensor) -> Tensor:
    """View [K, B] so that it broadcasts against [K, B, ...]."""
    return values.view(*values.shape, *[1] * (like.dim() - 2))


def piece_norms(pieces: Sequence[Tensor], rule: ClipRule) -> tuple[Tensor | None, Tensor | None]:
    """L1 norms and squared L2 norms [K, B], float64, of records given in pieces [K, B, ..., n].

    Each is None where the rule needs it not.
    """
    norm1 = square = None
    l1, l2 = needs_l1(rule), rule.needed.p == 2
    for piece in pieces:
        sums = row_sums(piece, l1=l1, l2=l2)
        norm1 = plus(norm1, sums[0]) if l1 else None
        square = plus(square, sums[1]) if l2 else None
    return norm1, square


def plus(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    """total + term, None where a norm is not needed."""
    return term if total is None or term is None else total + term


def sums_of_products(a: Tensor, g: Tensor, rule: ClipRule) -> tuple[Tensor | None, Tensor | None]:
    """`piece_norms` of the products g[b]ᵀ a[b], which are not written as a whole.

    Args:
        a: [B, T, in].
        g: [B, T, out].
        rule: which norms are needed.

    Returns:
        L1 norms and squared L2 norms, float64 [B].
    """
    fused = product_norms(a)
    if fused is not None:
        norm1, square = fused(a, g)
        return norm1 if needs_l1(rule) else None, square if rule.needed.p == 2 else None
    norm1 = square = None
    rows = max(1, slice_elements(a.device) // max(1, len(a) * a.shape[-1]))
    for start in range(0, g.shape[-1], rows):
        block = torch.bmm(g[..., start : start + rows].transpose(1, 2), a)
        sums = piece_norms([block[None]], rule)
        norm1 = sums[0] if norm1 is None else plus(norm1, sums[0])
        square = sums[1] if square is None else plus(square, sums[1])
    return None if norm1 is None else norm1[0], None if square is None else square[0]


def slack_of(columns: int, like: Tensor, norms: int = 1) -> float:
    """Relative error bound of the product of some norms that `row_sums` took.

    Args:
        columns: elements of a row.
        like: a tensor of the device and dtype of what was summed.
        norms: how many norms are multiplied.
    """
    wide = 2.0**-33 + columns * 2.0**-52
    return norms * (wide if like.is_cpu else wide + RUN / 2 * torch.finfo(like.dtype).eps)


def narrow(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Clip factors rounded down to a dtype; 0 and 1 stay as they are."""
    lower = (factor * (1 - 2 * torch.finfo(dtype).eps)).to(dtype)
    return torch.where(factor == 1, factor.to(dtype), lower)


def weighted_sum(factor: Tensor, records: Tensor) -> Tensor:
    """Σ over records of factor [K, B] · records [K, B, n]: [K, n]."""
    if len(factor) == 1:
        return torch.mv(records[0].t(), factor[0])[None]
    return torch.bmm(factor[:, None], records)[:, 0]


def slice_elements(device: torch.device) -> int:
    """Elements of work memory at once: on a CPU what stays in the cache."""
    return SLICE.get(device.type, _DEVICE_SLICE)


def blocks(shape: Sequence[int], cost: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Rectangles (clients, records) that cover [K, B] with about SLICE elements of work memory.

    Whole clients share a rectangle as long as they fit: small batches of many clients cost as few
    launches as one large batch.

    Args:
        shape: (K, B).
        cost: elements of work memory a record.
        device: where the work is done; on a CPU a slice stays in the cache.
    """
    clients, records = shape
    rows = max(1, slice_elements(device) // max(1, cost))
    width = max(1, min(rows, records))
    height = max(1, rows // max(1, records)) if width == records else 1
    for k in range(0, clients, height):
        for b in range(0, records, width):
            yield slice(k, k + height), slice(b, b + width)
