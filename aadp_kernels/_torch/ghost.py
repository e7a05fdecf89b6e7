"""Clip-in-backward: functions whose weight gradient is a sum of clipped per-record gradients.

The layer's own backward knows everything that per-layer clipping needs, so one backward pass is
enough and no gradient of a whole model is held per record.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
)

Pair = tuple[int, int]
Spec = tuple[Pair, Pair, Pair, int]  # stride, padding, dilation, groups

_SLICE = 1 << 20


def _finite_records(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which records are finite [B], and x and g with the others set to zero.

    The product of the L2 norms of a record's input and output gradient bounds each entry of its
    weight gradient. Far below the square root of the dtype's maximum no norm can overflow.
    """
    norm_x = torch.linalg.vector_norm(x.flatten(1), dim=1)
    norm_g = torch.linalg.vector_norm(g.flatten(1), dim=1)
    finite = norm_x * norm_g + norm_x + norm_g <= torch.finfo(x.dtype).max ** 0.5 / 4096
    # Zeroing costs a pass over both; a branch on data is possible on a CPU outside functorch only.
    if x.device.type == "cpu" and not in_functorch() and bool(finite.all()):
        return finite, x, g
    x = torch.where(finite.view(-1, *[1] * (x.dim() - 1)), x, 0.0)
    g = torch.where(finite.view(-1, *[1] * (g.dim() - 1)), g, 0.0)
    return finite, x, g


def in_functorch() -> bool:
    """Whether a torch.func transform or torch.compile is at work."""
    return torch.compiler.is_compiling() or peek_interpreter_stack() is not None


def _factors(norm: Tensor, clip: Tensor, live: Tensor, slack: float) -> tuple[Tensor, Tensor]:
    """Clip factors [B] (0 for records that do not count) and which records were clipped.

    The norm is inflated by its rounding bound first, so factor * norm <= clip for the true norm.
    """
    norm = norm * (1 + slack)
    over = norm > clip
    factor = torch.where(over, clip * (1 - 1e-12) / torch.where(over, norm, 1.0), 1.0)
    return torch.where(live, factor, 0.0), over & live


def _counts(norm1: Tensor | None, clipped, finite, mask, votes_at, probe) -> Tensor:
    """(votes, clipped, non-finite) of the batch, [3]; only live records vote."""
    live = mask & finite
    votes = torch.zeros_like(live, dtype=torch.float64)
    if norm1 is not None and votes_at is not None:
        ballot = torch.where(norm1 <= votes_at, 0.5, -0.5).to(torch.float64)
        votes = torch.where(live & ~torch.isnan(votes_at), ballot, 0.0)
    sums = (votes.sum(0), clipped.sum(0), (mask & ~finite).sum(0))
    return torch.stack([s.to(torch.float64) for s in sums]).to(probe.dtype)


def _live(mask: Tensor | None, x: Tensor) -> Tensor:
    """The mask as bool [B]."""
    if mask is None:
        return torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    return (mask != 0).expand(x.shape[0])


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Half precision is clipped in float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _row_norms(grads: Tensor, p: int, *, votes: bool) -> tuple[Tensor, Tensor | None]:
    """Norms of per-record gradients [B, rows, columns]: the clipping norm, and L1 if asked for."""
    norm1 = None
    if p == 1 or votes:
        norm1 = grads.abs().sum(-1).to(torch.float64).sum(-1)
        if p == 1:
            return norm1, norm1
    norm2 = torch.linalg.vector_norm(grads, dim=-1).to(torch.float64).square().sum(-1).sqrt()
    return norm2, norm1


