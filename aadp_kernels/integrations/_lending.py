"""Gradients of a model by values that are lent to it in the place of its trained parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from aadp_kernels.clip_in_backward.modules import ClippingLayer

# From a 0-d number to gradients by name, [rows, ...].
Gradients = Callable[[Tensor], dict[str, Tensor]]


class Lender(Protocol):
    """Runs a model with other values and tells the gradients that its adapter would clip."""

    def values(self) -> dict[str, Tensor]:
        """The trained parameters by name."""
        ...

    def lend(
        self, values: Mapping[str, Tensor], weights: Tensor
    ) -> AbstractContextManager[Gradients]:
        """Forwards and backward passes within use these values.

        Args:
            values: By name, of all trained parameters.
            weights: [B], of the gradients of the records that the forward within has.
        """
        ...

    def joined(self, alone: Sequence[Tensor]) -> Tensor:
        """What the gradients of single records, [1, ...] each, are for a batch of them."""
        ...


class _Weigh(torch.autograd.Function):
    """The same values; the gradient of each row is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:  # pyright: ignore
        ctx.weights = weights
        # No view: layers behind may write in place.
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        return grad * ctx.weights.to(grad).view(-1, *(1,) * (grad.dim() - 1)), None


def _weighed(weights: Tensor, value: Any) -> Any:
    if isinstance(value, Tensor) and value.requires_grad:
        return _Weigh.apply(value, weights)
    return value


class Aliases:
    """Lends to layers that clip, which do not clip meanwhile: weighted sums over the records.

    The sum is told apart by weights: each record's gradient of a layer is multiplied by its own,
    and what flows on to the layers before is not.

    Args:
        layers: Layers that clip, whose first axis is the records.
        parameters: Private parameters by name.
        use: Is given the values by name, which the layers take from now on, and the number of
            records, or None at the end.
    """

    def __init__(
        self,
        layers: Sequence[ClippingLayer],
        parameters: Mapping[str, nn.Parameter],
        use: Callable[[tuple[Mapping[str, Tensor], int] | None], None],
    ) -> None:
        self._layers, self._parameters, self._use = layers, parameters, use

    def values(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self._parameters.items() if p.requires_grad}

    @contextmanager
    def lend(self, values: Mapping[str, Tensor], weights: Tensor) -> Iterator[Gradients]:
        lent = {name: value.detach().requires_grad_() for name, value in values.items()}
        hooks: list[Any] = []
        clips = [layer._buffers["clip_norm"] for layer in self._layers]
        before: Any = torch.compiler.disable(
            lambda _layer, args, kwargs: tree_map(partial(_weighed, 1 / weights), (args, kwargs))
        )
        after: Any = torch.compiler.disable(lambda _layer, _args, output: _weighed(weights, output))
        try:
            self._use((lent, len(weights)))
            for layer, clip in zip(self._layers, clips, strict=True):
                # Another tensor: the layer's own is neither written nor counted as written.
                layer._buffers["clip_norm"] = torch.full_like(clip, torch.inf)  # pyright: ignore
                hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
                hooks.append(layer.register_forward_hook(after))
            yield partial(_sums, lent)
        finally:
            self._use(None)
            for layer, clip in zip(self._layers, clips, strict=True):
                layer._buffers["clip_norm"] = clip
            for hook in hooks:
                hook.remove()

    def joined(self, alone: Sequence[Tensor]) -> Tensor:
        return torch.stack([*alone]).sum(0)


def _sums(lent: Mapping[str, Tensor], number: Tensor) -> dict[str, Tensor]:
    """Gradients of the lent values, [1, ...]."""
    if not number.requires_grad:
        return {name: torch.zeros_like(value)[None] for name, value in lent.items()}
    found = torch.autograd.grad(number, [*lent.values()], allow_unused=True, materialize_grads=True)
    return {name: grad[None] for name, grad in zip(lent, found, strict=True)}


class GradSamples:
    """Lends to a model whose per-sample gradients Opacus makes: a row for every record.

    Args:
        made: Opacus' wrapped model or hooks object.
    """

    def __init__(self, made: Any) -> None:
        self._model: nn.Module = made._module
        self._mean = made.loss_reduction == "mean"

    def values(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self._model.named_parameters() if p.requires_grad}

    @contextmanager
    def lend(self, values: Mapping[str, Tensor], weights: Tensor) -> Iterator[Gradients]:
        own = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        lent: dict[int, Any] = {}
        for name, parameter in own.items():
            twin: Any = nn.Parameter(values[name].clone())
            twin.grad_sample, twin._forward_counter = None, 0
            lent[id(parameter)] = twin
        places = [
            (module, key, parameter)
            for module in self._model.modules()
            for key, parameter in module._parameters.items()
            if id(parameter) in lent
        ]
        kept = [
            (module, name, module.__dict__.pop(name))
            for module in self._model.modules()
            for name in ("activations", "max_batch_len")
            if name in module.__dict__
        ]
        try:
            for module, key, parameter in places:
                module._parameters[key] = lent[id(parameter)]
            named = {name: lent[id(parameter)] for name, parameter in own.items()}
            yield partial(self._rows, named, len(weights))
        finally:
            for module, key, parameter in places:
                module._parameters[key] = parameter
            for module in self._model.modules():
                for name in ("activations", "max_batch_len"):
                    module.__dict__.pop(name, None)
            for module, name, value in kept:
                module.__dict__[name] = value

    def _rows(self, lent: Mapping[str, Any], count: int, number: Tensor) -> dict[str, Tensor]:
        if number.requires_grad:
            number.backward()
        found: dict[str, Tensor] = {}
        for name, twin in lent.items():
            rows = twin.grad_sample
            rows = torch.stack(rows).sum(0) if isinstance(rows, list) else rows
            rows = twin.new_zeros((count, *twin.shape)) if rows is None else rows.detach()
            # Opacus undoes the mean over the records.
            found[name] = rows / count if self._mean else rows
        return found

    def joined(self, alone: Sequence[Tensor]) -> Tensor:
        return torch.cat([*alone])
