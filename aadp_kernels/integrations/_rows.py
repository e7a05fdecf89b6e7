"""Watches what layers are given whose per-sample gradients Opacus makes: a row for every record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

import torch
from opacus.layers.dp_rnn import DPGRU, DPLSTM, DPRNN, RNNLinear
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from aadp_kernels.clip_in_backward.modules import UnsupportedLayerError
from aadp_kernels.clip_in_backward.refusals import mixing
from aadp_kernels.clip_in_backward.watched import some_records
from aadp_kernels.integrations._independence import Independence
from aadp_kernels.integrations._lending import GradSamples
from aadp_kernels.integrations._per_sample import label
from aadp_kernels.integrations._trial import (
    buffers_as_they_were,
    shape_of_record,
    trial,
)
from aadp_kernels.integrations._watch import ModelHook

Tried = tuple[set[str], set[str]]

_TRIALS = 16
_OUTSIDE = "it is called outside of a forward of the model"


class RowWatch:
    """Sees every forward of a model, and that each of its layers gets a row for every record.

    Opacus takes the rows of a layer's input for the records. A row that is something else, such as
    a token, would be clipped by itself, and a record could contribute many clip norms.

    Args:
        made: Opacus' wrapped model or hooks object. The watch ends when it is gone, or when its
            hooks are removed.
        batch_first: As in Opacus.

    Guarantees:
        While gradients are enabled, a layer is called within a forward of the model, with one
        tensor, whose batch axis is as long as the model has records, and returns one tensor, or
        UnsupportedLayerError is raised in the forward. The first forward of every signature (shapes
        without the records) is tried with one record and with two, unless batch_first is False.
    """

    def __init__(self, made: Any, *, batch_first: bool) -> None:
        self._axis = 0 if batch_first else 1
        self._made = ref(made)
        self._count: int | None = None
        self._why = _OUTSIDE
        self._trying = self._told = self._comparing = False
        self._called: set[str] = set()
        self._tried: dict[object, Tried] = {}
        self._now: Tried | None = None
        self._kind: object = None
        model = made._module
        self._norms = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
        # Opacus' recurrent layers are seen by the linear layers within.
        found: Iterator[nn.Module] = made.iterate_submodules(model)
        self._layers = [m for m in found if type(m) not in (DPRNN, DPGRU, DPLSTM)]
        self._independence = Independence(GradSamples(made), axis=self._axis, training=self._layers)
        self._handles: list[Any] = []
        self._install(model)

    def _install(self, model: nn.Module) -> None:
        """Watch the model and its layers, and end the watch of an earlier wrapper."""
        old = model.__dict__.get("watch")
        if isinstance(old, RowWatch):
            old.close()
        begin: Any = ModelHook(self._begin)
        end: Any = ModelHook(self._end)
        names = {id(module): label(name, module) for name, module in model.named_modules()}
        self._handles = [
            model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True),
            model.register_forward_hook(end, with_kwargs=True, always_call=True),
        ]
        for layer in self._layers:
            before: Any = ModelHook(partial(self._before, names[id(layer)]))
            after: Any = ModelHook(partial(self._after, names[id(layer)]))
            self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(after, prepend=True))
        model.__dict__["watch"] = self

    def close(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()

    def __reduce__(self) -> Any:
        """Copies and pickles of the model are not watched."""
        return type(None), ()

    def _unseen(self) -> bool:
        """Whether Opacus makes no per-sample gradients of this forward."""
        if self._trying:
            return False
        made = self._made()
        if made is None or not made.hooks_enabled or not torch.is_grad_enabled():
            return True
        return torch._C._current_graph_task_id() != -1

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward of the model begins."""
        if self._told or self._trying or self._unseen() or not model.training:
            return
        for name, norm in self._norms:
            reason = mixing(norm)
            if reason is not None:
                raise UnsupportedLayerError(f"{label(name, norm)} {reason}")
        leaves = tree_leaves((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, Tensor) and t.dim() > self._axis]
        sizes = {t.shape[self._axis] for t in tensors}
        self._now, self._called = None, set()
        self._kind = tuple(map(partial(shape_of_record, axis=self._axis), leaves))
        self._count = next(iter(sizes)) if len(sizes) == 1 else None
        self._why = f"the inputs of the model have batch axes of {sorted(sizes)}"
        if self._count is not None and self._axis == 0:
            if self._kind not in self._tried:
                tried: Tried = (set(), set())
                self._try(tried, model, args, kwargs, self._count)
                self._tried[self._kind] = tried
            self._now, self._called = self._tried[self._kind], set()

    def _try(
        self, tried: Tried, model: nn.Module, args: Any, kwargs: Any, count: int,
        seed: int | None = None,
    ) -> None:  # fmt: skip
        """Run the model on one record and on two: no other axis has both lengths."""
        self._trying = True
        try:
            for some, called in zip((1, 2), tried, strict=True):
                pick = partial(some_records, records=count, count=some)
                few, named = tree_map(pick, (args, kwargs))
                self._count, self._called = some, set()
                with trial(seed), buffers_as_they_were(model), torch.no_grad():
                    model(*few, **named)
                called |= self._called
        finally:
            self._trying, self._count = False, count
            for layer in self._layers:
                # What a packed sequence has told Opacus' recurrent layers.
                layer.__dict__.pop("max_batch_len", None)

    def _end(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A forward of the model has ended; without an output if by an error."""
        if self._trying:
            return
        if self._told:
            if output is not None and model.training and not self._unseen():
                kind = "told", *map(shape_of_record, tree_leaves((args, kwargs)))
                self._compare(kind, model, args, kwargs)
            return
        try:
            if output is None or self._count is None:
                return
            if self._now is not None:
                self._check_tried(self._now, model, args, kwargs, self._count)
            self._compare(self._kind, model, args, kwargs)
        finally:
            self._count, self._now, self._why = None, None, _OUTSIDE

    def _check_tried(
        self, tried: Tried, model: nn.Module, args: Any, kwargs: Any, count: int
    ) -> None:
        """Raise unless every layer that was called was called in a trial, too."""
        called = self._called
        # Layers on a path that is taken by chance.
        for seed in range(_TRIALS):
            if called <= tried[0] & tried[1]:
                return
            self._try(tried, model, args, kwargs, count, seed)
        untried = called - (tried[0] & tried[1])
        if untried:
            raise UnsupportedLayerError(
                f"{', '.join(sorted(untried))}: called for {count} records, and in no forward "
                f"of one or two ({_TRIALS} were tried), so the batch axis of what they get may "
                "be something else than records"
            )

    def _compare(self, kind: object, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Raise if records are mixed."""
        self._trying = self._comparing = True
        try:
            self._independence.check(kind, model, args, kwargs, self._count or 0)
        finally:
            self._trying = self._comparing = False

    def _before(self, name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
        """A layer is called."""
        if self._comparing or self._unseen() or not layer.training:
            return
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            raise UnsupportedLayerError(
                f"{name} must be called with one tensor and nothing else: Opacus would make its "
                "per-sample gradients without the other inputs"
            )
        if self._count is None:
            raise UnsupportedLayerError(
                f"the number of records that {name} must see is not known, because {self._why}; "
                "call the model, or tell it: with records(model, n): ..."
            )
        self._called.add(name)
        self._check_rows(name, layer, args[0])

    def _check_rows(self, name: str, layer: nn.Module, x: Tensor) -> None:
        """Raise unless the input has a row for every record."""
        recurrent = isinstance(layer, RNNLinear)
        axis = 0 if recurrent else self._axis
        rows = x.shape[axis] if x.dim() > axis else None
        # Of a packed sequence only the records that are long enough are left.
        packed = recurrent and getattr(layer, "max_batch_len", None) == self._count
        if rows != self._count and not (packed and rows is not None and rows < (self._count or 0)):
            raise UnsupportedLayerError(
                f"{name} gets shape {tuple(x.shape)} for {self._count} record(s): the batch axis "
                "of what it gets must be the records"
            )

    def _after(self, name: str, layer: nn.Module, args: Any, output: Any) -> None:
        """A layer has returned."""
        if not (self._unseen() or isinstance(output, Tensor)):
            raise UnsupportedLayerError(
                f"{name} must return one tensor: Opacus would make its per-sample gradients from "
                "the first output alone"
            )

    @contextmanager
    def told(self, count: int) -> Iterator[None]:
        """One forward of `count` records, whatever is called within."""
        self._told, self._count = True, count
        try:
            yield
        finally:
            self._told, self._count = False, None


class ExpandedWatch:
    """Sees that no records are mixed where torch's expanded weights make per-sample gradients.

    Args:
        made: Opacus' wrapped model, whose first input has the records on its first axis.
    """

    def __init__(self, made: Any) -> None:
        self._trying = False
        self._independence = Independence(GradSamples(made))
        end: Any = ModelHook(self._end)
        made.register_forward_hook(end, with_kwargs=True)

    def _end(self, made: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
        """A forward of the model has ended."""
        if self._trying or not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        leaves = tree_leaves((args, kwargs))
        records = next((len(t) for t in leaves if isinstance(t, Tensor) and t.dim()), 0)
        self._trying = True
        try:
            self._independence.check(
                (made.training, *map(shape_of_record, leaves)), made, args, kwargs, records
            )
        finally:
            self._trying = False
