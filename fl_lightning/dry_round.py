"""A round that is thrown away, before the run has a folder, a ledger or a budget to lose.

What the rounds will do is done once on a few records, by the very functions of the run: forward,
loss, metric, gradient, clipping, noise from a key of its own, the server's step and all steps of
its schedule, checkpoint. What fails says so before anything is charged.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from aadp_kernels import NoiseKey
from fl_lightning import pooled
from fl_lightning.aggregate import WeightedMean
from fl_lightning.client import Batch, bytes_per_example, input_dtype
from fl_lightning.data import Arrays, FederatedDataModule
from fl_lightning.data.differences import different_records
from fl_lightning.forward_check import check_forward, check_repeatable, draws_numbers, first_line
from fl_lightning.network_state import left_as_it_was, moved_parameters
from fl_lightning.population import ClientPopulation, LocalTraining
from fl_lightning.privacy.budget import Budget
from fl_lightning.privacy.config import per_client
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.privacy.weights import pooled_weights
from fl_lightning.record_independence import (
    SummedGradients,
    added_up,
    autograd_gradients,
    foreign_gradient,
    interacting_records,
    mixed_records,
)
from fl_lightning.server_step import try_server
from fl_lightning.types import LayerPolicy, Params, PrivateUpdate

if TYPE_CHECKING:
    from fl_lightning.module import FederatedModule

_LOG = logging.getLogger("pytorch_lightning")
# Longer than any gradient that is compared: nothing is clipped.
_NO_CLIP = 1e12


@dataclass(frozen=True)
class Few:
    """The records of a dry round: of two clients, and as the network takes them [B, ...]."""

    data: FederatedDataModule
    x: Tensor
    y: Tensor


def dry_round(module: FederatedModule, data: FederatedDataModule, trainer: pl.Trainer) -> bool:
    """Do once what the rounds will do, and leave everything as it was.

    Args:
        module: of the run, on its device.
        data: of the run.
        trainer: of the run; the number of rounds is taken from it.

    Returns:
        Whether clients can be trained together under vmap; the reason is logged if they cannot
        and were to be.

    Raises:
        ValueError: what fails, with the option's name and value.
    """
    network, loss = module.network, module.loss
    few = few_records(module, data)
    with left_as_it_was(module), trainer.precision_plugin.forward_context(), _in_silence():
        check_forward(
            network,
            loss,
            few.x,
            few.y,
            num_classes=data.num_classes,
            smallest_label=int(data.y.min()),
            inference_mode=trainer.test_loop.inference_mode,
            source=data.dataset_name,
        )
        values = moved_parameters(network)
        if module.privacy.private:
            check_repeatable(network, loss, values, few.x, few.y)
        reason, gradients = _by_vmap_or_loop(module, few, values)
        server = try_server(
            module.server_optimizer,
            module.server_scheduler,
            gradients,
            module.planned_rounds or trainer.max_epochs or 0,
        )
        _try_checkpoint(module, server)
    if reason:
        _LOG.info(f"clients train one after another: the network cannot be vmapped ({reason})")
    return module.execution != "loop" and not reason


def few_records(module: FederatedModule, data: FederatedDataModule) -> Few:
    """Records that differ as much as possible, dealt to two clients."""
    rows = torch.tensor(different_records(data.x, data.y))
    x, y = data.x[rows], data.y[rows]
    if x.is_floating_point():
        x = x.nan_to_num(0.0, 0.0, 0.0)
    arrays = Arrays(x, y, x[:0], y[:0], data.num_classes, data.dataset_name)
    clients = min(2, len(x))
    two = FederatedDataModule(arrays, num_clients=clients, val_fraction=0.0, min_client_size=1)
    device = next(module.network.parameters()).device
    return Few(two, x.to(device, input_dtype(module.network, x)), y.to(device))


@contextmanager
def _in_silence() -> Iterator[None]:
    """Without the notes that the run itself will log."""
    level = _LOG.level
    _LOG.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        _LOG.setLevel(level)


def _by_vmap_or_loop(
    module: FederatedModule, few: Few, values: Params
) -> tuple[str, dict[nn.Parameter, Tensor]]:
    """Why vmap cannot be used, "" if it can, and the gradients for the server's optimizer."""
    reason = ""
    if module.execution != "loop":
        try:
            gradients = _try_clients(module, few, values, vectorize=True)
        except _CannotTrain as error:
            reason = str(error)
        else:
            if module.execution == "auto":
                _try_clients(module, few, values, vectorize=False)
            return "", gradients
    return reason, _try_clients(module, few, values, vectorize=False)


