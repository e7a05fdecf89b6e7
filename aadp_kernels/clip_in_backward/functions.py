"""Clip-in-backward functions: one ordinary backward pass gives clipped sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aadp_kernels.clip_in_backward.autograd import clipped_layer
from aadp_kernels.clip_in_backward.matrix_rules import Conv, Linear
from aadp_kernels.clip_in_backward.other_rules import Bias, Embedding, Norm

_LINEAR = Linear()


def clipped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    clip: Tensor,
    mask: Tensor | None = None,
    votes_at: Tensor | None = None,
    probe: Tensor | None = None,
    p: int = 2,
) -> Tensor:
    """`F.linear(x, weight, bias)` whose backward clips every record's gradient before the sum.

    With g_i record i's joint gradient of weight and bias, the gradient that arrives at them is
    `sum_i mask_i * min(1, clip / norm_p(g_i)) * g_i`; x receives its ordinary gradient. A parameter
    that requires no gradient is no part of g_i.

    Args:
        x: Input [B, in] or [B, ..., in], B records, private.
        weight: [out, in].
        bias: [out] or None.
        clip: Clip norm C >= 0, 0-d, public; inf means no clipping, NaN or less than 0 silences.
        mask: [B] (or [1]) of 0 and 1; 0 marks padding. None: all records count.
        votes_at: 0-d; records vote 1[L1 norm <= votes_at] - 1/2. None or NaN: no votes.
        probe: [3] of zeros that requires a gradient: its "gradient" is (votes, number of clipped
            records, number of non-finite records). Private. None: not computed.
        p: Norm of the clipping, 1 or 2.

    Returns:
        [B, ..., out].

    Raises:
        ValueError: p not in {1, 2}, x without a batch dimension, a clip or votes_at that is not
            0-d.
        RuntimeError: Used inside a torch.func transform under torch.compile, which would silently
            drop this backward and give unclipped gradients (compile through plain autograd); a
            second derivative.

    Guarantees:
        Every record contributes at most C in norm p, in real arithmetic: norms are inflated by
        their rounding bounds and factors rounded down, but the sum is a matrix product in x's
        dtype (half precision: in float32). The loss must be a sum over records with weights that
        are public; the layer must be used once in a forward. Works under torch.func.grad and
        torch.func.vmap (over clients, whatever is mapped) and under autocast. No gradient of the
        whole batch is held per record: at most a slice of it, about 4 MB on a CPU.

    Edge cases:
        | record | contribution | vote | counted as non-finite |
        |---|---|---|---|
        | padding (mask 0), whatever it holds | 0 | 0 | no |
        | NaN or Inf in input or gradient | 0 | 0 | yes |
        | p-norms of input and gradient multiply to over 4e15 (float32) | 0 | 0 | yes |
        | clip 0 | 0 | as its norm says | no |

    Reference:
        Goodfellow 2015, arXiv:1510.01799 (norms of linear layers' gradients); Bu, Wang, Zha,
        Karypis 2023, arXiv:2210.00038 (clipped sums in one backward pass).
    """
    _check(x, x.dim() >= 2, "[B, ..., in]", clip, votes_at, p)
    return clipped_layer(x, weight, bias, clip, mask, votes_at, probe, _LINEAR, p)


def clipped_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    clip: Tensor,
    mask: Tensor | None = None,
    votes_at: Tensor | None = None,
    probe: Tensor | None = None,
    p: int = 2,
) -> Tensor:
    """`F.conv1d` whose backward clips every record's gradient before the sum.

    Args:
        x: Input [B, in, length], B records, private.
        weight: [out, in/groups, k].
        bias: [out] or None.
        stride: As in F.conv1d.
        padding: As in F.conv1d, in numbers only.
        dilation: As in F.conv1d.
        groups: As in F.conv1d.
        clip: Clip norm C >= 0, 0-d, public.
        mask: [B] (or [1]) of 0 and 1; 0 marks padding.
        votes_at: L1 threshold of the votes, 0-d, or None.
        probe: [3] of zeros; its "gradient" counts, see `clipped_linear`. Private.
        p: Norm of the clipping, 1 or 2.

    Returns:
        [B, out, length'].

    Raises, guarantees and edge cases are those of `clipped_linear`; x must be 3-D.

    Reference:
        Rochette, Manoel, Tramel 2019, arXiv:1912.06015 (convolutions).
    """
    _check(x, x.dim() == 3, "[B, in, length]", clip, votes_at, p)
    rule = Conv(_axes(stride, 1), _axes(padding, 1), _axes(dilation, 1), groups)
    return clipped_layer(x, weight, bias, clip, mask, votes_at, probe, rule, p)


def clipped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    clip: Tensor,
    mask: Tensor | None = None,
    votes_at: Tensor | None = None,
    probe: Tensor | None = None,
    p: int = 2,
) -> Tensor:
    """`F.conv2d` whose backward clips every record's gradient before the sum.

    Args:
        x: Input [B, in, height, width], B records, private.
        weight: [out, in/groups, kh, kw].
        bias: [out] or None.
        stride: As in F.conv2d.
        padding: As in F.conv2d, in numbers only.
        dilation: As in F.conv2d.
        groups: As in F.conv2d.
        clip: Clip norm C >= 0, 0-d, public.
        mask: [B] (or [1]) of 0 and 1; 0 marks padding.
        votes_at: L1 threshold of the votes, 0-d, or None.
        probe: [3] of zeros; its "gradient" counts, see `clipped_linear`. Private.
        p: Norm of the clipping, 1 or 2.

    Returns:
        [B, out, height', width'].

    Raises, guarantees and edge cases are those of `clipped_linear`; x must be 4-D.

    Reference:
        Rochette, Manoel, Tramel 2019, arXiv:1912.06015 (convolutions).
    """
    _check(x, x.dim() == 4, "[B, in, height, width]", clip, votes_at, p)
    rule = Conv(_axes(stride, 2), _axes(padding, 2), _axes(dilation, 2), groups)
    return clipped_layer(x, weight, bias, clip, mask, votes_at, probe, rule, p)


def clipped_embedding(
    x: Tensor,
    weight: Tensor,
    *,
    padding_idx: int | None = None,
    clip: Tensor,
    mask: Tensor | None = None,
    votes_at: Tensor | None = None,
    probe: Tensor | None = None,
    p: int = 2,
) -> Tensor:
    """`F.embedding(x, weight, padding_idx)` whose backward clips every record's gradient.

    Rows of equal tokens of a record add up before its norm is taken: the norm is exact.

    Args:
        x: Token indices [B] or [B, ...], B records, private.
        weight: [tokens, features].
        padding_idx: A token without a gradient, or None.
        clip: Clip norm C >= 0, 0-d, public.
        mask: [B] (or [1]) of 0 and 1; 0 marks padding.
        votes_at: L1 threshold of the votes, 0-d, or None.
        probe: [3] of zeros; its "gradient" counts, see `clipped_linear`. Private.
        p: Norm of the clipping, 1 or 2.

    Returns:
        [B, ..., features].

    Raises:
        ValueError: As `clipped_linear`; x that is not integer, padding_idx out of range.

    Guarantees and edge cases are those of `clipped_linear`. The gradient is dense. On a GPU its sum
    has no fixed order. A record of padding_idx only has norm 0 and votes so.
    """
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"x must be int32 or int64, got {x.dtype}")
    _check(x, x.dim() >= 1, "[B, ...]", clip, votes_at, p)
    if padding_idx is not None:
        if not -len(weight) <= padding_idx < len(weight):
            raise ValueError(f"padding_idx must be below {len(weight)}, got {padding_idx}")
        padding_idx %= len(weight)
    rule = Embedding(padding_idx)
    return clipped_layer(x, weight, None, clip, mask, votes_at, probe, rule, p)


def clipped_layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    clip: Tensor,
    mask: Tensor | None = None,
    votes_at: Tensor | None = None,
    probe: Tensor | None = None,
    p: int = 2,
) -> Tensor:
    """`F.layer_norm` whose backward clips every record's gradient before the sum.

    Args:
        x: Input [B, ..., *normalized_shape], B records, private.
        normalized_shape: Last axes of x, without the records.
        weight: [*normalized_shape] or None.
        bias: [*normalized_shape] or None.
        eps: Added to the variance.
        clip: Clip norm C >= 0, 0-d, public.
        mask: [B] (or [1]) of 0 and 1; 0 marks padding.
        votes_at: L1 threshold of the votes, 0-d, or None.
        probe: [3] of zeros; its "gradient" counts, see `clipped_linear`. Private.
        p: Norm of the clipping, 1 or 2.

    Returns:
        The shape of x.

    Raises:
        ValueError: As `clipped_linear`; normalized_shape that reaches the axis of the records.

    Guarantees and edge cases are those of `clipped_linear`, with the normalised input in the place
    of the input. Gradients of weight and bias are held per record, [B, elements].
    """
    rule = Norm("layer", tuple(normalized_shape), 1, eps)
    _check(x, x.dim() > len(rule.shape) > 0, "[B, ..., *normalized_shape]", clip, votes_at, p)
    return clipped_layer(x, weight, bias, clip, mask, votes_at, probe, rule, p)


def clipped_rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor,
    *,
    eps: float | None = None,
    clip: Tensor,
    mask: Tensor | None = None,
    votes_at: Tensor | None = None,
    probe: Tensor | None = None,
    p: int = 2,
) -> Tensor:
    """`F.rms_norm` whose backward clips every record's gradient before the sum.

    Args:
        x: Input [B, ..., *normalized_shape], B records, private.
        normalized_shape: Last axes of x, without the records.
        weight: [*normalized_shape].
        eps: Added to the mean square; None for the machine epsilon of x.
        clip: Clip norm C >= 0, 0-d, public.
        mask: [B] (or [1]) of 0 and 1; 0 marks padding.
        votes_at: L1 threshold of the votes, 0-d, or None.
        probe: [3] of zeros; its "gradient" counts, see `clipped_linear`. Private.
        p: Norm of the clipping, 1 or 2.

    Returns:
        The shape of x.

    Raises, guarantees and edge cases are those of `clipped_layer_norm`.
    """
    rule = Norm("rms", tuple(normalized_shape), 1, eps)
    _check(x, x.dim() > len(rule.shape) > 0, "[B, ..., *normalized_shape]", clip, votes_at, p)
    return clipped_layer(x, weight, None, clip, mask, votes_at, probe, rule, p)


def clipped_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    clip: Tensor,
    mask: Tensor | None = None,
    votes_at: Tensor | None = None,
    probe: Tensor | None = None,
    p: int = 2,
) -> Tensor:
    """`F.group_norm` whose backward clips every record's gradient before the sum.

    Args:
        x: Input [B, channels, ...], B records, private.
        num_groups: Divides the number of channels; as many as channels is instance normalisation.
        weight: [channels] or None.
        bias: [channels] or None.
        eps: Added to the variance.
        clip: Clip norm C >= 0, 0-d, public.
        mask: [B] (or [1]) of 0 and 1; 0 marks padding.
        votes_at: L1 threshold of the votes, 0-d, or None.
        probe: [3] of zeros; its "gradient" counts, see `clipped_linear`. Private.
        p: Norm of the clipping, 1 or 2.

    Returns:
        The shape of x.

    Raises, guarantees and edge cases are those of `clipped_layer_norm`.
    """
    _check(x, x.dim() >= 2, "[B, channels, ...]", clip, votes_at, p)
    rule = Norm("group", (x.shape[1],), num_groups, eps)
    return clipped_layer(x, weight, bias, clip, mask, votes_at, probe, rule, p)


def clipped_bias(
    x: Tensor,
    bias: Tensor,
    *,
    clip: Tensor,
    mask: Tensor | None = None,
    votes_at: Tensor | None = None,
    probe: Tensor | None = None,
    p: int = 2,
) -> Tensor:
    """`x + bias` whose backward clips every record's gradient of the bias before the sum.

    Args:
        x: Input [B, ...], B records, private.
        bias: Any shape that broadcasts to that of a record.
        clip: Clip norm C >= 0, 0-d, public.
        mask: [B] (or [1]) of 0 and 1; 0 marks padding.
        votes_at: L1 threshold of the votes, 0-d, or None.
        probe: [3] of zeros; its "gradient" counts, see `clipped_linear`. Private.
        p: Norm of the clipping, 1 or 2.

    Returns:
        The shape of x.

    Raises:
        ValueError: As `clipped_linear`; a bias that would make a record larger.

    Guarantees and edge cases are those of `clipped_linear`, of the gradient alone. Gradients of the
    bias are held per record, [B, elements].
    """
    _check(x, x.dim() >= 1, "[B, ...]", clip, votes_at, p)
    record, shape = x.shape[1:], bias.shape
    fits = len(shape) <= len(record) and all(
        b in (1, n) for b, n in zip(reversed(shape), reversed(record), strict=False)
    )
    if not fits:
        raise ValueError(f"bias must broadcast to {tuple(record)}, got shape {tuple(shape)}")
    rule = Bias(tuple(shape))
    return clipped_layer(x, None, bias, clip, mask, votes_at, probe, rule, p)


def _check(x: Tensor, fits: bool, want: str, clip: Tensor, votes_at: Tensor | None, p: int) -> None:
    """Public arguments of a clip-in-backward call."""
    if p not in (1, 2):
        raise ValueError(f"p must be one of 1, 2, got {p!r}")
    if not fits:
        raise ValueError(f"x must be {want}, got shape {tuple(x.shape)}")
    if clip.dim() != 0 or (votes_at is not None and votes_at.dim() != 0):
        raise ValueError("clip and votes_at must be 0-d tensors")


def _axes(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """One number a spatial axis."""
    return (value,) * count if isinstance(value, int) else tuple(int(v) for v in value)
