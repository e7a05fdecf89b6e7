"""Run-time checks of what clip-in-backward takes for granted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from aadp_kernels.clipping import UnsupportedLayerError
from aadp_kernels.single_use import check_single_use


class Watch:
    """Raises where a record of one forward could contribute more than its clip norm to a layer.

    A layer must be called once in a forward, and see the batch that the model sees: a layer that
    was given [batch * tokens, ...] would clip tokens, not records. The first forward is also run
    through `check_single_use`, once more. Compiled code is not watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self.batch: int | None = None
        self._calls: dict[str, int] = {}
        self._checked = False
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for name, module in clipped_layers(model):
            module.register_forward_pre_hook(self._layer(name or "<model>"))

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A new forward; the first tensor that is given to the model says how many records."""
        if torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled() and not self._checked and not kwargs:
            self._checked = True
            check_single_use(module, *args)
        self._calls.clear()
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
        self.batch = tensors[0].shape[0] if tensors else None

    def _layer(self, name: str) -> Callable[..., None]:
        """The check of one layer."""

        def check(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if torch.compiler.is_compiling():
                return
            self._calls[name] = self._calls.get(name, 0) + 1
            if self._calls[name] > 1:
                raise UnsupportedLayerError(f"{name} is used more than once in one forward")
            if inputs and self.batch is not None and inputs[0].shape[0] != self.batch:
                raise UnsupportedLayerError(
                    f"{name} must see the {self.batch} records of the batch in its first "
                    f"dimension, got shape {tuple(inputs[0].shape)}"
                )

        return check


def clipped_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules that clip in backward."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "norm_p", None), int):
            yield name, module
