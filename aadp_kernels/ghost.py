"""Clip-in-backward layers: one ordinary backward pass gives clipped sums."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn.modules.batchnorm import _BatchNorm

from aadp_kernels import _validate
from aadp_kernels._torch.ghost import ClippedLayer
from aadp_kernels._torch.ghost_matrix import Conv, Linear

Pair = tuple[int, int]


class UnsupportedLayerError(ValueError):
    """A module whose per-record gradients clip-in-backward cannot bound."""


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
    `sum_i mask_i * min(1, clip / norm_p(g_i)) * g_i`; x receives its ordinary gradient.

    Args:
        x: Input [B, in] or [B, ..., in], B records, private.
        weight: [out, in].
        bias: [out] or None.
        clip: Clip norm C >= 0, 0-d, public; inf means no clipping.
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
            drop this backward and give unclipped gradients. Compile through plain autograd.

    Guarantees:
        Every record contributes at most C in norm p, in real arithmetic: norms are inflated by
        their rounding bounds and factors rounded down, but the sum is a matrix product in x's
        dtype. The loss must be a sum over records with weights that are public; the layer must be
        used once in a forward. Works under torch.func.grad and torch.func.vmap.

    Edge cases:
        | record | contribution | vote | counted as non-finite |
        |---|---|---|---|
        | padding (mask 0), whatever it holds | 0 | 0 | no |
        | NaN or Inf in input or gradient | 0 | 0 | yes |
        | norms of input and gradient multiply to over 4e15 (float32) | 0 | 0 | yes |
        | clip 0 | 0 | as its norm says | no |

    Reference:
        Goodfellow 2015, arXiv:1510.01799 (norms of linear layers' gradients); Bu, Wang, Zha,
        Karypis 2023, arXiv:2210.00038 (clipped sums in one backward pass).
    """
    _check(x, 2, clip, votes_at, p, "x must be [B, ..., in]")
    return ClippedLayer.apply(x, weight, bias, clip, mask, votes_at, probe, Linear(), p)


def clipped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    clip: Tensor,
    mask: Tensor | None = None,
    votes_at: Tensor | None = None,
    probe: Tensor | None = None,
    p: int = 2,
) -> Tensor:
    """`F.conv2d` whose backward clips every record's gradient before the sum.

    The per-record gradients [B, out, in/groups * kh * kw] of this layer are held during its
    backward.

    Args:
        x: Input [B, in, height, width], B records, private.
        weight: [out, in/groups, kh, kw].
        bias: [out] or None.
        stride: As in F.conv2d; also padding (numbers only), dilation and groups.
        padding: See stride.
        dilation: See stride.
        groups: See stride.
        clip: As in `clipped_linear`; also mask, votes_at, probe and p.
        mask: See clip.
        votes_at: See clip.
        probe: See clip.
        p: See clip.

    Returns:
        [B, out, height', width'].

    Raises:
        ValueError: As `clipped_linear`; x that is not 4-D.
        RuntimeError: As `clipped_linear`.

    Guarantees:
        As `clipped_linear`.

    Edge cases:
        As `clipped_linear`.

    Reference:
        As `clipped_linear`; Rochette, Manoel, Tramel 2019, arXiv:1912.06015 (convolutions).
    """
    _check(x, 4, clip, votes_at, p, "x must be [B, in, height, width]")
    if x.dim() != 4:
        raise ValueError(f"x must be [B, in, height, width], got shape {tuple(x.shape)}")
    rule = Conv(_pair(stride), _pair(padding), _pair(dilation), groups)
    return ClippedLayer.apply(x, weight, bias, clip, mask, votes_at, probe, rule, p)


def _check(x: Tensor, dims: int, clip: Tensor, votes_at: Tensor | None, p: int, want: str) -> None:
    """Public arguments of a clip-in-backward call."""
    _refuse_compiled_functorch()
    _validate.one_of("p", p, (1, 2))
    if x.dim() < dims:
        raise ValueError(f"{want}, got shape {tuple(x.shape)}")
    if clip.dim() != 0 or (votes_at is not None and votes_at.dim() != 0):
        raise ValueError("clip and votes_at must be 0-d tensors")


def _refuse_compiled_functorch() -> None:
    """torch.compile drops custom backwards inside functorch: refuse rather than not clip."""
    if torch.compiler.is_compiling() and peek_interpreter_stack() is not None:
        raise RuntimeError(
            "clip-in-backward cannot be used inside a torch.func transform under torch.compile: "
            "its backward would be dropped and the gradients left unclipped"
        )


