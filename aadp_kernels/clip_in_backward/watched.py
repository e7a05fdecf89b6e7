"""Forwards whose clipped layers alone see their trained parameters, each layer once, on records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from aadp_kernels.clip_in_backward.modules import (
    ClippingLayer,
    Taken,
    UnsupportedLayerError,
)
from aadp_kernels.clip_in_backward.shared_rows import check_own_rows, moved, one_each

# What a network may ask of a parameter that is not its own: nothing that depends on the values.
_METADATA = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf",
                 "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_meta", "itemsize", "nbytes")
} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.__len__, Tensor.element_size,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device, Tensor.nelement,
    Tensor.is_contiguous, Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full,
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.is_floating_point,
}  # fmt: skip


class GuardedParameter(nn.Parameter):
    """A parameter whose values nobody may use: its layer is handed the values in another tensor.

    Whatever reads it otherwise, by attribute, from a list or through `parameters()`, would get a
    gradient that no layer clips.
    """

    guarded_name: str

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Metadata, or UnsupportedLayerError."""
        if func not in _METADATA:
            used = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, cls))
            raise UnsupportedLayerError(
                f"the parameter {used.guarded_name!r} is used outside of its layer, by "
                f"{getattr(func, '__name__', func)}"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class WatchedForward:
    """Watches every forward of a model of clipped layers, whose parameters it hands out itself.

    Args:
        model: Result of `with_clipping` that is used for nothing else: its trained parameters are
            made unusable (`GuardedParameter`), and its layers take theirs from the watch.

    Guarantees:
        Within `forward` each layer that clips is called at most once, with as many rows as there
        are records, or UnsupportedLayerError is raised. The tensors given to `forward` reach the
        layers alone, so no other use of a parameter can have a gradient; one that needs values of a
        trained parameter raises UnsupportedLayerError.

    Edge cases:
        | use | what happens |
        |---|---|
        | shape, dtype, device, `new_zeros` of a parameter | allowed |
        | a frozen parameter of a layer | the model's own, free to use |
        | a forward that is recomputed in backward (checkpointing) | takes the parameters again |
        | a layer called outside of `forward` | UnsupportedLayerError |
        | compiled code that uses a layer | UnsupportedLayerError from `check` |
        | a layer that gets one row for all records (positions) | a row for each, see `check` |
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.values = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        self._layers: dict[int, tuple[str, str, str]] = {}
        self._given: Mapping[str, Tensor] | None = None
        self._last: Mapping[str, Tensor] = self.values
        self._records = 0
        self._called: set[str] = set()
        self._sharing: set[str] = set()  # layers that get one row for all records
        self._checking = False
        # Of a parameter that layers share, all know the one name under which it is given.
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for name, module in model.named_modules():
            if isinstance(module, ClippingLayer):
                own: Any = module._parameters
                weight, bias = (names.get(id(own.get(key)), key) for key in ("weight", "bias"))
                self._layers[id(module)] = (name or "<model>", weight, bias)
                module.__dict__["watch"] = self
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # Who kept a reference to the parameter has this very object.
                parameter.__class__ = GuardedParameter
                parameter.guarded_name = name  # pyright: ignore[reportAttributeAccessIssue]

    @contextmanager
    def forward(self, parameters: Mapping[str, Tensor], records: int) -> Iterator[None]:
        """One forward of the model.

        Args:
            parameters: Trained parameters by name, as the layers are to take them.
            records: Length of the first axis of what every layer must get.
        """
        self._given, self._records = parameters, records
        self._called.clear()
        try:
            yield
        finally:
            self._last, self._given = parameters, None

    def enter(self, layer: nn.Module, x: Tensor) -> Taken:
        """Input, weight and bias for one call of a layer; see `LayerWatch`."""
        name, weight, bias = self._layers[id(layer)]
        given = self._given
        if given is None:
            if torch._C._current_graph_task_id() == -1:
                raise UnsupportedLayerError(f"{name} is called outside of the model's forward")
            given = self._last
        elif name in self._called:
            raise UnsupportedLayerError(f"{name} is used more than once in one forward")
        self._called.add(name)
        if x.dim() and x.shape[0] == 1 != self._records and self._shares(name):
            x = one_each(x, self._records)
        if not x.dim() or x.shape[0] != self._records:
            raise UnsupportedLayerError(
                f"{name} gets shape {tuple(x.shape)} for {self._records} record(s): the first axis "
                "of what it gets must be the records"
            )
        own: Any = layer._parameters
        return x, given.get(weight, own.get("weight")), given.get(bias, own.get("bias"))

    def _shares(self, name: str) -> bool:
        """Whether a layer may get one row for all records; the check finds out which ones do."""
        if self._checking:
            self._sharing.add(name)
        return name in self._sharing

    def check(self, *example: Any) -> None:
        """Run one forward of one record and one of two, and raise as `forward` does.

        With as many positions as records, a layer that gets positions first looks right; no other
        axis has both lengths. A layer that gets one row for two records (of positions, say) gets a
        copy for each from now on, if no record's outputs depend on another one's copy.

        Args:
            *example: Inputs of the model, a batch [B, ...].

        Guarantees:
            Leaves the global random state as it was.
        """
        self._sharing.clear()
        self._checking = True
        try:
            self._check(example)
        finally:
            self._checking = False

    def _check(self, example: tuple[Any, ...]) -> None:
        first = next((t for t in tree_leaves(example) if isinstance(t, Tensor) and t.dim()), None)
        records = -1 if first is None else len(first)

        def run(parameters: Mapping[str, Tensor], count: int) -> Any:
            some = tree_map(partial(some_records, records=records, count=count), example)
            with self.forward(parameters, count):
                return self.model(*some)

        with torch.random.fork_rng():
            for count in (1, 2):
                try:
                    run(self.values, count)
                except Exception as error:
                    if not type(error).__module__.startswith("torch._dynamo"):
                        raise
                    raise UnsupportedLayerError(
                        "compiled code uses a layer, and what it does cannot be watched"
                    ) from error
            if self._sharing:
                layers = {
                    self._layers[id(layer)][0]: layer
                    for layer in self.model.modules()
                    if id(layer) in self._layers and self._layers[id(layer)][0] in self._sharing
                }
                check_own_rows(lambda: run(moved(self.values), 2), layers)


def some_records(value: Any, records: int, count: int) -> Any:
    """The first `count` records of what holds `records` of them, again from the start if few."""
    if not (isinstance(value, Tensor) and value.dim() and len(value) == records):
        return value
    if not records:
        return value.new_zeros((count, *value.shape[1:]))
    return value[[i % records for i in range(count)]]
