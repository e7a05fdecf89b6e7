"""Gradients of records, layer by layer, without clipping them yet: norms first, sums later.

One clip factor over all layers needs the norms of all of them before the first sum. Each layer
keeps what came in, and one backward pass gives the gradient of what went out; from these two come
norms of records and, given their factors, weighted sums. No gradient of a record is held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from aadp_kernels.clip_in_backward import two_steps
from aadp_kernels.clip_in_backward.clip import compute_dtype
from aadp_kernels.clip_in_backward.matrix_rules import Conv, Linear
from aadp_kernels.clip_in_backward.modules import ClippingLayer, checked_copy, clipping_types
from aadp_kernels.clip_in_backward.other_rules import Bias, Embedding, Norm
from aadp_kernels.contract import GradientsNeeded


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
        model: As for `with_clipping`; the same layers are known.

    Returns:
        The copy, to be used by a `WatchedForward`.

    Raises:
        UnsupportedLayerError: As `with_clipping`.
    """
    return checked_copy(model, _KEPT)


@dataclass(frozen=True)
class RecordGradients:
    """Gradients of a layer's records, as what they are made of.

    Attributes:
        weight_name: Name of the weight in the model; None if it has no gradient.
        bias_name: The same of the bias.
    """

    weight_name: str | None
    bias_name: str | None
    _kind: Any
    _like: tuple[Tensor | None, Tensor | None]
    _a: Tensor | None
    _g: Tensor

    def norms(self, p: int, *, l1: bool) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """L1 norms and squared L2 norms [B], float64, and which records are finite.

        Args:
            p: Norm of the clipping, 1 or 2; the other one is None.
            l1: Whether L1 norms are needed beside L2.

        Guarantees:
            Relative errors below 1e-9 (certified bounds on a CPU), given the inputs and the
            gradients of the outputs; half precision is taken as float32.
        """
        needed = GradientsNeeded(
            p, x=False, weight=self.weight_name is not None, bias=self.bias_name is not None,
            counts=False,
        )  # fmt: skip
        return two_steps.norms(self._kind, self._a, self._g, self._like[0], needed, l1=l1)

    def sums(self, factor: Tensor, finite: Tensor) -> dict[str, Tensor]:
        """Sums over records of factor times gradient, by name.

        Args:
            factor: [B], of the dtype of the sums.
            finite: bool [B]; the other records count as zero.
        """
        names = (self.weight_name, self.bias_name)
        found = two_steps.sums(
            self._kind, self._a, self._g, self._like[0], factor, finite,
            weight=names[0] is not None, bias=names[1] is not None,
        )  # fmt: skip
        return {
            name: value.view_as(like).to(like.dtype)
            for name, like, value in zip(names, self._like, found, strict=True)
            if name is not None and like is not None and value is not None
        }


def record_gradients(model: nn.Module, total: Tensor) -> list[RecordGradients]:
    """The gradients of a loss that the layers of one forward have kept.

    Args:
        model: Result of `with_kept_gradients`, after a forward.
        total: The loss, 0-d, summed over records.

    Returns:
        An entry for each layer that the loss depends on.
    """
    kept = [(n, layer.__dict__["kept"]) for n, layer in model.named_modules() if _has_kept(layer)]
    if not kept or not total.requires_grad:
        return []
    edges = [entry[-1] for _, entry in kept]
    slopes = torch.autograd.grad(total, edges, allow_unused=True)
    found = []
    for (name, (kind, x, weight, bias, _)), g in zip(kept, slopes, strict=True):
        if g is None:
            continue
        at = f"{name}." if name else ""
        likes = [t.detach() if t is not None else None for t in (weight, bias)]
        names = [
            f"{at}{key}" if t is not None and t.requires_grad else None
            for key, t in (("weight", weight), ("bias", bias))
        ]
        g = g.detach()
        a = two_steps.input_of(kind, x, compute_dtype(g))
        found.append(RecordGradients(*names, kind, tuple(likes), a, g.to(compute_dtype(g))))  # pyright: ignore
    return found


def forget_gradients(model: nn.Module) -> None:
    """Drop what the layers of the last forward have kept."""
    for layer in model.modules():
        layer.__dict__.pop("kept", None)


def _has_kept(layer: nn.Module) -> bool:
    return isinstance(layer, KeptLayer) and "kept" in layer.__dict__
