"""Gradients of clients trained together: one `torch.func.vmap`, or one client after another.

Parameters of k clients are dictionaries of stacked tensors [k, ...].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from aadp_kernels import WatchedForward
from fl_lightning.local.batches import Batch
from fl_lightning.local.recording import Recorded, can_record
from fl_lightning.local.rows import own
from fl_lightning.networks.convolutions import CohortConvolutions
from fl_lightning.networks.functional import apply_with
from fl_lightning.networks.state import with_parameters
from fl_lightning.values.round import Params

Loss = Callable[[Tensor, Tensor], Tensor]


class CohortGradient:
    """Gradients of the summed loss for k clients: Σ over records, no division.

    Args:
        network: the model; only its forward is used.
        loss: loss of each record, (outputs, labels) → [B].
        vectorize: one vmap over the clients, or a loop over them.
        max_examples: records × clients computed at once; more go into micro-batches.
        mask_names: buffers of the network that are to hold the batch's mask.
        watch: hands the parameters to the network's layers; None: they are put into the network.
        record: whether the vmapped computation may be recorded and replayed, where it is a function
            of parameters and records alone.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        *,
        vectorize: bool,
        max_examples: int = 2**62,
        mask_names: tuple[str, ...] = (),
        watch: WatchedForward | None = None,
        record: bool = False,
    ) -> None:
        self.network = network
        self.loss = loss
        self.vectorize = vectorize
        self.max_examples = max_examples
        self.mask_names = mask_names
        self.watch = watch
        self._recorded: dict[tuple[bool, tuple[str, ...]], Recorded] | None = None
        if record and vectorize and can_record(network, loss):
            self._recorded = {}

    def __call__(
        self,
        params: Params,
        batch: Batch,
        *,
        shared: bool,
        probes: Params | None = None,
        constants: Params | None = None,
        common: Params | None = None,
        weight: Tensor | None = None,
    ) -> tuple[Params, Params]:
        """Gradients with respect to parameters and probes, each stacked [k, ...].

        Args:
            params: stacked [k, ...], or one model's parameters if `shared`.
            batch: records of k clients.
            shared: whether all clients still hold the same parameters.
            probes: buffers whose gradients carry statistics out of the backward pass, [k, ...].
            constants: tensors of the network that are not differentiated, [k, ...].
            common: the same, one for all clients.
            weight: what each client's loss is multiplied by, [k]; None: nothing.
        """
        total: tuple[Params, Params] | None = None
        for part in batch.split(max(1, self.max_examples // len(batch.x))):
            fixed = dict(constants or {}) | dict.fromkeys(self.mask_names, part.mask)
            # Clip-in-backward has a shorter way for one client than under vmap.
            alone = self.watch is not None and len(part.x) == 1
            run = self._vmapped if self.vectorize and not alone else self._looped
            grads = run(params, probes or {}, fixed, common or {}, part, shared, weight)
            if total is None:
                total = grads
            else:
                for acc, new in zip(total, grads, strict=True):
                    for name in acc:
                        acc[name] = acc[name] + new[name]
        assert total is not None
        return total

    def _summed_loss(
        self,
        params: Params,
        probes: Params,
        fixed: Params,
        common: Params,
        x: Tensor,
        y: Tensor,
        mask: Tensor,
        weight: Tensor | None,
    ) -> Tensor:
        buffers = {**probes, **fixed, **common}
        if self.watch is None:
            outputs = apply_with(self.network, {**params, **buffers}, x)
        else:
            with self.watch.forward(params, len(x)):
                outputs = functional_call(self.network, buffers, (x,), tie_weights=False)
        losses = self.loss(outputs, y)
        total = torch.where(mask > 0, losses, 0.0).sum()
        return total if weight is None else total * weight

    def _vmapped(
        self,
        params: Params,
        probes: Params,
        fixed: Params,
        common: Params,
        batch: Batch,
        shared: bool,
        weight: Tensor | None,
    ) -> tuple[Params, Params]:
        records = (batch.x, batch.y, batch.mask)
        held = probes or fixed or common
        if self._recorded is None or held or weight is None or batch.x.is_cuda:
            mapped = self._mapped(shared, None if weight is None else 0)
            with CohortConvolutions():
                return mapped(params, probes, fixed, common, *records, weight)
        names = tuple(params)
        if (shared, names) not in self._recorded:
            self._recorded[shared, names] = Recorded(self._flat(shared, names))
        grads = self._recorded[shared, names](*params.values(), *records, weight)
        return dict(zip(names, grads, strict=True)), {}

    def _mapped(self, shared: bool, weight: int | None) -> Callable[..., tuple[Params, Params]]:
        return vmap(
            grad(self._summed_loss, argnums=(0, 1)),
            in_dims=(None if shared else 0, 0, 0, None, 0, 0, 0, weight),
            randomness="different",
        )

    def _flat(self, shared: bool, names: tuple[str, ...]) -> Callable[..., list[Tensor]]:
        """The gradients of parameters of these names as a function of tensors alone."""
        mapped = self._mapped(shared, 0)

        def function(*inputs: Tensor) -> list[Tensor]:
            given = dict(zip(names, inputs, strict=False))
            with CohortConvolutions():
                grads, _ = mapped(given, {}, {}, {}, *inputs[len(names) :])
            return [own(grads[name]) for name in names]

        return function

    def _looped(
        self,
        params: Params,
        probes: Params,
        fixed: Params,
        common: Params,
        batch: Batch,
        shared: bool,
        weight: Tensor | None,
    ) -> tuple[Params, Params]:
        rows: list[tuple[Tensor, ...]] = []
        for i in range(len(batch.x)):
            own = {n: (v if shared else v[i]).detach().requires_grad_() for n, v in params.items()}
            seen = {n: v[i].detach().requires_grad_() for n, v in probes.items()}
            rest = {n: v[i] for n, v in fixed.items()} | common
            factor = None if weight is None else weight[i]
            records = (batch.x[i], batch.y[i], batch.mask[i])
            rows.append(self._gradient(own, seen, rest, records, factor))
        columns = zip(*rows, strict=True)
        stacked = [c[0][None] if len(c) == 1 else torch.stack(c) for c in columns]
        return (
            dict(zip(params, stacked, strict=False)),
            dict(zip(probes, stacked[len(params) :], strict=True)),
        )

    def _gradient(
        self,
        own: Params,
        seen: Params,
        fixed: Params,
        records: tuple[Tensor, Tensor, Tensor],
        factor: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Gradients of one client; the backward pass too has its parameters in the network."""

        def work(_: nn.Module) -> tuple[Tensor, ...]:
            loss = self._summed_loss(own, seen, fixed, {}, *records, factor)
            return torch.autograd.grad(
                loss, [*own.values(), *seen.values()], allow_unused=True, materialize_grads=True
            )

        with torch.enable_grad():
            if self.watch is not None:  # hands out the parameters by itself
                return work(self.network)
            return with_parameters(self.network, own | fixed, work)


# What a hook returns is the caller's to overwrite.
GradientHook = Callable[[int, Params, bool, Batch], Params]


def plain_gradient(
    cohort_gradient: CohortGradient, constants: Params | None = None
) -> GradientHook:
    """Hook for training without per-record privacy: the mean gradient of the batch.

    Args:
        cohort_gradient: of the network.
        constants: tensors of the network that each client holds fixed, [k, ...].
    """

    def hook(step: int, params: Params, shared: bool, batch: Batch) -> Params:
        # Dividing the loss costs nothing; dividing the gradients is a pass over memory.
        weight = batch.divisor.reciprocal()
        grads, _ = cohort_gradient(params, batch, shared=shared, constants=constants, weight=weight)
        return _each_its_own(grads)

    return hook


def _each_its_own(grads: Params) -> Params:
    """Gradients that can be overwritten one by one: autograd hands one tensor to both of a + b."""
    found: dict[int, Tensor] = {}
    result = {}
    for name, value in grads.items():
        value = own(value)
        result[name] = value.clone() if value.data_ptr() in found else value
        found[value.data_ptr()] = value
    return result
