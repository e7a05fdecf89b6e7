"""Local training of a group of clients together. Knows nothing of privacy beyond its gradient hook.

Parameters of k clients are dictionaries of stacked tensors [k, ...]. Training is the same code
whether the gradients of the clients are computed under one `torch.func.vmap` or one client after
another; `faster_execution` measures which is better for a network and batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from aadp_kernels import NoiseKey, WatchedForward, poisson_mask
from fl_lightning.convolutions import CohortConvolutions
from fl_lightning.functional import apply_with
from fl_lightning.network_state import with_parameters
from fl_lightning.recording import Recorded, can_record
from fl_lightning.types import Params

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """One local step's records of k clients, padded to one length.

    Attributes:
        x: inputs [k, B, ...]; zeros where padded.
        y: labels [k, B].
        mask: 1 for a record, 0 for padding, float [k, B].
        divisor: what the sum of gradients is divided by, [k]: the public q·n_k under Poisson
            sampling, the number of records otherwise.
        active: whether the client takes this step, bool [k].
    """

    x: Tensor
    y: Tensor
    mask: Tensor
    divisor: Tensor
    active: Tensor

    def split(self, size: int) -> Iterator[Batch]:
        """Micro-batches of at most `size` records a client."""
        for start in range(0, self.x.shape[1], size):
            part = slice(start, start + size)
            yield replace(self, x=self.x[:, part], y=self.y[:, part], mask=self.mask[:, part])


def poisson_rows(
    sizes: list[int], rate: float, steps: int, *, key: NoiseKey, clients: list[int]
) -> Iterator[list[np.ndarray]]:
    """Positions of each client's Poisson batch, for each local step: fresh secret coins."""
    for step in range(steps):
        yield [
            poisson_mask(n, rate, key=key, step=step, client=k).nonzero()[:, 0].cpu().numpy()
            for n, k in zip(sizes, clients, strict=True)
        ]