class _CannotTrain(ValueError):
    """The network cannot be trained so."""


@contextmanager
def _named(network: nn.Module, what: str) -> Iterator[None]:
    try:
        yield
    except _CannotTrain:
        raise
    except Exception as error:
        raise _CannotTrain(
            f"network={type(network).__name__}: {what} fails: {first_line(error)}"
        ) from error


def _try_clients(
    module: FederatedModule, few: Few, values: Params, *, vectorize: bool
) -> dict[nn.Parameter, Tensor]:
    """Check the gradients of clients, make a release of them, and the mean of that."""
    network = module.network
    try:
        population = few_clients(module, few.data, vectorize)
    except ValueError:  # options that do not go together
        raise
    except Exception as error:
        raise _CannotTrain(f"network={type(network).__name__}: {first_line(error)}") from error
    _check_gradients(module, few, values, population)
    with _named(network, "a round of two clients"):
        params = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}
        update = _throw_away_release(population, params)
        mean = WeightedMean(module.layout)
        mean.add(update.update, torch.ones(len(update.clients), module.layout.num_layers).double())
        mean.write_gradient(network)
    gradients = {}
    for p in network.parameters():
        if p.requires_grad:
            assert p.grad is not None
            gradients[p] = p.grad
    return gradients


def few_clients(
    module: FederatedModule, data: FederatedDataModule, vectorize: bool
) -> ClientPopulation:
    """The clients of a dry round: the run's rules, with histories and a budget of their own."""
    given = module.privacy.noise_multiplier
    privacy = replace(
        module.privacy,
        epsilon=None,
        noise_multiplier=1.0 if given is None else given,
        min_survivors=None,
    )
    sizes, dims = data.client_sizes, module.layout.dims
    rate, size = module.sampling_rate, module.batch_size
    several = module.local_steps != 1
    budget = Budget(privacy, [1] * len(sizes), 1.0, dims, pooled.shares_needed(privacy, len(sizes)))
    given = privacy.noise_multiplier
    assert given is not None
    budget.multiplier = torch.tensor(per_client(given, len(sizes)), dtype=torch.float64)
    training = LocalTraining(
        lr=module.client_lr,
        momentum=module.client_momentum,
        sampling_rate=None if rate is None else 1.0,
        batch_size=size,
        local_steps=2 if several else 1,
        local_epochs=1,
        seed=0,
    )
    pool = pooled.make_pool(
        privacy, sizes, clients_per_round=None, weighting=module.weighting, clients_at_once=2
    )
    return ClientPopulation(
        data,
        module.network,
        module.loss,
        module.layout,
        privacy=privacy,
        training=training,
        history=ReleasedHistory(privacy, 1 if privacy.pooled else len(sizes), dims),
        budget=budget,
        key=NoiseKey.random(privacy.rng),
        ledger=None,
        vectorize=vectorize,
        max_examples=2**40,
        pool=pool,
    )


def _throw_away_release(population: ClientPopulation, params: Params) -> PrivateUpdate:
    """What two clients would release, by a key that nobody keeps."""
    privacy, clients = population.privacy, torch.arange(len(population.data.client_sizes))
    if not privacy.private:
        return population.without_privacy(clients, params, 0)
    if not privacy.pooled:
        return population.private_update(clients, params, population.key, 0)
    assert population.pool is not None
    z, weights = pooled_weights(
        population.pool.weights,
        population.budget.multiplier,
        mechanism=privacy.mechanism,
        vote_share=privacy.votes,
    )
    return pooled.noised_mean(population, clients, weights, z, params, population.key, 0)


