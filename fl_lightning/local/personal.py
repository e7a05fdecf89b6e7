"""Personal layers: each client fits them to its own records in every round and never sends them.

The other layers are trained around them (Arivazhagan et al., 2019). A client keeps nothing from
round to round: it fits its layers anew from one public start (Singhal et al., 2021), so a client
that was never asked before is served as well, and a run that was stopped goes on exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fl_lightning.local.batches import Batch
from fl_lightning.local.gradient import CohortGradient, Loss
from fl_lightning.local.rows import columns, flat_rows
from fl_lightning.networks.outputs import record_loss
from fl_lightning.values.round import Params


def take_out_personal(network: nn.Module, layers: Sequence[str]) -> tuple[str, ...]:
    """Leave the parameters of personal layers out of what is released and averaged.

    Args:
        network: their `requires_grad` is set to False.
        layers: names of modules or of parameters.

    Returns:
        The names of their trainable parameters.

    Raises:
        ValueError: a name that the network has not, a layer that nothing trains, one that shares a
            parameter with a layer that is not personal, or nothing left for all clients together.
    """
    every = {n: p for n, p in network.named_parameters(remove_duplicate=False) if p.requires_grad}
    found: dict[str, nn.Parameter] = {}
    given = f"personal_layers={list(layers)}"
    for layer in layers:
        inside = {n: p for n, p in every.items() if n == layer or n.startswith(f"{layer}.")}
        if not inside:
            trained = ", ".join(dict.fromkeys(n.rpartition(".")[0] or n for n in every))
            raise ValueError(
                f"{given}: the network trains nothing named {layer!r}; it trains {trained}"
            )
        found |= inside
    mine = {id(p) for p in found.values()}
    left = {n: p for n, p in every.items() if n not in found}
    for name, p in left.items():
        if id(p) in mine:
            raise ValueError(
                f"{given}: they share the parameter {name!r} with a layer that is not personal; "
                "name both, or neither"
            )
    if found and not left:
        raise ValueError(f"{given}: nothing is left that clients train together")
    for p in found.values():
        p.requires_grad_(False)
    return tuple(n for n, _ in network.named_parameters() if n in found)


def fit_personal(
    gradient: CohortGradient,
    start: Params,
    body: Params,
    batch: Batch,
    *,
    steps: int,
    lr: float,
    stacked: bool = False,
) -> Params:
    """Gradient descent on all records of each of k clients, the other layers held fixed. Private.

    The network is in eval mode meanwhile: a fit draws no random numbers.

    Args:
        gradient: of the network.
        start: personal parameters that every client begins with. Public.
        body: all other trained parameters; of each client [k, ...] if `stacked`.
        batch: every record of every client.
        steps: of full gradient descent, at least 1.
        lr: its learning rate.
        stacked: whether each client has a body of its own.

    Returns:
        The personal parameters of each client, [k, ...]. A client whose fit is not finite gets the
        start.
    """
    weight = batch.divisor.reciprocal()
    own, shared = {"constants": body} if stacked else {"common": body}, True
    params = start
    with _calm(gradient.network):
        for _ in range(steps):
            grads, _ = gradient(params, batch, shared=shared, weight=weight, **own)
            params = {n: params[n] - lr * g for n, g in grads.items()}
            shared = False
    finite = torch.stack([flat_rows(v).isfinite().all(1) for v in params.values()]).all(0)
    return {n: torch.where(columns(finite, v), v, start[n]) for n, v in params.items()}


@contextmanager
def _calm(network: nn.Module) -> Iterator[None]:
    """All layers in eval mode; afterwards in those that they had."""
    modes = [(layer, layer.training) for layer in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


def start_of(network: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The public values that personal layers begin with: those that the network holds."""
    parameters = dict(network.named_parameters())
    return {name: parameters[name].detach() for name in names}


def fit_personal_layers(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    layers: Sequence[str],
    *,
    steps: int = 20,
    lr: float = 1.0,
    loss: Loss | None = None,
) -> None:
    """Fit layers of a network to one's own records in place, as a client of a run does.

    Args:
        network: with the global model and the public start of its personal layers.
        x: records [n, ...], on the network's device.
        y: labels [n], or what the loss takes.
        layers: names of modules or of parameters.
        steps: of full gradient descent.
        lr: its learning rate.
        loss: of each record, (outputs, y) → [n]; None: cross entropy.

    Raises:
        ValueError: no records, or as `take_out_personal`.
    """
    if not len(x) or len(x) != len(y):
        raise ValueError(f"x has {len(x)} records and y {len(y)}: give as many, and at least one")
    names = take_out_personal(network, layers)
    each = torch.ones(1, len(x), device=x.device)
    batch = Batch(x[None], y[None], each, each.sum(1), each[:, 0] > 0)
    asked = record_loss(loss or nn.CrossEntropyLoss(reduction="none"))
    gradient = CohortGradient(network, asked, vectorize=False)
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        start = start_of(network, names)
        fitted = fit_personal(gradient, start, {}, batch, steps=steps, lr=lr)
        for name in names:
            parameters[name].copy_(fitted[name][0])
            parameters[name].requires_grad_(True)
