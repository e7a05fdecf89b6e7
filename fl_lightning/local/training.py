"""Local SGD of a group of clients. It knows nothing of privacy beyond its gradient hook."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fl_lightning.local.batches import Batch
from fl_lightning.local.gradient import GradientHook
from fl_lightning.local.rows import columns
from fl_lightning.values.round import Params


def train_cohort(
    global_params: Params,
    batches: Iterator[Batch],
    gradient: GradientHook,
    *,
    lr: float,
    momentum: float = 0.0,
    proximal: float = 0.0,
    stacked: bool = False,
) -> Params:
    """Local SGD of k clients from one global model.

    Args:
        global_params: parameters that every client starts from.
        batches: one batch a local step.
        gradient: hook (step, params, shared, batch) → descent direction, each [k, ...].
        lr: client learning rate.
        momentum: heavy-ball momentum, 0 for none.
        proximal: μ of FedProx (Li et al., 2020): each step is drawn back to the global model, as if
            μ/2·‖w − w₀‖² were part of the loss. Beside a noised gradient it needs no noise of its
            own: w is public there.
        stacked: whether each client starts from a model of its own, [k, ...].

    Returns:
        client updates: local minus global parameters, each [k, ...].

    Raises:
        RuntimeError: computing a gradient changed the parameters.
    """
    params, shared = global_params, not stacked
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
        if proximal and step:
            # In the first step there is nothing to draw back from.
            direction = {
                n: g + proximal * (params[n] - global_params[n]) for n, g in direction.items()
            }
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
    if params is global_params:
        return {n: params[n] - global_params[n] for n in global_params}
    # Convolutions leave their weights in an order of their own.
    return {n: params[n].sub_(global_params[n]).contiguous() for n in global_params}


def _descend(params: Tensor, direction: Tensor, lr: float) -> Tensor:
    """Parameters after a step, in the memory of `direction` [k, ...].

    A cohort's tensors are larger than the cache: one that is written afresh costs more than the
    arithmetic.
    """
    return torch.sub(params, direction, alpha=lr, out=direction)


def _unless(idle: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    """`new` [k, ...], but `old` for clients that sit the step out."""
    return new if idle is None else torch.where(columns(idle, new), old, new)