def _check_gradients(
    module: FederatedModule, few: Few, values: Params, population: ClientPopulation
) -> None:
    """Compare the gradients of the run with the network's, and a record's alone with others'.

    Raises:
        _CannotTrain: they differ.
    """
    network, loss, record = module.network, module.loss, module.privacy.unit == "record"
    calm, drawing = population, draws_numbers(network, loss, values, few.x, few.y)
    modes = [(layer, layer.training) for layer in network.modules()]
    if drawing:
        _hold_still(network, lambda: draws_numbers(network, loss, values, few.x, few.y))
        calm = few_clients(module, few.data, population.vectorize)
    with _named(network, "its gradient"):
        x, y, want = _finite(network, loss, values, few, record)
        summed = unclipped(calm)
        problem = ""
        if record and len(x) > 1:
            problem = mixed_records(summed, values, x, y, at_once=_clients_at_once(module, few))
        if len(x) and not problem:
            problem = foreign_gradient(summed, values, want, x, y)
    for layer, mode in modes:
        layer.training = mode
    if drawing and record and len(few.x) > 2 and not problem:
        with _named(network, "its gradient"):
            problem = interacting_records(unclipped(population), values, few.x, few.y, _seed)
    if problem:
        raise _CannotTrain(f"network={type(network).__name__}: {problem}")


def _seed() -> None:
    torch.manual_seed(0)


def _hold_still(network: nn.Module, draws: Callable[[], bool]) -> None:
    """Switch off what draws random numbers: dropout layers alone if that is all."""
    for layer in network.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.eval()
    if draws():
        network.eval()


def _finite(
    network: nn.Module, loss: Any, values: Params, few: Few, record: bool
) -> tuple[Tensor, Tensor, Params]:
    """Records whose gradients are finite, and the sum of these by autograd."""
    singles = [
        autograd_gradients(network, loss, values, few.x[i : i + 1], few.y[i : i + 1])
        for i in range(len(few.x))
    ]
    keep = [
        i
        for i, grads in enumerate(singles)
        if all(bool((g.abs() < _NO_CLIP / 1e3).all()) for g in grads.values())
    ]
    x, y = few.x[keep], few.y[keep]
    if record or not keep:
        zeros = {n: torch.zeros_like(v) for n, v in values.items()}
        return x, y, added_up([zeros, *(singles[i] for i in keep)])
    return x, y, autograd_gradients(network, loss, values, x, y)


def unclipped(population: ClientPopulation) -> SummedGradients:
    """The gradients of the run, by clip norms that clip nothing."""
    layers = population.layout.num_layers

    def summed(params: Params, x: Tensor, y: Tensor, mask: Tensor) -> Params:
        k = len(x)
        everyone = torch.ones(k, device=x.device)
        batch = Batch(x, y, mask, everyone, everyone.bool())
        with torch.no_grad():
            if population.privacy.unit != "record":
                return population.plain(params, batch, shared=True)[0]
            row = torch.ones(k, layers, dtype=torch.float64)
            policy = LayerPolicy(row * _NO_CLIP, row / layers, row / layers, row * 0.0)
            return population.clipped_sums(params, True, batch, policy)[0]

    return summed


def _clients_at_once(module: FederatedModule, few: Few) -> int:
    memory = module.memory_budget * 2**30
    return max(1, int(memory / bytes_per_example(module.network, few.x[0]) / len(few.x)))


def _try_checkpoint(module: FederatedModule, server: dict[str, Any]) -> None:
    try:
        nowhere: Any = _Nowhere()
        torch.save({"state_dict": module.state_dict(), **server}, nowhere)
    except Exception as error:
        raise ValueError(
            f"network={type(module.network).__name__}: a checkpoint of it, of the server_optimizer "
            f"or of the server_scheduler cannot be written: {first_line(error)}"
        ) from error


class _Nowhere(io.RawIOBase):
    """A file that keeps nothing."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return memoryview(data).nbytes