def _pair(value: int | Sequence[int]) -> Pair:
    """(value, value) for a number."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


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
        return {
            "clip": self.clip_norm,
            "votes_at": self.votes_at,
            "mask": self.mask,
            "probe": self.probe,
            "p": self.norm_p,
        }


class _Linear(nn.Linear, _ClippingMixin):
    """nn.Linear that clips in backward."""

    def forward(self, input: Tensor) -> Tensor:
        return clipped_linear(input, self.weight, self.bias, **self.clipping())


class _Conv2d(nn.Conv2d, _ClippingMixin):
    """nn.Conv2d that clips in backward."""

    def forward(self, input: Tensor) -> Tensor:
        return clipped_conv2d(
            input, self.weight, self.bias, stride=_pair(self.stride), padding=_zero_padding(self),
            dilation=_pair(self.dilation), groups=self.groups, **self.clipping(),
        )  # fmt: skip


_CLIPPED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _Linear, nn.Conv2d: _Conv2d}


def _zero_padding(conv: nn.Conv2d) -> Pair:
    """Padding in numbers, or an error where it is not symmetric zeros."""
    if conv.padding_mode != "zeros":
        raise UnsupportedLayerError(f"padding_mode must be 'zeros', got {conv.padding_mode!r}")
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            raise UnsupportedLayerError(
                f"padding 'same' must be symmetric, got kernel_size {conv.kernel_size}"
            )
        return (total[0] // 2, total[1] // 2)
    assert not isinstance(conv.padding, str)
    return _pair(conv.padding)


def with_clipping(model: nn.Module, *, p: int) -> nn.Module:
    """A deep copy of the model whose nn.Linear and nn.Conv2d layers clip in backward.

    Each such layer keeps its parameter names and has four non-persistent buffers that a caller sets
    through `torch.func.functional_call`: "<layer>.clip_norm" (0-d, inf at first),
    "<layer>.votes_at" (0-d, NaN at first: no votes), "<layer>.mask" ([B], [1] of ones at first) and
    "<layer>.probe" ([3] of zeros, see `clipped_linear`).

    Args:
        model: Any module; it is not changed.
        p: Norm of the clipping, 1 or 2.

    Returns:
        The copy.

    Raises:
        UnsupportedLayerError: A module of another type owns a parameter, parameters or modules are
            shared, a module mixes records (batch normalisation), or a padding is not symmetric
            zeros.
        ValueError: p not in {1, 2}.

    Guarantees:
        The forward is the model's own. A layer used twice in one forward is not seen here: see
        `check_single_use`.

    Edge cases:
        A model that is itself an nn.Linear or nn.Conv2d: the buffers have no prefix.
    """
    _validate.one_of("p", p, (1, 2))
    _check_modules(model)
    model = copy.deepcopy(model)
    for module in model.modules():
        kind = _CLIPPED.get(type(module))
        if kind is not None:
            # Changing the class keeps parameters, hooks and the place in the parent as they are.
            module.__class__ = kind
            assert isinstance(module, _ClippingMixin)
            module.add_clipping(p)
    return model


def _check_modules(model: nn.Module) -> None:
    """Raise unless every parameter belongs to one Linear or Conv2d, once."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        label = f"{name or '<model>'} ({type(module).__name__})"
        if isinstance(module, _BatchNorm):
            raise UnsupportedLayerError(f"{label} mixes the records of a batch")
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if type(module) not in _CLIPPED:
                raise UnsupportedLayerError(
                    f"{label} has the parameter {key!r}; only Linear and Conv2d can be clipped"
                )
            if id(parameter) in owners:
                raise UnsupportedLayerError(
                    f"{label} shares its parameter {key!r} with {owners[id(parameter)]}"
                )
            owners[id(parameter)] = label
        if type(module) is nn.Conv2d:
            try:
                _zero_padding(module)
            except UnsupportedLayerError as error:
                raise UnsupportedLayerError(f"{label}: {error}") from None


def check_single_use(model: nn.Module, example_x: Tensor) -> None:
    """Raise if a clipped layer is called more than once in one forward.

    Its uses would be clipped one by one, and a record could contribute twice the clip norm.

    Args:
        model: The result of `with_clipping`.
        example_x: A batch [B, ...] of the model's input; its values do not matter.

    Raises:
        UnsupportedLayerError: Names the layer and the number of calls.

    Guarantees:
        Leaves the model and the global random state as they were.
    """
    calls: dict[str, int] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, _ClippingMixin):

            def count(_module: nn.Module, _inputs: object, name: str = name) -> None:
                calls[name] = calls.get(name, 0) + 1

            handles.append(module.register_forward_pre_hook(count))
    try:
        with torch.no_grad(), torch.random.fork_rng():
            model(example_x)
    finally:
        for handle in handles:
            handle.remove()
    for name, number in calls.items():
        if number > 1:
            raise UnsupportedLayerError(
                f"{name or '<model>'} is used {number} times in one forward"
            )
