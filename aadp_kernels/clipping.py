"""Clip-in-backward modules: a model whose layers clip, and the check that each is used once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves, tree_map

from aadp_kernels import _validate, ghost


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


class _ClippingMixin(nn.Module):
    """Buffers of a layer that clips in backward; a caller replaces them with functional_call."""

    clip_norm: Tensor
    votes_at: Tensor
    mask: Tensor
    probe: Tensor
    norm_p: int

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


class _Linear(nn.Linear, _ClippingMixin):
    def forward(self, input: Tensor) -> Tensor:
        return ghost.clipped_linear(input, self.weight, self.bias, **self.clipping())


def _conv(function: Callable[..., Tensor], layer: Any, x: Tensor) -> Tensor:
    """A convolution; what it cannot pad by itself is padded first."""
    padding = layer.padding
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding = 0
    return function(
        x, layer.weight, layer.bias, stride=layer.stride, padding=padding,
        dilation=layer.dilation, groups=layer.groups, **layer.clipping(),
    )  # fmt: skip


class _Conv1d(nn.Conv1d, _ClippingMixin):
    def forward(self, input: Tensor) -> Tensor:
        return _conv(ghost.clipped_conv1d, self, input)


class _Conv2d(nn.Conv2d, _ClippingMixin):
    def forward(self, input: Tensor) -> Tensor:
        return _conv(ghost.clipped_conv2d, self, input)


class _Embedding(nn.Embedding, _ClippingMixin):
    def forward(self, input: Tensor) -> Tensor:
        return ghost.clipped_embedding(
            input, self.weight, padding_idx=self.padding_idx, **self.clipping()
        )


class _LayerNorm(nn.LayerNorm, _ClippingMixin):
    def forward(self, input: Tensor) -> Tensor:
        return ghost.clipped_layer_norm(
            input, self.normalized_shape, self.weight, self.bias, eps=self.eps, **self.clipping()
        )


class _RMSNorm(nn.RMSNorm, _ClippingMixin):
    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return ghost.clipped_rms_norm(
            x, self.normalized_shape, self.weight, eps=self.eps, **self.clipping()
        )


class _GroupNorm(nn.GroupNorm, _ClippingMixin):
    def forward(self, input: Tensor) -> Tensor:
        return ghost.clipped_group_norm(
            input, self.num_groups, self.weight, self.bias, eps=self.eps, **self.clipping()
        )


def _instance_norm(layer: Any, x: Tensor) -> Tensor:
    """Instance normalisation is group normalisation with a group a channel."""
    if x.dim() == layer._get_no_batch_dim():
        raise ValueError(f"x must be [B, channels, ...], got shape {tuple(x.shape)}")
    layer._check_input_dim(x)
    return ghost.clipped_group_norm(
        x, layer.num_features, layer.weight, layer.bias, eps=layer.eps, **layer.clipping()
    )


class _InstanceNorm1d(nn.InstanceNorm1d, _ClippingMixin):
    def forward(self, input: Tensor) -> Tensor:
        return _instance_norm(self, input)


class _InstanceNorm2d(nn.InstanceNorm2d, _ClippingMixin):
    def forward(self, input: Tensor) -> Tensor:
        return _instance_norm(self, input)


class _Bias(Bias, _ClippingMixin):
    def forward(self, x: Tensor) -> Tensor:
        return ghost.clipped_bias(x, self.bias, **self.clipping())


_CLIPPED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _Linear,
    nn.Conv1d: _Conv1d,
    nn.Conv2d: _Conv2d,
    nn.Embedding: _Embedding,
    nn.LayerNorm: _LayerNorm,
    nn.RMSNorm: _RMSNorm,
    nn.GroupNorm: _GroupNorm,
    nn.InstanceNorm1d: _InstanceNorm1d,
    nn.InstanceNorm2d: _InstanceNorm2d,
    Bias: _Bias,
}


def with_clipping(model: nn.Module, *, p: int) -> nn.Module:
    """A deep copy of the model whose layers clip in backward.

    nn.Linear, Conv1d, Conv2d, Embedding, LayerNorm, RMSNorm, GroupNorm, InstanceNorm1d,
    InstanceNorm2d and `Bias` are converted. Each such layer keeps its parameter names and has four
    non-persistent buffers that a caller sets through `torch.func.functional_call`:
    "<layer>.clip_norm" (0-d, inf at first), "<layer>.votes_at" (0-d, NaN at first: no votes),
    "<layer>.mask" ([B], [1] of ones at first) and "<layer>.probe" ([3] of zeros, see
    `clipped_linear`).

    Args:
        model: Any module; it is not changed. The first axis of every layer's input must be the
            records.
        p: Norm of the clipping, 1 or 2.

    Returns:
        The copy.

    Raises:
        UnsupportedLayerError: A module of another type owns a parameter (recurrent layers,
            nn.MultiheadAttention and a bare nn.Parameter among them), parameters or modules are
            shared, a module mixes records (batch normalisation) or keeps their statistics, or an
            embedding has max_norm, scale_grad_by_freq or sparse.
        ValueError: p not in {1, 2}.

    Guarantees:
        The forward is the model's own (instance normalisation: to rounding). Layers used twice in
        a forward and parameters used outside of their layer are not seen here: see
        `check_single_use`.

    Edge cases:
        A model that is itself one of the layers: the buffers have no prefix. A normalisation
        without parameters stays as it is.
    """
    _validate.one_of("p", p, (1, 2))
    _check_modules(model)
    model = copy.deepcopy(model)
    for module in model.modules():
        kind = _CLIPPED.get(type(module))
        if kind is not None and any(True for _ in module.parameters(recurse=False)):
            # Changing the class keeps parameters, hooks and the place in the parent as they are.
            module.__class__ = kind
            assert isinstance(module, _ClippingMixin)
            module.add_clipping(p)
    return model


def _check_modules(model: nn.Module) -> None:
    """Raise unless every parameter belongs to one layer that can clip, once."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        label = f"{name or '<model>'} ({type(module).__name__})"
        reason = _refusal(module)
        if reason is not None:
            raise UnsupportedLayerError(f"{label} {reason}")
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if type(module) not in _CLIPPED or key not in ("weight", "bias"):
                raise UnsupportedLayerError(f"{label} {_foreign(module, key)}")
            if id(parameter) in owners:
                raise UnsupportedLayerError(
                    f"{label} shares its parameter {key!r} with {owners[id(parameter)]}"
                )
            owners[id(parameter)] = label


