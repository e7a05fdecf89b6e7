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
from typing import Any

import torch
from torch import Tensor, nn

from aadp_kernels import NoiseKey
from fl_lightning.accounting.budget import Budget
from fl_lightning.data import Arrays, FederatedDataModule
from fl_lightning.data.differences import different_records
from fl_lightning.local.batches import Batch
from fl_lightning.local.execution import bytes_per_example
from fl_lightning.networks.inputs import input_dtype
from fl_lightning.networks.state import left_as_it_was, moved_parameters
from fl_lightning.preflight.forward_check import (
    check_forward,
    check_repeatable,
    draws_numbers,
    first_line,
)
from fl_lightning.preflight.proposed_run import ProposedRun
from fl_lightning.preflight.record_independence import (
    SummedGradients,
    added_up,
    autograd_gradients,
    foreign_gradient,
    interacting_records,
    mixed_records,
    parameters_at_rest,
)
from fl_lightning.privacy.clipping import changes_its_way
from fl_lightning.privacy.config import per_client
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.processes.together import Processes
from fl_lightning.release.claim import Books
from fl_lightning.release.clients import Clients
from fl_lightning.release.one_by_one import OneByOne
from fl_lightning.release.summed import Summed, noise_parts_needed
from fl_lightning.rules import Rules
from fl_lightning.server.aggregate import WeightedMean
from fl_lightning.server.faults import Faults
from fl_lightning.server.optimizer import try_server
from fl_lightning.values.round import LayerPolicy, Params

_LOG = logging.getLogger("pytorch_lightning")
# Longer than any gradient that is compared: nothing is clipped.
_NO_CLIP = 1e12


@dataclass(frozen=True)
class Few:
    """The records of a dry round: of two clients, and as the network takes them [B, ...]."""

    data: FederatedDataModule
    x: Tensor
    y: Tensor


def dry_round(proposed: ProposedRun) -> bool:
    """Do once what the rounds will do, and leave everything as it was.

    Args:
        proposed: the run, with its network on its device.

    Returns:
        Whether clients can be trained together under vmap; the reason is logged if they cannot
        and were to be.

    Raises:
        ValueError: what fails, with the option's name and value.
    """
    network, loss, data = proposed.network, proposed.loss, proposed.data
    rules, trainer = proposed.rules, proposed.trainer
    few = few_records(proposed)
    with left_as_it_was(proposed.module), trainer.precision_plugin.forward_context(), _in_silence():
        check_forward(
            network,
            loss,
            few.x,
            few.y,
            num_classes=data.num_classes,
            smallest_label=int(data.y.min()) if data.num_classes else 0,
            inference_mode=trainer.test_loop.inference_mode,
            source=data.dataset_name,
            metrics=proposed.metrics,
        )
        values = moved_parameters(network)
        if rules.privacy.private:
            check_repeatable(network, loss, values, few.x, few.y)
        reason, gradients = _by_vmap_or_loop(proposed, few, values)
        server = try_server(
            proposed.server_optimizer, proposed.server_scheduler, gradients, proposed.rounds
        )
        _try_checkpoint(proposed, server)
        resting = parameters_at_rest(network, loss, few.x, few.y)
    if resting and rules.privacy.private:
        _LOG.info(
            f"no record moves {_some(resting)} at the start: until others have moved, a share of "
            "the budget for them buys noise alone (of two factors that start at 0 and at random, "
            "leave the random one out)"
        )
    if reason:
        _LOG.info(f"clients train one after another: the network cannot be vmapped ({reason})")
    return rules.execution != "loop" and not reason


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more parameters"


