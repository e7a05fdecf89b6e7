"""Watches every forward and every backward of a model whose layers clip."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from aadp_kernels.clip_in_backward.modules import (
    ClippingLayer,
    Taken,
    UnsupportedLayerError,
)
from aadp_kernels.clip_in_backward.shared_rows import check_own_rows, one_each
from aadp_kernels.clip_in_backward.watched import some_records
from aadp_kernels.integrations._forward import Forward, Tried
from aadp_kernels.integrations._gradients import ClippedSums
from aadp_kernels.integrations._independence import Independence
from aadp_kernels.integrations._lending import Aliases
from aadp_kernels.integrations._trial import (
    buffers_as_they_were,
    shape_of_record,
    trial,
)

_TRIALS = 16
_TELL = "tell it: with records(model, n): ..."


class ModelHook:
    """A hook of a watched model; a copy or a pickle of the model has one that does nothing."""

    def __init__(self, act: Any) -> None:
        self.act = act

    @torch.compiler.disable
    def __call__(self, *args: Any) -> None:
        if self.act is not None:
            self.act(*args)

    def __deepcopy__(self, memo: Any) -> ModelHook:
        return ModelHook(None)

    def __reduce__(self) -> Any:
        return ModelHook, (None,)


class Watch:
    """Hands the layers of a model their parameters, forward by forward, and gathers the sums.

    While gradients are enabled a layer computes with aliases of its private parameters that were
    made for this call. Backward gives an alias its clipped sum, which goes to `sums`. Nothing else
    has a reason to give a parameter a gradient: what autograd sends to the parameter itself comes
    from a use outside of its layer and raises in backward, before it is added to anything.

    Args:
        model: Model of clipped layers.
        sums: Private parameters by their names in the model; receives their clipped sums.
        owner: The watch ends when this object does.

    Guarantees:
        While gradients are enabled, a layer with private parameters is called at most once in a
        forward of the model, with as many rows as the model has records, and its records give it
        one gradient; anything else raises UnsupportedLayerError in forward or backward. The first
        forward of every signature (shapes without the records) is tried with one record and with
        two, since any other axis may be as long as the records by chance.

    Edge cases:
        | use | what happens |
        |---|---|
        | without gradients (`torch.no_grad`) | not watched |
        | a layer called outside of a forward of the model | raises |
        | `records(model, n)` | several calls make one forward, which is not tried beforehand |
        | checkpoint(use_reentrant=False) | works |
        | checkpoint(use_reentrant=True) | raises in backward |
        | torch.compile | the watch runs between compiled pieces; fullgraph=True raises |
        | a copy or a pickle of the model | clips, and is not watched |
        | one row for all records (positions) | a row for each; what mixes them raises |
    """

    def __init__(self, model: nn.Module, sums: ClippedSums, owner: object) -> None:
        self.sums, self.closed = sums, ""
        self._forward: Forward | None = None
        self.last_records: int | None = None
        self._told = self._trying = False
        self._tried: dict[object, Tried] = {}
        self._lent: Any = None
        self._sharing: set[int] = set()  # of all forwards
        self._layers: dict[int, tuple[str, str, str]] = {}
        self._watched: list[ClippingLayer] = []
        for name, layer in model.named_modules():
            if isinstance(layer, ClippingLayer):
                self._install(name, layer)
        begin: Any = ModelHook(self._begin)
        end: Any = ModelHook(self._end)
        self._handles: list[Any] = [
            model.register_forward_pre_hook(begin, with_kwargs=True),
            model.register_forward_hook(end, with_kwargs=True, always_call=True),
        ]
        for name, parameter in sums.parameters.items():
            self._handles.append(parameter.register_hook(partial(self._foreign, name)))
        self._independence = Independence(
            Aliases(self._watched, sums.parameters, partial(setattr, self, "_lent"))
        )
        self._finalizer = finalize(owner, self.close, "the optimizer is gone")
        self._finalizer.atexit = False

    def _install(self, name: str, layer: ClippingLayer) -> None:
        """Watch a layer, and end the watch of an earlier optimizer."""
        old = layer.__dict__.pop("watch", None)
        if isinstance(old, Watch):
            old.close("another private optimizer was made for its model")
        at = f"{name}." if name else ""
        own = (name or "<model>", f"{at}weight", f"{at}bias")
        if any(parameter in self.sums.parameters for parameter in own[1:]):
            self._layers[id(layer)] = own
            self._watched.append(layer)
            layer.__dict__["watch"] = self

    def close(self, why: str) -> None:
        """Give the model back as it was; sums are not gathered any more."""
        if self.closed:
            return
        self.closed = why
        self._finalizer.detach()
        for handle in self._handles:
            handle.remove()
        for layer in self._watched:
            if layer.__dict__.get("watch") is self:
                del layer.__dict__["watch"]
        self._watched.clear()

    @torch.compiler.disable
    def enter(self, layer: nn.Module, x: Tensor) -> Taken:
        """Input, weight and bias for one call of a layer; see `LayerWatch`."""
        own: Any = layer._parameters
        name, weight, bias = self._layers[id(layer)]
        if self._lent is not None:
            lent, count = self._lent
            if id(layer) in self._sharing:
                x = one_each(x, count)
            return x, lent.get(weight, own.get("weight")), lent.get(bias, own.get("bias"))
        if not torch.is_grad_enabled():
            return x, own.get("weight"), own.get("bias")
        forward = self._forward
        if torch._C._current_graph_task_id() != -1:
            # Computed again in backward: not a call, and no gradient may come back through it.
            if id(layer) in self._sharing:
                x = one_each(x, self.last_records)
            forward = None
        elif forward is None:
            raise UnsupportedLayerError(
                f"{name} is called outside of a forward of the model, so the number of its records "
                f"is not known: call the model, or {_TELL}"
            )
        else:
            x = self._checked(forward, name, id(layer), x)
        return (
            x,
            self._alias(own.get("weight"), weight, forward),
            self._alias(own.get("bias"), bias, forward),
        )

    def _checked(self, forward: Forward, name: str, layer: int, x: Tensor) -> Tensor:
        """The input, a row a record; raises unless it is the only call, on all records."""
        if forward.records is None:
            raise UnsupportedLayerError(
                f"the number of records that {name} must see is not known, because {forward.why}; "
                f"{_TELL}"
            )
        if layer in forward.called:
            raise UnsupportedLayerError(f"{name} is used more than once in one forward")
        forward.called.add(layer)
        if x.dim() and x.shape[0] == 1 != forward.records:
            if self._trying:
                forward.sharing.add(layer)
                self._sharing.add(layer)
            if layer in forward.sharing:
                x = one_each(x, forward.records)
        if not x.dim() or x.shape[0] != forward.records:
            raise UnsupportedLayerError(
                f"{name} gets shape {tuple(x.shape)} for {forward.records} record(s): the first "
                "axis of what it gets must be the records"
            )
        return x

    def _alias(self, own: Any, name: str, forward: Forward | None) -> Any:
        """A leaf with the values of a private parameter; other parameters as they are."""
        private = self.sums.parameters.get(name)
        if private is None:
            return own
        if own is not private:
            raise UnsupportedLayerError(
                f"{name!r} is another tensor than the one the private optimizer was made for"
            )
        if not private.requires_grad:
            return own
        alias = own.detach().requires_grad_()
        # As register_post_accumulate_grad_hook, whose handle costs five times as much.
        alias._post_accumulate_grad_hooks = {0: partial(self._gather, name, forward)}
        return alias

    def _gather(self, name: str, forward: Forward | None, alias: Tensor) -> None:
        """Move the clipped sum that an alias was given to its parameter."""
        grad, alias.grad = alias.grad, None
        if grad is None:
            return
        if self.closed:
            raise RuntimeError(f"the private optimizer of this forward has retired: {self.closed}")
        if forward is None:
            self._fail(
                f"{name!r} is used by a layer that is computed again in backward, with a graph of "
                "its own: checkpoint with use_reentrant=False"
            )
        elif name in forward.given:
            self._fail(
                f"{name!r} gets a second gradient from one forward: each backward pass is clipped "
                "by itself, and a record in both would count twice"
            )
        else:
            if not forward.given:
                self.sums.begin()
            forward.given.add(name)
            self.sums.add(name, grad)

    def _foreign(self, name: str, _grad: Tensor) -> None:
        """Autograd has a gradient for a parameter itself."""
        self._fail(
            f"the parameter {name!r} is used outside of its layer, where nothing clips its "
            "gradient; a penalty on weights can be the weight_decay of the optimizer"
        )

    def _fail(self, reason: str) -> None:
        self.sums.give_up(f"a backward pass has failed, call zero_grad(): {reason}")
        raise UnsupportedLayerError(reason)

    @staticmethod
    def _seen() -> bool:
        """Whether what is computed is a forward that gives gradients, not a part of a backward."""
        return torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1

    def _compare(self, forward: Any, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Raise if records are mixed. Parts of what was told are no model's forward."""
        kind = forward.kind
        if kind is None:
            kind = "told", model.training, *map(shape_of_record, tree_leaves((args, kwargs)))
        self._trying = True
        try:
            self._independence.check(kind, model, args, kwargs, forward.records)
        finally:
            self._trying = False

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward of the model begins."""
        if self._told or self._trying or not self._seen():
            return
        simple = not kwargs and all(type(value) is Tensor for value in args)
        leaves = args if simple else tree_leaves((args, kwargs))
        sizes = {t.shape[0] for t in leaves if isinstance(t, Tensor) and t.dim()}
        if len(sizes) != 1:
            found = f"have first axes of {sorted(sizes)}" if sizes else "hold no tensor [B, ...]"
            self._forward = Forward(None, why=f"the inputs of the model {found}")
            self.last_records = None
            return
        (records,) = sizes
        self.last_records = records
        signature = (model.training, *map(shape_of_record, leaves))
        tried = self._tried.get(signature)
        if tried is None:
            tried = (set(), set(), set())
            self._try(tried, model, args, kwargs, records)
            self._tried[signature] = tried
        self._forward = Forward(records, tried=tried, kind=signature)

    def _end(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A forward of the model has ended; without an output if by an error."""
        if self._trying:
            return
        if self._told:
            if output is not None and self._seen():
                self._compare(self._forward, model, args, kwargs)
            return
        forward, self._forward = self._forward, None
        if output is None or forward is None or forward.tried is None:
            return
        self._check_tried(forward, forward.tried, model, args, kwargs)
        self._compare(forward, model, args, kwargs)

    def _check_tried(
        self, forward: Forward, tried: Tried, model: nn.Module, args: Any, kwargs: Any
    ) -> None:
        """Raise unless every layer that was called was called in a trial, too."""
        # Layers on a path that is taken by chance.
        for seed in range(_TRIALS):
            if not forward.untried():
                return
            self._try(tried, model, args, kwargs, forward.records, seed)
        if forward.untried():
            names = sorted(self._layers[i][0] for i in forward.untried())
            raise UnsupportedLayerError(
                f"{', '.join(names)}: called for {forward.records} records, and in no forward of "
                f"one or two ({_TRIALS} were tried), so the first axis of what they get may be "
                "something else than records"
            )

    def _try(
        self, tried: Tried, model: nn.Module, args: Any, kwargs: Any, records: Any,
        seed: int | None = None,
    ) -> None:  # fmt: skip
        """Run the model on one record and on two, and note the layers: no other axis has both."""
        self._trying = True
        try:
            for count, called in zip((1, 2), tried[:2], strict=True):
                pick = partial(some_records, records=records, count=count)
                some, named = tree_map(pick, (args, kwargs))
                self._forward = forward = Forward(count)
                with trial(seed), buffers_as_they_were(model):
                    model(*some, **named)
                called |= forward.called
                if forward.sharing:
                    self._try_rows(forward, partial(model, *some, **named), model, seed)
                tried[2].update(forward.sharing)
        finally:
            self._trying, self._forward = False, None

    def _try_rows(self, forward: Forward, run: Any, model: nn.Module, seed: int | None) -> None:
        """Raise if two records depend on each other's row of what gets one row for all."""
        self._forward = Forward(forward.records)
        layers = {self._layers[id(w)][0]: w for w in self._watched if id(w) in forward.sharing}
        with trial(seed), buffers_as_they_were(model):
            check_own_rows(run, layers)

    @contextmanager
    def told(self, count: int) -> Iterator[None]:
        """One forward of `count` records, whatever is called within."""
        self._forward, self._told, self.last_records = Forward(count), True, count
        try:
            yield
        finally:
            self._forward, self._told = None, False


@contextmanager
def records(model: nn.Module, count: int) -> Iterator[None]:
    """What is called within is one forward of `count` records.

    For a watched model whose inputs do not say how many records they hold, or whose parts are
    called one by one: `with records(model, len(x)): out = model.head(model.body(x))`.

    Args:
        model: The model of a `PrivateOptimizer`, or what the Opacus adapter made of one.
        count: Number of records, the first axis of what every layer gets. That the axis holds
            records, and not positions that are as many by chance, is the caller's promise.

    Raises:
        ValueError: Nothing watches the model.
    """
    # The models that Opacus gives per-sample gradients have a watch of another class.
    found: list[Any] = [module.__dict__.get("watch") for module in model.modules()]
    watches = {id(watch): watch for watch in found if hasattr(watch, "told")}
    if len(watches) != 1:
        raise ValueError("records() needs the model of one private optimizer")
    (watch,) = watches.values()
    with watch.told(count):
        yield


def clipped_layers(model: nn.Module) -> Iterator[tuple[str, ClippingLayer]]:
    """Names and modules that clip in backward."""
    for name, module in model.named_modules():
        if isinstance(module, ClippingLayer):
            yield name, module
