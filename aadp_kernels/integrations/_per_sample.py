"""Opacus' per-sample gradients: which sampler is right for a layer, and which layers have none."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from opacus.grad_sample import AbstractGradSampleModule
from opacus.grad_sample.functorch import prepare_layer
from torch import Tensor, nn

from aadp_kernels.clip_in_backward.modules import UnsupportedLayerError
from aadp_kernels.clip_in_backward.refusals import mixing

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NO_SAMPLER: dict[type | tuple[type, ...], str] = {
    nn.RNNBase: "use opacus.layers.DPRNN, DPGRU or DPLSTM",
    nn.RNNCellBase: "use opacus.layers.DPRNN, DPGRU or DPLSTM, or build it from nn.Linear layers",
    nn.MultiheadAttention: "use opacus.layers.DPMultiheadAttention",
    nn.Bilinear: "build it from nn.Linear layers",
    nn.EmbeddingBag: "use nn.Embedding and a sum or a mean over its output",
}


def check_layers(model: nn.Module, mode: str) -> None:
    """Raise UnsupportedLayerError for a layer whose records have no gradient of their own here.

    Args:
        model: What is to be trained.
        mode: Opacus' grad_sample_mode: "hooks", "functorch" or "ew".
    """
    for name, layer in model.named_modules():
        reason = mixing(layer)
        if reason is None and any(p.requires_grad for p in layer.parameters(recurse=False)):
            reason = _no_sampler(layer, mode)
        if reason is not None:
            raise UnsupportedLayerError(f"{label(name, layer)} {reason}")


def _no_sampler(layer: nn.Module, mode: str) -> str | None:
    """Why no sampler of this mode gives the gradients of the layer; None if one does."""
    for kind, instead in _NO_SAMPLER.items():
        # Expanded weights know torch's own recurrent layers.
        if isinstance(layer, kind) and not (mode == "ew" and kind is nn.RNNBase):
            return f"gets no right per-sample gradients from Opacus: {instead}"
    if isinstance(layer, nn.Embedding) and layer.sparse:
        return "has sparse gradients: sparse must be False"
    if mode == "ew" and isinstance(layer, nn.Embedding) and needs_functorch(layer):
        return (
            "gets other gradients from expanded weights (padding_idx, scale_grad_by_freq): "
            "grad_sample_mode must be 'hooks' or 'functorch'"
        )
    return None


def needs_functorch(layer: nn.Module) -> bool:
    """Whether the sampler that Opacus 1.6 has for the layer's type leaves an option of it out."""
    if type(layer) in _CONVOLUTIONS:
        return layer.padding_mode != "zeros"  # pyright: ignore[reportAttributeAccessIssue]
    if type(layer) is nn.Embedding:
        return layer.padding_idx is not None or layer.scale_grad_by_freq
    return type(layer) is nn.LayerNorm and layer.bias is None


def sampler_type(layer: nn.Module) -> type[nn.Module]:
    """The type by which Opacus looks for a sampler; nn.Module has none, so functorch is used."""
    return nn.Module if needs_functorch(layer) else type(layer)


def use_right_samplers(made: Any, *, batch_first: bool) -> None:
    """Let functorch make the gradients for which Opacus' own sampler is wrong.

    Args:
        made: Opacus' wrapped model or hooks object, in mode "hooks" or "functorch".
        batch_first: As in Opacus.
    """
    made._get_module_type = sampler_type
    for name, layer in made._module.named_modules():
        sample = getattr(layer, "ft_compute_sample_grad", None)
        if sample is None and needs_functorch(layer):
            bare = _without_hooks(layer, made)
            prepare_layer(bare, batch_first=batch_first)
            sample = bare.ft_compute_sample_grad
        if sample is not None and not isinstance(sample, NamedSampler):
            layer.ft_compute_sample_grad = NamedSampler(label(name, layer), sample)


def _without_hooks(layer: nn.Module, made: object) -> Any:
    """The layer with its parameters and without the hooks of Opacus, which sees no second call."""
    bare = copy.copy(layer)
    for name, hooks in layer.__dict__.items():
        if name.endswith("_hooks"):
            kept = {k: h for k, h in hooks.items() if _owner(h) is not made}
            bare.__dict__[name] = OrderedDict(kept)
    return bare


def _owner(hook: Any) -> object:
    """The object whose method a hook is."""
    return getattr(getattr(hook, "func", hook), "__self__", None)


class NamedSampler:
    """A sampler of functorch that takes batches without records, and names its layer in errors."""

    def __init__(self, name: str, sample: Any) -> None:
        self.name, self.sample = name, sample

    def __call__(self, parameters: list[Tensor], x: Tensor, grad: Tensor) -> Any:
        if not len(x):
            return [p.new_zeros((0, *p.shape)) for p in parameters]
        try:
            return self.sample(parameters, x, grad)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise UnsupportedLayerError(
                f"{self.name}: Opacus cannot make its per-sample gradients, build it from layers "
                f"of torch.nn ({str(error).splitlines()[0]})"
            ) from error


def label(name: str, layer: nn.Module) -> str:
    """A layer's name and type, as errors say them."""
    return f"{name or '<model>'} ({type(layer).__name__})"


def inner(module: nn.Module) -> nn.Module:
    """The model within a wrapped one."""
    return module._module if isinstance(module, AbstractGradSampleModule) else module
