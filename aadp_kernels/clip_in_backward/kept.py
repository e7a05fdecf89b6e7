"""Gradients of records, layer by layer, without clipping them yet: norms first, sums later.

One clip factor over all layers needs the norms of all of them before the first sum. Each layer
keeps what came in, and one backward pass gives the gradient of what went out; from these two come
norms of records and, given their factors, weighted sums. No gradient of a record is held.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from aadp_kernels.clip_in_backward import two_steps
from aadp_kernels.clip_in_backward.clip import compute_dtype
from aadp_kernels.clip_in_backward.foreign import Conv1D, PlainRMSNorm
from aadp_kernels.clip_in_backward.gradients import RecordGradients
from aadp_kernels.clip_in_backward.matrix_rules import Conv, Linear
from aadp_kernels.clip_in_backward.modules import ClippingLayer, checked_copy, clipping_types
from aadp_kernels.clip_in_backward.other_rules import Bias, Embedding, Norm
from aadp_kernels.clip_in_backward.shared_weights import SHARING, SharedGradients, joined
from aadp_kernels.clip_in_backward.transposed import TransposedLinear


class KeptLayer(ClippingLayer):
    """A layer that keeps its input and where the gradient of its output arrives."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """The ordinary layer."""
        x, weight, bias = self.taken(next(iter((*args, *kwargs.values()))))
        kind, x = _kind(self, x)
        output = kind.forward(x, weight, bias)
        if output.requires_grad:
            # Not the tensor: an activation in place would make it its own output.
            edge = get_gradient_edge(output)
            self.__dict__["kept"] = kind, x.detach(), weight, bias, edge
        return output


def _kind(layer: Any, x: Tensor) -> tuple[Any, Tensor]:
    """The rule of a layer's gradients, and the input with what the rule does not pad."""
    if isinstance(layer, nn.Linear):
        return Linear(), x
    if isinstance(layer, Conv1D):
        return TransposedLinear(), x
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        padding = layer.padding
        if isinstance(padding, str) or layer.padding_mode != "zeros":
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(layer.stride)
        return Conv(layer.stride, padding, layer.dilation, layer.groups), x  # pyright: ignore
    if isinstance(layer, nn.Embedding):
        return Embedding(layer.padding_idx), x
    if isinstance(layer, nn.LayerNorm):
        return Norm("layer", tuple(layer.normalized_shape), 1, layer.eps), x
    if isinstance(layer, nn.RMSNorm):
        return Norm("rms", tuple(layer.normalized_shape), 1, layer.eps), x
    if isinstance(layer, PlainRMSNorm):
        return Norm("rms", tuple(layer.weight.shape), 1, layer.variance_epsilon), x
    if isinstance(layer, nn.GroupNorm):
        return Norm("group", (layer.num_channels,), layer.num_groups, layer.eps), x
    if isinstance(layer, nn.InstanceNorm1d | nn.InstanceNorm2d):
        if x.dim() == layer._get_no_batch_dim():
            raise ValueError(f"x must be [B, channels, ...], got shape {tuple(x.shape)}")
        return Norm("group", (layer.num_features,), layer.num_features, layer.eps), x
    return Bias(tuple(layer.bias.shape)), x


_KEPT: dict[type[nn.Module], type[nn.Module]] = {
    kind: type(f"_Kept{kind.__name__}", (KeptLayer, kind), {}) for kind in clipping_types()
}


def with_kept_gradients(model: nn.Module) -> nn.Module:
    """A deep copy of the model whose trained layers keep what `record_gradients` needs.

    Args:
        model: As for `with_clipping`; the same layers are known. Linear layers and embeddings may
            share a weight.

    Returns:
        The copy, to be used by a `WatchedForward`.

    Raises:
        UnsupportedLayerError: As `with_clipping`.
    """
    return checked_copy(model, _KEPT, sharing=SHARING)


def record_gradients(model: nn.Module, total: Tensor) -> list[RecordGradients | SharedGradients]:
    """The gradients of a loss that the layers of one forward have kept.

    Args:
        model: Result of `with_kept_gradients`, after a forward.
        total: The loss, 0-d, summed over records.

    Returns:
        An entry for each layer that the loss depends on, but one for all that share a weight.
    """
    kept = [(layer, layer.__dict__["kept"]) for layer in model.modules() if _has_kept(layer)]
    if not kept or not total.requires_grad:
        return []
    edges = [entry[-1] for _, entry in kept]
    slopes = torch.autograd.grad(total, edges, allow_unused=True)
    found = []
    owned = {id(parameter): name for name, parameter in model.named_parameters()}
    for (layer, (kind, x, weight, bias, _)), g in zip(kept, slopes, strict=True):
        if g is None:
            continue
        likes = [t.detach() if t is not None else None for t in (weight, bias)]
        own: Any = layer._parameters
        names = [
            owned[id(own[key])] if t is not None and t.requires_grad else None
            for key, t in (("weight", weight), ("bias", bias))
        ]
        g = g.detach().to(compute_dtype(g))
        weight_name, bias_name = names
        rule, *tensors = two_steps.made_of(
            kind, x, g, weight=weight_name is not None, bias=bias_name is not None
        )
        found.append(RecordGradients(weight_name, bias_name, rule, tuple(likes), *tensors))  # pyright: ignore
    return joined(found)


def forget_gradients(model: nn.Module) -> None:
    """Drop what the layers of the last forward have kept."""
    for layer in model.modules():
        layer.__dict__.pop("kept", None)


def _has_kept(layer: nn.Module) -> bool:
    return isinstance(layer, KeptLayer) and "kept" in layer.__dict__