def _clip_rows(grads, bias_grads, finite, mask, clip, votes_at, probe, p, want_probe):
    """Clip materialised per-record gradients [B, rows, columns] (+ bias [B, rows]) and sum them."""
    votes = votes_at is not None and want_probe
    norm, norm1 = _row_norms(grads, p, votes=votes)
    slack = (grads.shape[-1] + 16) * torch.finfo(grads.dtype).eps
    if bias_grads is not None:
        wide = bias_grads.to(torch.float64)
        bias1 = wide.abs().sum(-1)
        norm1 = None if norm1 is None else norm1 + bias1
        if p == 1:
            assert norm1 is not None
            norm = norm1
        else:
            norm = (norm.square() + wide.square().sum(-1)).sqrt()
    live = finite & mask
    factor, clipped = _factors(norm, clip.to(torch.float64), live, slack)
    factor = factor.to(grads.dtype) * (1 - torch.finfo(grads.dtype).eps)
    factor = torch.where(clipped, factor, live.to(grads.dtype))
    weight_grad = torch.mv(grads.flatten(1).t(), factor)
    bias_grad = None if bias_grads is None else torch.mv(bias_grads.t(), factor)
    counts = _counts(norm1, clipped, finite, mask, votes_at, probe) if want_probe else None
    return weight_grad, bias_grad, counts