def few_records(proposed: ProposedRun) -> Few:
    """Records that differ as much as possible, dealt to two clients."""
    data, network = proposed.data, proposed.network
    rows = torch.tensor(different_records(data.x, data.y))
    x, y = data.x[rows], data.y[rows]
    if x.is_floating_point():
        x = x.nan_to_num(0.0, 0.0, 0.0)
    empty = (x[:0], y[:0])
    arrays = Arrays(x, y, *empty, data.num_classes, data.dataset_name, fields=data.fields)
    clients = min(2, len(x))
    two = FederatedDataModule(arrays, num_clients=clients, val_fraction=0.0, min_client_size=1)
    device = next(network.parameters()).device
    return Few(two, x.to(device, input_dtype(network, x)), y.to(device))


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
    proposed: ProposedRun, few: Few, values: Params
) -> tuple[str, dict[nn.Parameter, Tensor]]:
    """Why vmap cannot be used, "" if it can, and the gradients for the server's optimizer."""
    reason, execution = "", proposed.rules.execution
    if execution != "loop":
        try:
            gradients = _try_clients(proposed, few, values, vectorize=True)
        except _CannotTrain as error:
            reason = str(error)
        else:
            if execution == "auto":
                _try_clients(proposed, few, values, vectorize=False)
            return "", gradients
    return reason, _try_clients(proposed, few, values, vectorize=False)


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
    proposed: ProposedRun, few: Few, values: Params, *, vectorize: bool
) -> dict[nn.Parameter, Tensor]:
    """Check the gradients of clients, make a release of them, and the mean of that."""
    network, layout = proposed.network, proposed.layout
    try:
        releases = few_clients(proposed, few.data, vectorize)
    except ValueError:  # options that do not go together
        raise
    except Exception as error:
        raise _CannotTrain(f"network={type(network).__name__}: {first_line(error)}") from error
    clients = releases.clients
    if proposed.rules.privacy.comparator.clip_function != "clip":  # scales short gradients too
        clients = few_clients(_clipping(proposed), few.data, vectorize).clients
    _check_gradients(proposed, few, values, clients)
    with _named(network, "a round of two clients"):
        params = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}
        everyone = torch.arange(few.data.num_clients)
        update = releases.draw(everyone, params, releases.key, 0)
        mean = WeightedMean(layout)
        mean.add(update.update, torch.ones(len(update.clients), layout.num_layers).double())
        mean.write_gradient(network)
    gradients = {}
    for p in network.parameters():
        if p.requires_grad:
            assert p.grad is not None
            gradients[p] = p.grad
    return gradients


def _clipping(proposed: ProposedRun) -> ProposedRun:
    """The run with a clip function that leaves short gradients as they are."""
    privacy = proposed.rules.privacy
    comparator = replace(privacy.comparator, clip_function="clip")
    rules = replace(proposed.rules, privacy=replace(privacy, comparator=comparator))
    return replace(proposed, rules=rules)


def few_clients(
    proposed: ProposedRun, data: FederatedDataModule, vectorize: bool
) -> OneByOne | Summed:
    """The clients of a dry round: the run's rules, with histories and a budget of their own."""
    rules = _rules_of_two(proposed.rules)
    privacy, layout, everyone = rules.privacy, proposed.layout, data.num_clients
    clients = Clients(
        data,
        proposed.network,
        proposed.loss,
        layout,
        privacy=privacy,
        training=rules.training,
        vectorize=vectorize,
        max_examples=2**40,
    )
    key = NoiseKey.random(privacy.rng)
    if not privacy.private:
        return OneByOne(clients, rules, key, None, Processes())
    budget = Budget(privacy, [1] * everyone, 1.0, layout.dims, noise_parts_needed(rules, everyone))
    assert privacy.noise_multiplier is not None
    multipliers = per_client(privacy.noise_multiplier, everyone)
    budget.multiplier = torch.tensor(multipliers, dtype=torch.float64)
    history = ReleasedHistory(privacy, 1 if privacy.summed else everyone, layout.dims)
    nowhere: Any = None  # nothing is claimed
    books = Books(history, budget, nowhere, Processes())
    if privacy.summed:
        return Summed(clients, rules, key, books)
    return OneByOne(clients, rules, key, books, books.processes)


