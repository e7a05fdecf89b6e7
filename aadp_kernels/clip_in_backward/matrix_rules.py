"""Clip-in-backward rules of layers that are matrix products: linear layers and convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aadp_kernels._dispatch import product_norms, record_kernels
from aadp_kernels.clip_in_backward.clip import (
    blocks,
    bounded,
    compute_dtype,
    factors_and_counts,
    finite_records,
    narrow,
    needs_l1,
    part_of,
    per_record,
    piece_norms,
    row_sums,
    single,
    slack_of,
    slice_elements,
    weighted_sum,
    without_votes,
    zeroed,
)
from aadp_kernels.clip_in_backward.products import (
    gram_is_cheaper,
    norms_of_products,
    weighted_products,
)
from aadp_kernels.contract import ClipRule, Geometry, GradientsNeeded

# Gradients [K, ...] of x, weight and bias and counts [K, 3]; None where not needed.
Results = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Sums = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Matrix:
    """A layer whose weight gradient is a product over positions, g [P, out]ᵀ a [P, columns]."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The ordinary layer."""
        raise NotImplementedError

    def kept(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """`LayerKind.kept`."""
        return (self.forward(x, weight, bias),)

    def input_grad(self, x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        """The ordinary gradient of x [K, B, ...]; weight is [K, ...] or [1, ...]."""
        raise NotImplementedError

    def factors(self, a: Tensor, g: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Records a, g [R, ...] as a [R·groups, P, columns] and g [R·groups, out/groups, P]."""
        raise NotImplementedError

    def patch_size(self, weight: Tensor, grad: Tensor) -> int:
        """Elements that `factors` writes for each record."""
        raise NotImplementedError

    def geometry(self, a: Sequence[int], g: Sequence[int], weight: Tensor) -> Geometry:
        """Where the numba kernel finds positions and columns, from the shapes of a record."""
        raise NotImplementedError

    def record_input_grad(self, x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        """`input_grad` of one client, without the clients' axis."""
        raise NotImplementedError

    def weight_grad(self, flat: Tensor, weight: Tensor) -> Tensor:
        """[K, *weight.shape] from [K, elements] in the order of `factors`."""
        return flat.view(-1, *weight.shape)

    def backward(self, x: Tensor, grad: Tensor, weight: Tensor, rule: ClipRule) -> Results:
        """Clipped sums; slices of the batch keep patches and record gradients in the cache."""
        needed = rule.needed
        grad_x = self.input_grad(x, grad, weight) if needed.x else None
        dtype, single = compute_dtype(grad), weight[0]
        if not (needed.weight or needed.bias or needed.counts):
            return grad_x, None, None, None
        rule = without_votes(rule)
        kernels = record_kernels(grad if grad.dtype == dtype else grad.to(dtype))
        if kernels is not None:
            a, g = x.to(dtype), grad.to(dtype)
            geometry = self.geometry(a.shape[2:], g.shape[2:], single)
            sums = kernels.product_sums(a, g, geometry, len(single), rule)
            if sums is not None:
                return grad_x, *_needed(sums, single.shape, needed)
        size = [x.shape[0], single.shape[0]]
        sum_w = grad.new_zeros(size[0], single.numel(), dtype=dtype) if needed.weight else None
        sum_b = grad.new_zeros(size, dtype=dtype) if needed.bias else None
        counts = grad.new_zeros(size[0], 3, dtype=torch.float64) if needed.counts else None
        cost = self.patch_size(single, grad)
        if not self.norms_only(single, grad, rule):
            cost += single.numel()
        for k, b in blocks(x.shape[:2], cost, x.device):
            finite, a, g = finite_records(x[k, b].to(dtype), grad[k, b].to(dtype))
            parts = self._clipped(a, g, finite, single, part_of(rule, k, b))
            if finite.shape == x.shape[:2]:
                sum_w, sum_b, counts = parts
                break
            for total, part in zip((sum_w, sum_b, counts), parts, strict=True):
                if total is not None and part is not None:
                    total[k] += part
        return grad_x, None if sum_w is None else self.weight_grad(sum_w, single), sum_b, counts

    def _clipped(
        self, a: Tensor, g: Tensor, finite: Tensor, weight: Tensor, rule: ClipRule
    ) -> Sums:
        """Clipped sums of weight [K, elements] and bias [K, out] and counts of a slice."""
        count, needed = finite.shape, rule.needed
        left, right = self.factors(a.flatten(0, 1), g.flatten(0, 1), weight)
        if self.norms_only(weight, g, rule):
            return _clipped_by_norms(left, right.transpose(1, 2), finite, rule)
        pieces = []
        if needed.weight:
            pieces.append(torch.bmm(right, left).view(*count, weight.shape[0], -1))
        if needed.bias:
            pieces.append(right.sum(-1).view(*count, 1, weight.shape[0]))
        norm1, square = piece_norms(pieces, rule)
        slack = slack_of(max(piece.shape[-1] for piece in pieces), a)
        factor, counts = factors_and_counts(norm1, square, finite, rule, slack)
        factor = narrow(factor, a.dtype)
        sums = [weighted_sum(factor, piece.flatten(2)) for piece in pieces]
        return (
            sums[0] if needed.weight else None,
            sums[-1] if needed.bias else None,
            counts,
        )

    def single_client(
        self, saved: Sequence[Any], kept: Sequence[Tensor], grad: Tensor, needs: Sequence[bool],
        p: int,
    ) -> tuple[Tensor | None, ...] | None:  # fmt: skip
        """`LayerKind.single_client`."""
        x, weight = saved[:2]
        short = single(saved, grad, needs, p, x, weight)
        if short is None:
            return None
        geometry = self.geometry(x.shape[1:], grad.shape[1:], weight)
        sums = short.kernels.product_single(x, grad, geometry, len(weight), short.needed, short.one)
        if sums is None:
            return None
        grad_x = self.record_input_grad(x, grad, weight) if needs[0] else None
        return short.results(grad_x, sums[0].view(weight.shape) if needs[1] else None, *sums[1:])

    def prefers_gram(self, weight: Tensor, grad: Tensor, rule: ClipRule) -> bool:
        """Whether Gram matrices are the cheapest way to the norms that the rule needs."""
        return False

    def norms_only(self, weight: Tensor, grad: Tensor, rule: ClipRule) -> bool:
        """Whether a record's weight gradient is never held: too large, or nothing needs it."""
        return (
            weight.numel() > slice_elements(grad.device)
            or product_norms(grad) is not None
            or self.prefers_gram(weight, grad, rule)
        )


def _clipped_by_norms(left: Tensor, g: Tensor, finite: Tensor, rule: ClipRule) -> Sums:
    """`Matrix._clipped` with norms that need no gradient of a record, and one product for the sum.

    Args:
        left: [R·groups, P, columns].
        g: [R·groups, P, out/groups].
        finite: which records are finite [K, B]; the others are zero.
        rule: how to clip.
    """
    norm1, square = norms_of_products(left, g, finite.shape, rule)
    columns = max(left.shape[-1], g.shape[-1] * (len(g) // max(1, finite.numel())))
    factor, counts = factors_and_counts(norm1, square, finite, rule, slack_of(columns, left))
    needed = rule.needed
    sums = weighted_products(
        left, g, narrow(factor, left.dtype), weight=needed.weight, bias=needed.bias
    )
    return *sums, counts


def _needed(
    sums: tuple[Tensor, Tensor, Tensor], shape: torch.Size, needed: GradientsNeeded
) -> Sums:
    """Sums of weight, bias and counts, None where they are not needed."""
    weight, bias, counts = sums
    return (
        weight.view(-1, *shape) if needed.weight else None,
        bias if needed.bias else None,
        counts if needed.counts else None,
    )


@dataclass(frozen=True)
class Linear(Matrix):
    """y = x Wᵀ + b on x [B, in] or [B, ..., in]."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def input_grad(self, x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(grad.dtype)
        if len(weight) == 1:
            return self.record_input_grad(x, grad, weight[0]).to(x.dtype)
        rows = grad.reshape(grad.shape[0], -1, grad.shape[-1])
        return torch.bmm(rows, weight).reshape(x.shape).to(x.dtype)

    def factors(self, a: Tensor, g: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return a.flatten(1, -2), g.flatten(1, -2).transpose(1, 2)

    def patch_size(self, weight: Tensor, grad: Tensor) -> int:
        return 0

    def prefers_gram(self, weight: Tensor, grad: Tensor, rule: ClipRule) -> bool:
        positions = math.prod(grad.shape[2:-1])
        fits = grad.is_cpu and rule.needed.weight and not needs_l1(rule)
        return fits and gram_is_cheaper(positions, weight.shape[1], len(weight), grad)

    def record_input_grad(self, x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        return grad.matmul(weight)

    def geometry(self, a: Sequence[int], g: Sequence[int], weight: Tensor) -> Geometry:
        positions, features = math.prod(a[:-1]), a[-1]
        return Geometry(
            1, (positions, features), (0, 0), 1, (positions, 1), (1, 1), (1, features), (1, 1), True
        )

    def backward(self, x: Tensor, grad: Tensor, weight: Tensor, rule: ClipRule) -> Results:
        needed = rule.needed
        if x.dim() > 3 or not (needed.weight or needed.bias or needed.counts):
            return super().backward(x, grad, weight, rule)
        grad_x = self.input_grad(x, grad, weight) if needed.x else None
        dtype = compute_dtype(grad)
        sums = self._product_norms(x.to(dtype), grad.to(dtype), rule)
        return grad_x, sums[0], sums[1], sums[2]

    def _product_norms(self, a: Tensor, g: Tensor, rule: ClipRule) -> Sums:
        """‖g aᵀ‖ = ‖g‖ ‖a‖ in L1 and in L2, so no record's gradient is formed."""
        needed = rule.needed
        kernels = record_kernels(a)
        if kernels is not None:
            found = kernels.scale_linear(a, g, rule)
            sum_w = None
            if needed.weight:
                sum_w = torch.bmm(found.g.transpose(1, 2), a if found.clean else _without_nan(a))
            bias, counts = needed.bias, needed.counts
            return sum_w, found.total if bias else None, found.counts if counts else None
        w, b = float(needed.weight), float(needed.bias)
        a1, a2 = row_sums(a, l1=needs_l1(rule), l2=needed.p == 2)
        g1, g2 = row_sums(g, l1=needs_l1(rule), l2=needed.p == 2)
        norm1 = None if a1 is None or g1 is None else (a1 * w + b) * g1
        square = None if a2 is None or g2 is None else (a2 * w + b) * g2
        if a2 is None or g2 is None:
            assert a1 is not None
            assert g1 is not None
            a2, g2 = a1.square(), g1.square()
        finite = bounded(a2, g2, dtype=a.dtype)
        slack = slack_of(a.shape[-1] + g.shape[-1], a, norms=2)
        factor, counts = factors_and_counts(norm1, square, finite, rule, slack)
        a, g = zeroed(finite, a, g)
        # The extra rounding of each scaled entry is covered by a factor a little smaller.
        factor = narrow(factor, a.dtype)
        factor = torch.where(factor == 1, factor, factor * (1 - 4 * torch.finfo(a.dtype).eps))
        scaled = g * per_record(factor, g)
        sum_w = torch.bmm(scaled.transpose(1, 2), a) if needed.weight else None
        return sum_w, scaled.sum(1) if needed.bias else None, counts

    def single_client(
        self, saved: Sequence[Any], kept: Sequence[Tensor], grad: Tensor, needs: Sequence[bool],
        p: int,
    ) -> tuple[Tensor | None, ...] | None:  # fmt: skip
        x, weight = saved[:2]
        if x.dim() > 2:
            return super().single_client(saved, kept, grad, needs, p)
        short = single(saved, grad, needs, p, x, weight)
        if short is None:
            return None
        scaled, total, clean, counts = short.kernels.scale_single(x, grad, short.needed, short.one)
        grad_x = grad.mm(weight) if needs[0] else None
        grad_w = scaled.t().mm(x if clean else _without_nan(x)) if needs[1] else None
        return short.results(grad_x, grad_w, total, counts)


def _without_nan(a: Tensor) -> Tensor:
    """0 · NaN is NaN: factors of zero alone do not silence a record."""
    return torch.where(a.isfinite(), a, 0.0)


@dataclass(frozen=True)
class Conv(Matrix):
    """Convolution of x [B, in, *size] with zero padding; one entry a spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        call = F.conv1d if len(self.stride) == 1 else F.conv2d
        return call(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_grad(self, x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(grad.dtype)
        if len(weight) == 1:
            flat = self.record_input_grad(x.flatten(0, 1), grad.flatten(0, 1), weight[0])
            return flat.reshape(x.shape).to(x.dtype)
        rows = [self.record_input_grad(*row) for row in zip(x, grad, weight, strict=True)]
        return torch.stack(rows).to(x.dtype)

    def record_input_grad(self, x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        # Only the shape of x matters here; anything that is not contiguous would be copied.
        like = x if x.dtype == grad.dtype else grad.new_empty(x.shape)
        return torch.ops.aten.convolution_backward(
            grad, like, weight, None, self.stride, self.padding, self.dilation, False,
            (0,) * len(self.stride), self.groups, (True, False, False),
        )[0]  # fmt: skip

    def factors(self, a: Tensor, g: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        patches = self._patches(a, weight.shape[2:])
        positions, columns = patches.shape[-2:]
        out = weight.shape[0] // self.groups
        return patches.reshape(-1, positions, columns), g.reshape(-1, out, positions)

    def _patches(self, a: Tensor, kernel: torch.Size) -> Tensor:
        """Patches, copied from a strided view: faster than F.unfold.

        [R, positions, kernel * in] without groups, [R, groups, positions, kernel * in/groups] with.
        """
        dims = len(kernel)
        a = a.movedim(1, -1)
        if any(self.padding):
            a = F.pad(a, [0, 0, *(n for pad in reversed(self.padding) for n in (pad, pad))])
        # With the channels last a copy moves (last kernel size) * in neighbours at a time.
        view = a.contiguous()
        for i, (size, step, gap) in enumerate(zip(kernel, self.stride, self.dilation, strict=True)):
            view = view.unfold(i + 1, gap * (size - 1) + 1, step)[..., ::gap]
        # view: [R, *positions, in, *kernel]
        order = [0, *range(1, dims + 1), *range(dims + 2, 2 * dims + 2), dims + 1]
        view = view.permute(order)
        if self.groups == 1:
            return view.flatten(dims + 1).flatten(1, dims)
        view = view.unflatten(-1, (self.groups, -1)).movedim(-2, 1)
        return view.flatten(dims + 2).flatten(2, dims + 1)

    def patch_size(self, weight: Tensor, grad: Tensor) -> int:
        return math.prod(weight.shape[1:]) * self.groups * math.prod(grad.shape[3:])

    def geometry(self, a: Sequence[int], g: Sequence[int], weight: Tensor) -> Geometry:
        return Geometry(
            a[0], _plane(a[1:]), _plane(self.padding, 0), self.groups,
            _plane(g[1:]), _plane(self.stride), _plane(weight.shape[2:]),
            _plane(self.dilation), False,
        )  # fmt: skip

    def weight_grad(self, flat: Tensor, weight: Tensor) -> Tensor:
        out, channels, *kernel = weight.shape
        return flat.view(-1, out, *kernel, channels).movedim(-1, 2)


def _plane(axes: Sequence[int], missing: int = 1) -> tuple[int, int]:
    """One or two spatial axes as two."""
    first, last = (missing, *axes)[-2:]
    return first, last
