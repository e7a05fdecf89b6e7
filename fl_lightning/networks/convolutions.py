"""Convolutions of many clients at once on a CPU, where vmap's own rule is several times slower.

Clients with weights of their own are groups of one convolution. The channels of a group lie side by
side in memory (channels_last), which oneDNN asks for; from one layer to the next nothing is copied.
"""

# pyright: reportIncompatibleMethodOverride=false
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

Shape = tuple[int, int]

_LAST = torch.channels_last
_backward = torch.ops.aten.convolution_backward.default


class CohortConvolutions(TorchFunctionMode):
    """While it is entered, `conv2d` of images on a CPU has the rule of this file under vmap.

    Left as they are: groups, padding by name, inputs without a batch, other devices and dtypes.
    `group_norm` gets a copy of what lies in channels_last: it would ask for that order itself,
    which vmap cannot give.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.conv2d:
            call = _arguments(*args, **(kwargs or {}))
            if call is not None:
                return _Conv2d.apply(*call)
        if func is F.group_norm:
            return _normalised(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Any, ...] | None:
    plain = input.ndim == 4 and input.device.type == "cpu" and input.dtype == torch.float32
    if not plain or groups != 1 or isinstance(padding, str):
        return None
    steps, margin = _pair(stride), _pair(padding)
    if tuple(weight.shape[2:]) == (1, 1) and margin == (0, 0):
        # Only every steps-th pixel is seen. With the stride left in, torch 2.13's backward writes
        # past its memory for some shapes in channels_last.
        input, steps = input[..., :: steps[0], :: steps[1]], (1, 1)
    return input, weight, bias, steps, margin, _pair(dilation)


def _normalised(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    on_cpu = input.ndim == 4 and input.device.type == "cpu"
    return F.group_norm(input.contiguous() if on_cpu else input, *args, **kwargs)


def _pair(value: Any) -> Shape:
    """Two numbers of one, as torch takes them."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return (numbers[0], numbers[-1])


class _Conv2d(torch.autograd.Function):
    """A convolution [B, C, H, W] → [B, O, h, w]."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Shape,
        padding: Shape,
        dilation: Shape,
    ) -> Tensor:
        return torch.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, *ctx.geometry = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        wanted = tuple(ctx.needs_input_grad[:3])
        found = _Backward.apply(grads[0], *ctx.saved_tensors, *ctx.geometry, wanted)
        return (*(g if w else None for g, w in zip(found, wanted, strict=True)), None, None, None)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *geometry: Shape,
    ) -> tuple[Tensor, int]:
        k = info.batch_size
        own = _front(weight, in_dims[1], k)
        offset = None if bias is None else _front(bias, in_dims[2], k).reshape(-1)
        images = _side_by_side(_front(x, in_dims[0], k))
        out = torch.conv2d(images, _stacked(own), offset, *geometry, groups=k)
        return _apart(out, k), 0


class _Backward(torch.autograd.Function):
    """Gradients of input, weight and bias; empty where not wanted."""

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor, stride: Shape, padding: Shape, dilation: Shape,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return _gradients(g, x, weight, stride, padding, dilation, 1, wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept: there are no second derivatives."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("cohort convolutions have first derivatives only")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], g: Tensor, x: Tensor, weight: Tensor, stride: Shape,
        padding: Shape, dilation: Shape, wanted: tuple[bool, bool, bool],
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:  # fmt: skip
        k = info.batch_size
        own = _front(weight, in_dims[2], k)
        grads = _gradients(
            _side_by_side(_front(g, in_dims[0], k)), _side_by_side(_front(x, in_dims[1], k)),
            _stacked(own), stride, padding, dilation, k, wanted,
        )  # fmt: skip
        to_x, to_weight, to_bias = grads
        found = (
            _apart(to_x, k) if wanted[0] else to_x.new_empty(k, 0),
            to_weight.reshape(own.shape) if wanted[1] else to_weight.new_empty(k, 0),
            to_bias.view(k, -1) if wanted[2] else to_bias.new_empty(k, 0),
        )
        return found, (0, 0, 0)


def _gradients(
    g: Tensor, x: Tensor, weight: Tensor, stride: Shape, padding: Shape, dilation: Shape,
    groups: int, wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sizes = [len(weight)] if wanted[2] else None
    found = _backward(g, x, weight, sizes, stride, padding, dilation, False, (0, 0), groups, wanted)
    to_x, to_weight, to_bias = (
        part if is_wanted else g.new_empty(0) for part, is_wanted in zip(found, wanted, strict=True)
    )
    return to_x, to_weight, to_bias


def _front(value: Tensor, dim: int | None, k: int) -> Tensor:
    """With the clients first, [k, ...]; one value for all is repeated."""
    return value.expand(k, *value.shape) if dim is None else value.movedim(dim, 0)


def _side_by_side(images: Tensor) -> Tensor:
    """[k, B, C, H, W] → [B, k·C, H, W] in channels_last; a view where `_apart` made the images."""
    k, batch, channels, *size = images.shape
    order = images.permute(1, 3, 4, 0, 2).reshape(batch, *size, k * channels)
    # With one channel the reshape is a view in the old order.
    return order.contiguous().permute(0, 3, 1, 2)


def _apart(images: Tensor, k: int) -> Tensor:
    """[B, k·C, H, W] → [k, B, C, H, W], a view."""
    return images.unflatten(1, (k, -1)).transpose(0, 1)


def _stacked(weight: Tensor) -> Tensor:
    """[k, O, C, h, w] → [k·O, C, h, w] in channels_last."""
    return weight.reshape(-1, *weight.shape[2:]).contiguous(memory_format=_LAST)