def _refusal(module: nn.Module) -> str | None:
    """Why a module's options cannot be clipped; None if they can."""
    if isinstance(module, _BatchNorm):
        return "mixes the records of a batch"
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return "keeps statistics of the records: track_running_stats must be False"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "rescales weights by the tokens that records hold: max_norm must be None"
        if module.scale_grad_by_freq:
            return "weights records by the batch: scale_grad_by_freq must be False"
        if module.sparse:
            return "shows which tokens occur: sparse must be False"
    return None


def _foreign(module: nn.Module, key: str) -> str:
    """Why a parameter cannot be clipped, and what to do."""
    if isinstance(module, nn.MultiheadAttention):
        return f"owns {key!r} of three products; build attention from nn.Linear layers"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return f"uses its parameter {key!r} once a time step, so a record has no single gradient"
    if isinstance(module, _ConvNd):
        return f"has the parameter {key!r}; of convolutions only Conv1d and Conv2d can be clipped"
    known = ", ".join(kind.__name__ for kind in _CLIPPED)
    return (
        f"has the parameter {key!r} itself; only weights and biases of {known} can be clipped "
        "(a positional embedding x + parameter can be an aadp_kernels.Bias)"
    )


def check_single_use(model: nn.Module, *example: Any) -> None:
    """Raise unless every parameter is used once in a forward, by its own layer, on the records.

    Uses of a layer would be clipped one by one, and a record could contribute twice the clip norm;
    a parameter used outside of its layer would not be clipped at all. A layer whose first axis is
    not the records, but positions or positions of records, would clip each of those by itself.

    Args:
        model: The result of `with_clipping`.
        *example: A batch [B, ...] of the model's inputs; its values do not matter.

    Raises:
        UnsupportedLayerError: Names the layer and the number of calls or of rows, or the parameter.

    Guarantees:
        Leaves the model and the global random state as they were.

    Edge cases:
        Only the path that the example takes through the model is seen.
    """
    first = next((t for t in tree_leaves(example) if isinstance(t, Tensor) and t.dim()), None)
    records = -1 if first is None else len(first)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # One record, then two: no other axis has both lengths.
    for count in (1, 2):
        some = tree_map(partial(_records, records=records, count=count), example)
        output, calls = _calls(model, some)
        for name, rows in calls.items():
            label = name or "<model>"
            if len(rows) > 1:
                raise UnsupportedLayerError(f"{label} is used {len(rows)} times in one forward")
            if rows != [count]:
                raise UnsupportedLayerError(
                    f"{label} gets {rows[0]} rows for {count} record(s): the first axis of what it "
                    "gets must be the records"
                )
        for user, parameter in _uses(output):
            if not user.endswith("ClippedLayerBackward") and id(parameter) in names:
                raise UnsupportedLayerError(
                    f"the parameter {names[id(parameter)]!r} is used outside of its layer, by "
                    f"{user}"
                )


def _calls(model: nn.Module, example: tuple[Any, ...]) -> tuple[Any, dict[str, list[int]]]:
    """Outputs, and the length of the first axis in every call of each layer that clips."""
    rows: dict[str, list[int]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        return lambda _, args, kwargs: rows.setdefault(name, []).append(
            len((*args, *kwargs.values())[0])
        )

    handles = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, _ClippingMixin)
    ]
    try:
        with torch.enable_grad(), torch.random.fork_rng():
            return model(*example), rows
    finally:
        for handle in handles:
            handle.remove()


def _records(value: Any, records: int, count: int) -> Any:
    """The first `count` records of what holds `records` of them, again from the start if few."""
    if not (isinstance(value, Tensor) and value.dim() and len(value) == records):
        return value
    if not records:
        return value.new_zeros((count, *value.shape[1:]))
    return value[[i % records for i in range(count)]]


def _uses(output: object) -> Iterator[tuple[str, Tensor]]:
    """(name of the operation, leaf tensor) of every use of a leaf in the graph of an output."""
    nodes = [t.grad_fn for t in tree_leaves(output) if isinstance(t, Tensor)]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for parent, _ in node.next_functions:
            leaf = getattr(parent, "variable", None)
            if leaf is None:
                nodes.append(parent)
            else:
                yield node.name(), leaf
