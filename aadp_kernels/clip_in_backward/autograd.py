"""Clip-in-backward: a layer whose parameter gradients are sums of clipped per-record gradients.

The layer's own backward knows everything that per-layer clipping needs, so one backward pass is
enough and no gradient of a whole model is held per record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._functorch import CInterpreter, peek_interpreter_stack
from torch.autograd.function import once_differentiable

from aadp_kernels.clip_in_backward.clip import rule_of
from aadp_kernels.clip_in_backward.matrix_rules import Results
from aadp_kernels.contract import ClipRule, GradientsNeeded


class LayerKind(Protocol):
    """One kind of layer: its ordinary forward and its clipping backward."""

    def forward(self, x: Tensor, weight: Any, bias: Any) -> Tensor:
        """The ordinary layer."""
        ...

    def kept(self, x: Tensor, weight: Any, bias: Any) -> tuple[Tensor, ...]:
        """The ordinary layer, and what its backward would have to compute again."""
        ...

    def single_client(
        self, saved: Sequence[Any], kept: Sequence[Tensor], grad: Tensor, needs: Sequence[bool],
        p: int,
    ) -> tuple[Tensor | None, ...] | None:  # fmt: skip
        """Gradients of the arguments of `ClippedLayer.forward` for one client.

        Args:
            saved: x, weight, bias, clip, mask, votes_at and probe, without the clients' axis.
            kept: what `kept` gave beside the output.
            grad: gradient of the output.
            needs: which arguments need a gradient, `saved` first.
            p: norm of the clipping.

        Returns:
            None if this short way is not open.
        """
        ...

    def backward(self, x: Tensor, grad: Tensor, weight: Any, rule: ClipRule) -> Results:
        """Gradients of x, weight and bias [K, ...] and counts [K, 3], None where not wanted.

        Args:
            x: [K, B, ...], K clients with B records each.
            grad: gradient of the output, [K, B, ...].
            weight: [K, ...], or [1, ...] where all clients share it.
            rule: how to clip.
        """
        ...


def in_functorch() -> bool:
    """Whether a torch.func transform is at work; torch.compile knows the answer, too."""
    # While it traces, the interpreter is never None but has its true type.
    return isinstance(peek_interpreter_stack(), CInterpreter)


def clipped_layer(*args: Any) -> Tensor:
    """The output of a layer that clips in backward; arguments of `ClippedLayer.forward`.

    Raises:
        RuntimeError: Inside a torch.func transform under torch.compile, which would drop the
            backward.
    """
    if not torch.compiler.is_compiling():
        return (ClippedLayer if in_functorch() else _PlainClippedLayer).apply(*args)
    if in_functorch():
        raise RuntimeError(
            "clip-in-backward cannot be used inside a torch.func transform under torch.compile: "
            "its backward would be dropped and the gradients left unclipped"
        )
    return ClippedLayer.apply(*args)


class ClippedLayer(torch.autograd.Function):
    """Forward of a layer as it is; backward clips each record's joint gradient before the sum."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, clip, mask, votes_at, probe, kind, p):
        """The ordinary layer."""
        return kind.forward(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs; per-record gradients exist in backward only."""
        x, weight, bias, clip, mask, votes_at, probe, kind, p = inputs
        ctx.save_for_backward(x, weight, bias, clip, mask, votes_at, probe)
        ctx.kind, ctx.p = kind, p

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Clipped sums for weight and bias, the ordinary gradient for x, counts for the probe."""
        return _gradients(ctx.saved_tensors, grad, ctx.needs_input_grad, ctx.kind, ctx.p)


class _PlainClippedLayer(torch.autograd.Function):
    """`ClippedLayer` outside torch.func: a call costs half as much without `setup_context`."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, clip, mask, votes_at, probe, kind, p) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The ordinary layer."""
        output, *kept = kind.kept(x, weight, bias)
        ctx.save_for_backward(x, weight, bias, probe, *kept)
        # Not saved as what a checkpointed forward computes again: a caller who gave them for one
        # forward has taken them back by then, and the layer's own mean no clipping.
        ctx.how = kind, p, clip, mask, votes_at
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """As `ClippedLayer`.

        The input's gradient depends on the weight: what a second derivative would bring there is
        not clipped.
        """
        return (_once if torch.is_grad_enabled() else _clipped)(ctx, grads[0])


def _clipped(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Results of `_PlainClippedLayer.backward`, in the layer's short way where that is open."""
    (x, weight, bias, probe, *kept), needs = ctx.saved_tensors, ctx.needs_input_grad
    kind, p, *given = ctx.how
    saved = (x, weight, bias, *given, probe)
    if not in_functorch():
        results = kind.single_client(saved, kept, grad, needs, p)
        if results is not None:
            return results
    return _gradients(saved, grad, needs, kind, p)


_once = once_differentiable(_clipped)


def _gradients(
    saved: tuple[Any, ...], grad: Tensor, needs: tuple[bool, ...], kind: LayerKind, p: int
) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments of `ClippedLayer.forward`."""
    x, weight, _, clip, mask, votes_at, probe = saved
    counts = probe is not None and needs[6]
    needed = GradientsNeeded(p, x=needs[0], weight=needs[1], bias=needs[2], counts=counts)
    likes = [saved[i] for i in (0, 1, 2, 6)]
    if x.shape[0] == 0:
        grads = [
            torch.zeros_like(like) if need else None
            for need, like in zip((*needs[:3], counts), likes, strict=True)
        ]
        return *grads[:3], None, None, None, grads[3], None, None
    tensors = (x, grad, weight, clip, mask, votes_at)
    led = [None if t is None else t.unsqueeze(0) for t in tensors]
    if not in_functorch() or torch.compiler.is_compiling():
        results = clip_backward(kind, needed, *led)
    else:
        results = _Clients.apply(kind, needed, *led)
    left = iter(results)
    grads = [
        next(left)[0].to(like.dtype) if need else None
        for need, like in zip((*needs[:3], counts), likes, strict=True)
    ]
    return *grads[:3], None, None, None, grads[3], None, None


def clip_backward(kind, needed, x, grad, weight, clip, mask, votes_at) -> tuple[Tensor, ...]:
    """The needed results of a layer's backward, in order; all tensors have a client axis."""
    if x.shape[1] == 0:
        # An empty Poisson batch: one record of padding is easier than zero records.
        record, slope = (t.new_zeros((t.shape[0], 1, *t.shape[2:])) for t in (x, grad))
        nobody = clip.new_zeros((x.shape[0], 1))
        first, *others = clip_backward(kind, needed, record, slope, weight, clip, nobody, votes_at)
        return (first[:, :0] if needed.x else first, *others)
    rule = rule_of(needed, clip, mask, votes_at, x)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            results = kind.backward(x, grad, weight, rule)
    else:
        results = kind.backward(x, grad, weight, rule)
    return tuple(t for t in results if t is not None)


class _Clients(torch.autograd.Function):
    """`clip_backward` under torch.func: vmap adds to the client axis, and sees plain tensors."""

    @staticmethod
    def forward(kind, needed, x, grad, weight, clip, mask, votes_at):
        """All clients at once."""
        return clip_backward(kind, needed, x, grad, weight, clip, mask, votes_at)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing to keep: clipped sums are not differentiated."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Clipped sums have no derivative."""
        raise RuntimeError("clipped gradients cannot be differentiated")

    @staticmethod
    def vmap(info, in_dims, kind, needed, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fold the mapped axis into the client axis; what all clients share stays [1, ...]."""
        size, dims = info.batch_size, in_dims[2:]
        inner = max(
            t.shape[0 if d is None or d > 0 else 1]
            for t, d in zip(tensors, dims, strict=True)
            if t is not None
        )
        x, grad, *rest = (_fold(t, d, size, inner) for t, d in zip(tensors, dims, strict=True))
        # Records and their gradients always belong to a client.
        x, grad = (t.expand(size * inner, *t.shape[1:]) for t in (x, grad))
        results = _Clients.apply(kind, needed, x, grad, *rest)
        return tuple(t.unflatten(0, (size, inner)) for t in results), (0,) * len(results)


def _fold(t: Any, dim: int | None, size: int, inner: int) -> Any:
    """[inner or 1, ...] with a mapped axis at dim to [size · inner or 1, ...]."""
    if t is None or (dim is None and t.shape[0] == 1):
        return t
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    if t.shape[1] != inner:
        t = t.expand(size, inner, *t.shape[2:])
    return t.flatten(0, 1)
