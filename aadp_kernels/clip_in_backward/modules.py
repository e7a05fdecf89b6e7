"""Clip-in-backward modules: a model whose layers clip."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from aadp_kernels import _validate
from aadp_kernels.clip_in_backward import functions
from aadp_kernels.clip_in_backward.autograd import clipped_layer
from aadp_kernels.clip_in_backward.foreign import Conv1D, PlainRMSNorm, layer_type
from aadp_kernels.clip_in_backward.refusals import refusal
from aadp_kernels.clip_in_backward.transposed import TransposedLinear

_TRANSPOSED = TransposedLinear()


class UnsupportedLayerError(ValueError):
    """A module whose per-record gradients clip-in-backward cannot bound."""


class Bias(nn.Module):
    """x + bias, for instance a positional embedding: a bare nn.Parameter as a layer of its own.

    Attributes:
        bias: nn.Parameter of the given shape, zeros at first.

    Args:
        shape: Shape of the bias; it broadcasts against a record of x [B, ...].
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] to the same shape."""
        return x + self.bias


class _Clipping(TypedDict):
    """Keyword arguments of a clipped operation."""

    clip: Tensor
    votes_at: Tensor
    mask: Tensor
    probe: Tensor
    p: int


Taken = tuple[Tensor, Tensor | None, Tensor | None]


class LayerWatch(Protocol):
    """Sees every call of the layers that it is installed in and hands them their parameters."""

    def enter(self, layer: nn.Module, x: Tensor) -> Taken:
        """Input, weight and bias (None where there is none) for one call of a layer.

        Args:
            layer: the layer that is called.
            x: its input, whose first axis must be the records, or one row that all of them share
                where the watch knows that every record is given its own copy.

        Raises:
            UnsupportedLayerError: The call would not be bounded by the clip norm.
        """
        ...


class ClippingLayer(nn.Module):
    """What all layers that clip in backward have.

    A caller replaces the buffers with `torch.func.functional_call`. `watch` is None or sees every
    call of the layer; copies and pickles of a layer are not watched.
    """

    clip_norm: Tensor
    votes_at: Tensor
    mask: Tensor
    probe: Tensor
    norm_p: int
    watch: LayerWatch | None = None

    def add_clipping(self, p: int) -> None:
        """Register the buffers: no clipping, no votes and no padding until they are replaced."""
        device = next(self.parameters()).device
        for name, value in (
            ("clip_norm", torch.tensor(torch.inf)),
            ("votes_at", torch.tensor(torch.nan)),
            ("mask", torch.ones(1)),
            ("probe", torch.zeros(3)),
        ):
            self.register_buffer(name, value.to(device), persistent=False)
        self.norm_p = p

    def clipping(self) -> _Clipping:
        """The keyword arguments of the clipped operation."""
        # Attributes that are buffers cost a function call each.
        found: Any = self._buffers
        return {
            "clip": found["clip_norm"],
            "votes_at": found["votes_at"],
            "mask": found["mask"],
            "probe": found["probe"],
            "p": self.norm_p,
        }

    def taken(self, x: Tensor) -> Taken:
        """Input, weight and bias for a call with input x, by the watch if there is one."""
        watch: LayerWatch | None = self.__dict__.get("watch")
        if watch is not None:
            return watch.enter(self, x)
        own: Any = self._parameters
        return x, own.get("weight"), own.get("bias")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "watch"}


class _Linear(nn.Linear, ClippingLayer):
    def forward(self, input: Tensor) -> Tensor:
        input, weight, bias = self.taken(input)
        assert weight is not None
        return functions.clipped_linear(input, weight, bias, **self.clipping())


class _Conv1D(ClippingLayer):
    def forward(self, x: Tensor) -> Tensor:
        x, weight, bias = self.taken(x)
        how = self.clipping()
        given = (how[key] for key in ("clip", "mask", "votes_at", "probe"))
        return clipped_layer(x, weight, bias, *given, _TRANSPOSED, how["p"])


def _conv(function: Callable[..., Tensor], layer: Any, x: Tensor) -> Tensor:
    """A convolution; what it cannot pad by itself is padded first."""
    x, weight, bias = layer.taken(x)
    padding = layer.padding
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding = 0
    return function(
        x, weight, bias, stride=layer.stride, padding=padding,
        dilation=layer.dilation, groups=layer.groups, **layer.clipping(),
    )  # fmt: skip


class _Conv1d(nn.Conv1d, ClippingLayer):
    def forward(self, input: Tensor) -> Tensor:
        return _conv(functions.clipped_conv1d, self, input)


class _Conv2d(nn.Conv2d, ClippingLayer):
    def forward(self, input: Tensor) -> Tensor:
        return _conv(functions.clipped_conv2d, self, input)


class _Embedding(nn.Embedding, ClippingLayer):
    def forward(self, input: Tensor) -> Tensor:
        input, weight, _ = self.taken(input)
        assert weight is not None
        return functions.clipped_embedding(
            input, weight, padding_idx=self.padding_idx, **self.clipping()
        )


class _LayerNorm(nn.LayerNorm, ClippingLayer):
    def forward(self, input: Tensor) -> Tensor:
        input, weight, bias = self.taken(input)
        return functions.clipped_layer_norm(
            input, self.normalized_shape, weight, bias, eps=self.eps, **self.clipping()
        )


class _RMSNorm(nn.RMSNorm, ClippingLayer):
    def forward(self, x: Tensor) -> Tensor:
        x, weight, _ = self.taken(x)
        assert weight is not None
        return functions.clipped_rms_norm(
            x, self.normalized_shape, weight, eps=self.eps, **self.clipping()
        )


class _PlainRMSNorm(ClippingLayer):
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, weight, _ = self.taken(hidden_states)
        assert weight is not None
        return functions.clipped_rms_norm(
            x, tuple(weight.shape), weight, eps=self.variance_epsilon, **self.clipping()
        )


class _GroupNorm(nn.GroupNorm, ClippingLayer):
    def forward(self, input: Tensor) -> Tensor:
        input, weight, bias = self.taken(input)
        return functions.clipped_group_norm(
            input, self.num_groups, weight, bias, eps=self.eps, **self.clipping()
        )


def _instance_norm(layer: Any, x: Tensor) -> Tensor:
    """Instance normalisation is group normalisation with a group a channel."""
    if x.dim() == layer._get_no_batch_dim():
        raise ValueError(f"x must be [B, channels, ...], got shape {tuple(x.shape)}")
    layer._check_input_dim(x)
    x, weight, bias = layer.taken(x)
    return functions.clipped_group_norm(
        x, layer.num_features, weight, bias, eps=layer.eps, **layer.clipping()
    )


class _InstanceNorm1d(nn.InstanceNorm1d, ClippingLayer):
    def forward(self, input: Tensor) -> Tensor:
        return _instance_norm(self, input)


class _InstanceNorm2d(nn.InstanceNorm2d, ClippingLayer):
    def forward(self, input: Tensor) -> Tensor:
        return _instance_norm(self, input)


class _Bias(Bias, ClippingLayer):
    def forward(self, x: Tensor) -> Tensor:
        x, _, bias = self.taken(x)
        assert bias is not None
        return functions.clipped_bias(x, bias, **self.clipping())


class _FrozenBatchNorm(_BatchNorm):
    """A fixed affine map of each record: statistics and parameters that nothing trains."""

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    def _check_input_dim(self, input: Tensor) -> None:
        """What kind of batch normalisation it was is of no interest any more."""


_CLIPPED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _Linear,
    Conv1D: _Conv1D,
    nn.Conv1d: _Conv1d,
    nn.Conv2d: _Conv2d,
    nn.Embedding: _Embedding,
    nn.LayerNorm: _LayerNorm,
    nn.RMSNorm: _RMSNorm,
    PlainRMSNorm: _PlainRMSNorm,
    nn.GroupNorm: _GroupNorm,
    nn.InstanceNorm1d: _InstanceNorm1d,
    nn.InstanceNorm2d: _InstanceNorm2d,
    Bias: _Bias,
}


def with_clipping(model: nn.Module, *, p: int) -> nn.Module:
    """A deep copy of the model whose layers clip in backward.

    nn.Linear, Conv1d, Conv2d, Embedding, LayerNorm, RMSNorm, GroupNorm, InstanceNorm1d,
    InstanceNorm2d, `Bias`, Conv1D and the RMS norms of Hugging Face's models are converted. Each
    such layer keeps its parameter names and has four non-persistent buffers that a caller sets
    through `torch.func.functional_call`: "<layer>.clip_norm" (0-d, inf at first),
    "<layer>.votes_at" (0-d, NaN at first: no votes), "<layer>.mask" ([B], [1] of ones at first) and
    "<layer>.probe" ([3] of zeros, see `clipped_linear`).

    Args:
        model: Any module; it is not changed. The first axis of every layer's input must be the
            records.
        p: Norm of the clipping, 1 or 2.

    Returns:
        The copy.

    Raises:
        UnsupportedLayerError: A module of another type owns a trained parameter (recurrent layers,
            nn.MultiheadAttention and a bare nn.Parameter among them), trained parameters or modules
            are shared, a module mixes records (batch normalisation that is trained or in training
            mode) or keeps their statistics, or an embedding has max_norm, scale_grad_by_freq or
            sparse.
        ValueError: p not in {1, 2}.

    Guarantees:
        The forward is the model's own (instance normalisation and other libraries' RMS norms: to
        rounding). Layers used twice in a forward and parameters used outside of their layer are
        not seen here: see `WatchedForward` and `check_single_use`.

    Edge cases:
        A model that is itself one of the layers: the buffers have no prefix. A layer without
        trained parameters stays as it is, whatever it is: make the copy anew after unfreezing one.
        Batch normalisation that is frozen and in eval mode stays in eval mode for good.
    """
    _validate.one_of("p", p, (1, 2))
    model = checked_copy(model, _CLIPPED)
    for module in model.modules():
        if isinstance(module, ClippingLayer):
            module.add_clipping(p)
    return model


def clipping_types() -> tuple[type[nn.Module], ...]:
    """Types of the layers that can clip."""
    return tuple(_CLIPPED)


def checked_copy(
    model: nn.Module,
    types: Mapping[type[nn.Module], type[nn.Module]],
    *,
    sharing: tuple[type[nn.Module], ...] = (),
) -> nn.Module:
    """A deep copy of the model whose trained layers are of other types.

    Args:
        model: any module.
        types: what the `clipping_types` become, subclasses of them.
        sharing: types of layers that may share a weight with one another.

    Raises:
        UnsupportedLayerError: As `with_clipping`.
    """
    _check_modules(model, sharing)
    model = copy.deepcopy(model)
    for module in model.modules():
        kind = types.get(layer_type(module))
        if kind is not None and any(p.requires_grad for p in module.parameters(recurse=False)):
            # Changing the class keeps parameters, hooks and the place in the parent as they are.
            module.__class__ = kind
        elif isinstance(module, _BatchNorm):
            module.__class__ = _FrozenBatchNorm
    return model


def _check_modules(model: nn.Module, sharing: tuple[type[nn.Module], ...]) -> None:
    """Raise unless each parameter is of one layer that can clip, or of some that may share it."""
    owners: dict[int, tuple[str, bool]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        label = f"{name or '<model>'} ({type(module).__name__})"
        reason = refusal(module)
        if reason is not None:
            raise UnsupportedLayerError(f"{label} {reason}")
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not parameter.requires_grad:
                continue
            if layer_type(module) not in _CLIPPED or key not in ("weight", "bias"):
                raise UnsupportedLayerError(f"{label} {_foreign(module, key)}")
            shareable = type(module) in sharing and key == "weight"
            owner, both = owners.setdefault(id(parameter), (label, shareable))
            if owner != label and not (both and shareable):
                raise UnsupportedLayerError(f"{label} shares its parameter {key!r} with {owner}")


def _foreign(module: nn.Module, key: str) -> str:
    """Why a parameter cannot be clipped, and what to do."""
    if isinstance(module, nn.MultiheadAttention):
        return f"owns {key!r} of three products; build attention from nn.Linear layers"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return f"uses its parameter {key!r} once a time step, so a record has no single gradient"
    if isinstance(module, _ConvNd):
        return f"has the parameter {key!r}; of convolutions only Conv1d and Conv2d can be clipped"
    known = ", ".join(kind.__name__ for kind in _CLIPPED if kind not in (Conv1D, PlainRMSNorm))
    return (
        f"has the parameter {key!r} itself; only weights and biases of {known} can be clipped "
        "(a positional embedding x + parameter can be an aadp_kernels.Bias)"
    )