class ClippedLinear(torch.autograd.Function):
    """y = x Wᵀ + b; backward clips each record's (dW, db) jointly before the sum."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, clip, mask, votes_at, probe, p):
        """Exactly torch.nn.functional.linear."""
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs; per-record gradients exist in backward only."""
        x, weight, bias, clip, mask, votes_at, probe, p = inputs
        ctx.save_for_backward(x, weight, clip, mask, votes_at, probe)
        ctx.p = p
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Clipped sums for weight and bias, the ordinary gradient for x, counts for the probe."""
        x, weight, clip, mask, votes_at, probe = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        need_probe = probe is not None and ctx.needs_input_grad[6]
        grad_x = grad.matmul(weight) if need_x else None
        if not (need_w or need_b or need_probe):
            return grad_x, None, None, None, None, None, None, None
        dtype = _compute_dtype(x)
        finite, a, g = _finite_records(x.to(dtype), grad.to(dtype))
        live = _live(mask, x)
        args = (clip, votes_at, probe, ctx.p, need_probe)
        if x.dim() == 2:
            clipped = _linear_ghost(a, g, finite, live, ctx.has_bias, *args)
        else:
            a, g = a.flatten(1, -2), g.flatten(1, -2)
            bias_grads = g.sum(1) if ctx.has_bias else None
            grads = torch.bmm(g.transpose(1, 2), a)
            clipped = _clip_rows(grads, bias_grads, finite, live, *args)
        grad_w, grad_b, counts = clipped
        grad_w = grad_w.view(weight.shape).to(weight.dtype)
        grad_b = grad_b.to(weight.dtype) if need_b and grad_b is not None else None
        return grad_x, grad_w if need_w else None, grad_b, None, None, None, counts, None


def _linear_ghost(a, g, finite, mask, has_bias, clip, votes_at, probe, p, want_probe):
    """‖g aᵀ‖ = ‖g‖ ‖a‖ in L1 and in L2, so no per-record gradient is formed."""
    a64, g64 = a.to(torch.float64), g.to(torch.float64)
    one = 1.0 if has_bias else 0.0
    norm1 = (a64.abs().sum(1) + one) * g64.abs().sum(1)
    if p == 1:
        norm = norm1
    else:
        norm = ((a64.square().sum(1) + one) * g64.square().sum(1)).sqrt()
    live = finite & mask
    factor, clipped = _factors(norm, clip.to(torch.float64), live, 1e-12)
    eps = torch.finfo(a.dtype).eps
    scaled = (
        g * torch.where(clipped, (factor * (1 - 4 * eps)).to(a.dtype), live.to(a.dtype))[:, None]
    )
    counts = _counts(norm1, clipped, finite, mask, votes_at, probe) if want_probe else None
    return scaled.t().mm(a), scaled.sum(0) if has_bias else None, counts


class ClippedConv2d(torch.autograd.Function):
    """y = conv2d(x, W) + b; backward clips each record's (dW, db) jointly before the sum."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, clip, mask, votes_at, probe, spec: Spec, p):
        """Exactly torch.nn.functional.conv2d."""
        return F.conv2d(x, weight, bias, *spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs, not the unfolded patches."""
        x, weight, bias, clip, mask, votes_at, probe, spec, p = inputs
        ctx.save_for_backward(x, weight, clip, mask, votes_at, probe)
        ctx.spec, ctx.p = spec, p
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Clipped sums for weight and bias, the ordinary gradient for x, counts for the probe."""
        x, weight, clip, mask, votes_at, probe = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.spec
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        need_probe = probe is not None and ctx.needs_input_grad[6]
        grad_x = None
        if need_x:
            grad_x = torch.ops.aten.convolution_backward(
                grad, x, weight, None, stride, padding, dilation, False, (0, 0), groups,
                (True, False, False),
            )[0]  # fmt: skip
        if not (need_w or need_b or need_probe):
            return grad_x, None, None, None, None, None, None, None, None
        dtype = _compute_dtype(x)
        args = (clip, votes_at, probe, ctx.p, need_probe)
        live, rows = _live(mask, x), _rows_at_once(weight, grad)
        total: list[Tensor | None] = [None, None, None]
        # Slices of the batch keep the patches and the per-record gradients in the cache.
        for start in range(0, max(x.shape[0], 1), rows):
            part = slice(start, start + rows)
            finite, a, g = _finite_records(x[part].to(dtype), grad[part].to(dtype))
            g = g.flatten(2)
            grads = _conv_per_record(a, g, weight, ctx.spec)
            bias_grads = g.sum(2) if ctx.has_bias else None
            sums = _clip_rows(grads, bias_grads, finite, live[part], *args)
            total = [_plus(t, s) for t, s in zip(total, sums, strict=True)]
        grad_w, grad_b, counts = total
        assert grad_w is not None
        grad_w = _weight_grad(grad_w, weight, ctx.spec)
        grad_b = grad_b.to(weight.dtype) if need_b and grad_b is not None else None
        return grad_x, grad_w if need_w else None, grad_b, None, None, None, counts, None, None


def _plus(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    """total + term; None stands for nothing to add."""
    return term if total is None or term is None else total + term


def _rows_at_once(weight: Tensor, grad: Tensor) -> int:
    """Records whose patches and gradients together have about 2^20 elements (CPU)."""
    if grad.device.type != "cpu":
        return max(1, grad.shape[0])
    raw = grad
    while is_functorch_wrapped_tensor(raw):
        raw = get_unwrapped(raw)
    clients = raw.numel() // max(1, grad.numel())
    columns = weight.shape[1] * weight.shape[2] * weight.shape[3]
    record = columns * (weight.shape[0] + grad.shape[2] * grad.shape[3])
    return max(1, _SLICE // (record * max(1, clients)))


def _conv_per_record(a: Tensor, g: Tensor, weight: Tensor, spec: Spec) -> Tensor:
    """Per-record weight gradients [B, out, in/groups * kh * kw] from patches."""
    stride, padding, dilation, groups = spec
    kernel = weight.shape[2:]
    if _plain(spec):
        return torch.bmm(g, _windows(a, kernel, stride, padding))
    patches = F.unfold(a, kernel, dilation=dilation, padding=padding, stride=stride)
    batch, length = a.shape[0], patches.shape[-1]
    columns = math.prod(weight.shape[1:])
    patches = patches.view(batch * groups, columns, length)
    grouped = g.reshape(batch * groups, weight.shape[0] // groups, length)
    return torch.bmm(grouped, patches.transpose(1, 2)).view(batch, weight.shape[0], columns)


def _windows(a: Tensor, kernel: torch.Size, stride: Pair, padding: Pair) -> Tensor:
    """Patches [B, positions, kh * kw * in], copied from a strided view: faster than F.unfold."""
    a = a.permute(0, 2, 3, 1)
    if padding != (0, 0):
        a = F.pad(a, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    # With the channels last a copy moves kw * in neighbours at a time.
    view = a.contiguous().unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])
    return view.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)


def _plain(spec: Spec) -> bool:
    """Whether `_windows` serves: neither groups nor dilation."""
    return spec[2] == (1, 1) and spec[3] == 1


def _weight_grad(flat: Tensor, weight: Tensor, spec: Spec) -> Tensor:
    """The weight gradient from its elements in the order of `_conv_per_record`."""
    if not _plain(spec):
        return flat.view(weight.shape).to(weight.dtype)
    out, channels, *kernel = weight.shape
    return flat.view(out, *kernel, channels).permute(0, 3, 1, 2).to(weight.dtype)