def shuffled_rows(
    sizes: list[int], batch_size: int, steps: int | None, epochs: int, *, seeds: list[list[int]]
) -> Iterator[list[np.ndarray]]:
    """Positions of each client's shuffled minibatches: `steps` of them, or those of `epochs`.

    Clients with fewer batches than the longest get empty ones at the end.
    """
    plans = []
    for n, seed in zip(sizes, seeds, strict=True):
        generator = np.random.default_rng(seed)
        passes = epochs if steps is None else -(-steps * batch_size // n)
        plan = []
        for _ in range(passes):
            order = generator.permutation(n)
            plan += [order[i : i + batch_size] for i in range(0, n, batch_size)]
        plans.append(plan if steps is None else plan[:steps])
    for step in range(max(len(plan) for plan in plans)):
        yield [plan[step] if step < len(plan) else np.empty(0, np.int64) for plan in plans]


def gather(
    x: Tensor,
    y: Tensor,
    records: list[np.ndarray],
    *,
    divisor: Tensor | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Batch:
    """Padded batch of the given records; `divisor` None divides by their number.

    `dtype` is that of the inputs, None: their own.
    """
    lengths = np.array([len(r) for r in records])
    held = np.arange(max(1, lengths.max())) < lengths[:, None]
    rows = np.zeros(held.shape, np.int64)
    rows[held] = np.concatenate(records)
    counts, mask, index = (torch.from_numpy(a) for a in (lengths, held, rows))
    inputs = x.index_select(0, index.view(-1)).view(*index.shape, *x.shape[1:])
    if not held.all():
        # A record that stands in for padding must not bring its NaNs along.
        inputs.masked_fill_(~mask.view(*mask.shape, *[1] * (inputs.ndim - 2)), 0)
    active = torch.ones_like(counts, dtype=torch.bool) if divisor is not None else counts > 0
    divisor = counts.clamp(min=1) if divisor is None else divisor
    return Batch(
        inputs.to(device=device, dtype=dtype),
        y[index].to(device),
        mask.to(device, torch.float32),
        divisor.to(device, torch.float32),
        active.to(device),
    )


def input_dtype(network: nn.Module, x: Tensor) -> torch.dtype:
    """What a network takes real records in: float64 if that is what its parameters are."""
    double = next(network.parameters()).dtype == torch.float64 and x.is_floating_point()
    return torch.float64 if double else x.dtype


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
        weight: Tensor | None = None,
    ) -> tuple[Params, Params]:
        """Gradients with respect to parameters and probes, each stacked [k, ...].

        Args:
            params: stacked [k, ...], or one model's parameters if `shared`.
            batch: records of k clients.
            shared: whether all clients still hold the same parameters.
            probes: buffers whose gradients carry statistics out of the backward pass, [k, ...].
            constants: buffers that are not differentiated, [k, ...].
            weight: what each client's loss is multiplied by, [k]; None: nothing.
        """
        total: tuple[Params, Params] | None = None
        for part in batch.split(max(1, self.max_examples // len(batch.x))):
            fixed = dict(constants or {}) | dict.fromkeys(self.mask_names, part.mask)
            run = self._vmapped if self.vectorize else self._looped
            grads = run(params, probes or {}, fixed, part, shared, weight)
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
        x: Tensor,
        y: Tensor,
        mask: Tensor,
        weight: Tensor | None,
    ) -> Tensor:
        buffers = {**probes, **fixed}
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
        batch: Batch,
        shared: bool,
        weight: Tensor | None,
    ) -> tuple[Params, Params]:
        records = (batch.x, batch.y, batch.mask)
        if self._recorded is None or probes or fixed or weight is None or batch.x.is_cuda:
            own_weight = None if weight is None else 0
            with CohortConvolutions():
                return self._mapped(shared, own_weight)(params, probes, fixed, *records, weight)
        names = tuple(params)
        if (shared, names) not in self._recorded:
            self._recorded[shared, names] = Recorded(self._flat(shared, names))
        grads = self._recorded[shared, names](*params.values(), *records, weight)
        return dict(zip(names, grads, strict=True)), {}

    def _mapped(self, shared: bool, weight: int | None) -> Callable[..., tuple[Params, Params]]:
        return vmap(
            grad(self._summed_loss, argnums=(0, 1)),
            in_dims=(None if shared else 0, 0, 0, 0, 0, 0, weight),
            randomness="different",
        )

    def _flat(self, shared: bool, names: tuple[str, ...]) -> Callable[..., list[Tensor]]:
        """The gradients of parameters of these names as a function of tensors alone."""
        mapped = self._mapped(shared, 0)

        def function(*inputs: Tensor) -> list[Tensor]:
            given = dict(zip(names, inputs, strict=False))
            with CohortConvolutions():
                grads, _ = mapped(given, {}, {}, *inputs[len(names) :])
            return [own(grads[name]) for name in names]

        return function

    def _looped(
        self,
        params: Params,
        probes: Params,
        fixed: Params,
        batch: Batch,
        shared: bool,
        weight: Tensor | None,
    ) -> tuple[Params, Params]:
        rows: list[tuple[Tensor, ...]] = []
        for i in range(len(batch.x)):
            own = {n: (v if shared else v[i]).detach().requires_grad_() for n, v in params.items()}
            seen = {n: v[i].detach().requires_grad_() for n, v in probes.items()}
            rest = {n: v[i] for n, v in fixed.items()}
            factor = None if weight is None else weight[i]
            records = (batch.x[i], batch.y[i], batch.mask[i])
            rows.append(self._gradient(own, seen, rest, records, factor))
        stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
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
            loss = self._summed_loss(own, seen, fixed, *records, factor)
            return torch.autograd.grad(
                loss, [*own.values(), *seen.values()], allow_unused=True, materialize_grads=True
            )

        with torch.enable_grad():
            if self.watch is not None:  # hands out the parameters by itself
                return work(self.network)
            return with_parameters(self.network, own | fixed, work)


# What a hook returns is the caller's to overwrite.
GradientHook = Callable[[int, Params, bool, Batch], Params]


def plain_gradient(cohort_gradient: CohortGradient) -> GradientHook:
    """Hook for training without per-record privacy: the mean gradient of the batch."""

    def hook(step: int, params: Params, shared: bool, batch: Batch) -> Params:
        # Dividing the loss costs nothing; dividing the gradients is a pass over memory.
        weight = batch.divisor.reciprocal()
        grads, _ = cohort_gradient(params, batch, shared=shared, weight=weight)
        return _each_its_own(grads)

    return hook


def train_cohort(
    global_params: Params,
    batches: Iterator[Batch],
    gradient: GradientHook,
    *,
    lr: float,
    momentum: float = 0.0,
) -> Params:
    """Local SGD of k clients from one global model.

    Args:
        global_params: parameters that every client starts from.
        batches: one batch a local step.
        gradient: hook (step, params, shared, batch) → descent direction, each [k, ...].
        lr: client learning rate.
        momentum: heavy-ball momentum, 0 for none.

    Returns:
        client updates: local minus global parameters, each [k, ...].

    Raises:
        RuntimeError: computing a gradient changed the parameters.
    """
    params, shared = global_params, True
    velocity: Params | None = None
    for step, batch in enumerate(batches):
        idle = None if bool(batch.active.all()) else ~batch.active
        versions = [p._version for p in params.values()]
        direction = gradient(step, params, shared, batch)
        if versions != [p._version for p in params.values()]:
            # The first step is in the memory of the global model.
            raise RuntimeError(
                "network: applying it changes its parameters in place, which nothing clips or "
                "noises; leave out what does (max_norm of embeddings, for instance)"
            )
        if momentum:
            if velocity is None:
                velocity = direction
            else:
                velocity = {
                    n: _unless(idle, v, momentum * v + direction[n]) for n, v in velocity.items()
                }
            direction = velocity
        params = {
            n: _unless(
                idle, params[n], _descend(params[n], g if velocity is None else g.clone(), lr)
            )
            for n, g in direction.items()
        }
        shared = False
    if shared:
        return {n: params[n] - global_params[n] for n in global_params}
    # Convolutions leave their weights in an order of their own.
    return {n: params[n].sub_(global_params[n]).contiguous() for n in global_params}


def _descend(params: Tensor, direction: Tensor, lr: float) -> Tensor:
    """Parameters after a step, in the memory of `direction` [k, ...].

    A cohort's tensors are larger than the cache: one that is written afresh costs more than the
    arithmetic.
    """
    return torch.sub(params, direction, alpha=lr, out=direction)


def own(value: Tensor) -> Tensor:
    """The tensor, or a copy where some of its elements share memory or have gaps between them."""
    apart = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride != apart:
            return value.contiguous()
        apart *= size
    return value


def _each_its_own(grads: Params) -> Params:
    """Gradients that can be overwritten one by one: autograd hands one tensor to both of a + b."""
    found: dict[int, Tensor] = {}
    result = {}
    for name, value in grads.items():
        value = own(value)
        result[name] = value.clone() if value.data_ptr() in found else value
        found[value.data_ptr()] = value
    return result


def _unless(idle: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    """`new` [k, ...], but `old` for clients that sit the step out."""
    return new if idle is None else torch.where(columns(idle, new), old, new)


def columns(row: Tensor, like: Tensor) -> Tensor:
    """View [k] so that it broadcasts against [k, ...]."""
    return row.view(-1, *[1] * (like.ndim - 1))


def flat_rows(value: Tensor) -> Tensor:
    """Each client's tensor as a row, [k, ...] → [k, d]: a number for a 0-d parameter."""
    return value.flatten(1) if value.ndim > 1 else value[:, None]


def per_row(value: Tensor, factor: Tensor) -> Tensor:
    """Each client's tensor times its own number: [k, ...] × [k]."""
    return value * columns(factor, value)


def bytes_per_example(network: nn.Module, example: Tensor) -> int:
    """Rough memory of one record's forward and backward pass: activations and unfolded patches."""
    total = [example.numel()]

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        if isinstance(output, Tensor):
            total[0] += output.numel()
        if isinstance(module, nn.Conv2d) and isinstance(output, Tensor):
            patch = module.in_channels // module.groups * int(np.prod(module.kernel_size))
            total[0] += patch * output[0, 0].numel() + module.weight.numel()

    leaves = [m for m in network.modules() if not list(m.children())]
    handles = [m.register_forward_hook(count) for m in leaves]
    try:
        with torch.no_grad():
            network(example[None])
    finally:
        for handle in handles:
            handle.remove()
    return 4 * 3 * total[0]


def faster_execution(run: Callable[[bool], object], *, repeats: int = 3) -> tuple[bool, str]:
    """Whether vmap beats the loop, by timing `run(vectorize)`, and a line that says why.

    A network that cannot be vmapped is trained by the loop; the reason is in the line.
    """

    def best(vectorize: bool) -> float:
        run(vectorize)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run(vectorize)
            times.append(time.perf_counter() - start)
        return min(times)

    try:
        vmapped = best(True)
    except Exception as error:  # whatever functorch cannot do shows only by trying
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        return False, f"clients train one after another: the network cannot be vmapped ({reason})"
    looped = best(False)
    winner = "together (vmap)" if vmapped <= looped else "one after another (loop)"
    return vmapped <= looped, (
        f"clients train {winner}: a step took {1e3 * vmapped:.1f} ms under vmap and "
        f"{1e3 * looped:.1f} ms in a loop"
    )