def _rules_of_two(rules: Rules) -> Rules:
    """The rules of a run as two clients can keep them, with all their records in every step."""
    given = rules.privacy.noise_multiplier
    privacy = replace(
        rules.privacy,
        epsilon=None,
        noise_multiplier=1.0 if given is None else given,
        min_survivors=None,
        evaluate_every=0,
    )
    return replace(
        rules,
        privacy=privacy,
        clients_per_round=None,
        sampling_rate=None if rules.sampling_rate is None else 1.0,
        local_steps=1 if rules.local_steps == 1 else 2,
        local_epochs=1,
        planned_rounds=None,
        faults=Faults(),
        seed=0,
    )


def _check_gradients(proposed: ProposedRun, few: Few, values: Params, clients: Clients) -> None:
    """Compare the gradients of the run with the network's, and a record's alone with others'.

    Raises:
        _CannotTrain: they differ.
    """
    network, loss = proposed.network, proposed.loss
    record = proposed.rules.privacy.unit == "record"
    calm, drawing = clients, draws_numbers(network, loss, values, few.x, few.y)
    modes = [(layer, layer.training) for layer in network.modules()]
    if drawing:
        _hold_still(network, lambda: draws_numbers(network, loss, values, few.x, few.y))
        calm = few_clients(_clipping(proposed), few.data, clients.vectorize).clients
    with _named(network, "its gradient"):
        x, y, want = _finite(network, loss, values, few, record)
        summed = unclipped(calm)
        problem = ""
        if record and len(x) > 1:
            at_once = _clients_at_once(proposed, few)
            problem = mixed_records(summed, values, x, y, at_once=at_once)
            # Record by record nothing mixes: batches that go in one pass are tried as well.
            smaller = range(2, len(x)) if changes_its_way(calm.clipped_sums) else ()
            for size in smaller:
                problem = problem or mixed_records(
                    summed, values, x[:size], y[:size], at_once=at_once
                )
        if len(x) and not problem:
            problem = foreign_gradient(summed, values, want, x, y)
    for layer, mode in modes:
        layer.training = mode
    if drawing and record and len(few.x) > 2 and not problem:
        with _named(network, "its gradient"):
            problem = interacting_records(unclipped(clients), values, few.x, few.y, _seed)
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


def unclipped(clients: Clients) -> SummedGradients:
    """The gradients of the run, by clip norms that clip nothing."""
    layers = clients.layout.num_layers

    def summed(params: Params, x: Tensor, y: Tensor, mask: Tensor) -> Params:
        k = len(x)
        everyone = torch.ones(k, device=x.device)
        batch = Batch(x, y, mask, everyone, everyone.bool())
        with torch.no_grad():
            if clients.privacy.unit != "record":
                return clients.plain(params, batch, shared=True)[0]
            row = torch.ones(k, layers, dtype=torch.float64)
            policy = LayerPolicy(row * _NO_CLIP, row / layers, row / layers, row * 0.0)
            return clients.clipped_sums(params, True, batch, policy)[0]

    return summed


def _clients_at_once(proposed: ProposedRun, few: Few) -> int:
    memory = proposed.rules.memory_budget * 2**30
    return max(1, int(memory / bytes_per_example(proposed.network, few.x[0]) / len(few.x)))


def _try_checkpoint(proposed: ProposedRun, server: dict[str, Any]) -> None:
    try:
        nowhere: Any = _Nowhere()
        torch.save({"state_dict": proposed.module.state_dict(), **server}, nowhere)
    except Exception as error:
        raise ValueError(
            f"network={type(proposed.network).__name__}: a checkpoint of it, of the "
            f"server_optimizer or of the server_scheduler cannot be written: {first_line(error)}"
        ) from error


class _Nowhere(io.RawIOBase):
    """A file that keeps nothing."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return memoryview(data).nbytes
