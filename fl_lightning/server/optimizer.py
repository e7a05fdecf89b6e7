"""The server's optimizer and its schedule: made, refused, and tried out on a copy of the model."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from aadp_kernels import factorization

Make = Callable[[Any], Any]


def make_optimizer(make: Make, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The server's optimizer.

    Raises:
        ValueError: it cannot be made, or would need the loss again.
    """
    try:
        optimizer = make(list(parameters))
    except Exception as error:
        raise ValueError(f"server_optimizer={name_of(make)}: {error}") from error
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"server_optimizer={optimizer!r} is no torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("server_optimizer=LBFGS evaluates the loss again: use SGD or Adam")
    return optimizer


def make_schedule(make: Make | None, optimizer: Optimizer) -> LRScheduler | None:
    """The schedule of the server's learning rate, if there is one.

    Raises:
        ValueError: it cannot be made, follows private figures, or would never be stepped.
    """
    if make is None:
        return None
    try:
        schedule = make(optimizer)
    except Exception as error:
        raise ValueError(f"server_scheduler={name_of(make)}: {error}") from error
    if isinstance(schedule, ReduceLROnPlateau):
        raise ValueError(
            "server_scheduler=ReduceLROnPlateau would follow the private validation loss: use "
            "a schedule that is fixed beforehand"
        )
    if not isinstance(schedule, LRScheduler):
        raise ValueError(
            f"server_scheduler={type(schedule).__name__} is no torch.optim.lr_scheduler.LRScheduler"
        )
    return schedule


def name_of(make: Callable[..., Any]) -> str:
    """Name of the class that a function or partial makes, or of the function."""
    if isinstance(make, functools.partial):
        known = [part for part in make.args if isinstance(part, type)]
        return known[0].__name__ if known else name_of(make.func)
    return getattr(make, "__name__", type(make).__name__)


def try_server(
    make: Make,
    make_scheduler: Make | None,
    gradients: dict[nn.Parameter, Tensor],
    rounds: int,
) -> dict[str, Any]:
    """One step of the optimizer and `rounds` of the schedule, on copies.

    Args:
        make, make_scheduler: of the run.
        gradients: of each trained parameter.
        rounds: that are planned.

    Returns:
        State of both, as a checkpoint would hold it.

    Raises:
        ValueError: a step fails or leaves the finite numbers; naming the option.
    """
    copies = [nn.Parameter(p.detach().clone()) for p in gradients]
    for copy, gradient in zip(copies, gradients.values(), strict=True):
        copy.grad = gradient.clone()
    optimizer = make_optimizer(make, copies)
    schedule = make_schedule(make_scheduler, optimizer)
    name = type(optimizer).__name__
    try:
        optimizer.step()
        optimizer.zero_grad()
    except Exception as error:
        raise ValueError(f"server_optimizer={name} cannot take a step: {error}") from error
    finite = all(bool(g.isfinite().all()) for g in gradients.values())
    if finite and not all(bool(copy.isfinite().all()) for copy in copies):
        raise ValueError(
            f"server_optimizer={name}: its first step makes parameters that are not finite"
        )
    if schedule is not None:
        _step_schedule(schedule, rounds)
    schedules = [] if schedule is None else [schedule.state_dict()]
    return {"optimizer": optimizer.state_dict(), "schedules": schedules}


def weights_in_last_model(
    make: Make, make_scheduler: Make | None, rounds: int
) -> npt.NDArray[np.float64]:
    """What each release is multiplied by in the model after `rounds` rounds, float64 [1, rounds].

    Exact for SGD, whose steps add up (weight decay left out). Other optimizers are taken for SGD of
    the same learning rates and momentum (`betas[0]` of Adam): what is chosen by this may be less
    good for them, and is as private.

    Args:
        make, make_scheduler: of the run.
        rounds: that are planned, >= 1.
    """
    optimizer = make_optimizer(make, [nn.Parameter(torch.zeros(1))])
    schedule = make_schedule(make_scheduler, optimizer)
    group, rates = optimizer.param_groups[0], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is trained here
        for _ in range(rounds):
            rates.append(float(group["lr"]))
            if schedule is not None:
                schedule.step()  # pyright: ignore[reportCallIssue]
    momentum = group.get("momentum", group.get("betas", [0.0])[0])
    return factorization.last_of_sgd(
        rates, momentum=float(momentum), nesterov=bool(group.get("nesterov", False))
    )


def _step_schedule(schedule: LRScheduler, rounds: int) -> None:
    name = type(schedule).__name__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself shows them
        for done in range(rounds):
            try:
                schedule.step()  # pyright: ignore[reportCallIssue]
            except Exception as error:
                raise ValueError(
                    f"server_scheduler={name} fails after round {done + 1} of {rounds} that are "
                    f"planned: {error}"
                ) from error
            for rate in schedule.get_last_lr():
                if not math.isfinite(rate):
                    raise ValueError(
                        f"server_scheduler={name} gives the learning rate {float(rate)} after "
                        f"round {done + 1} of {rounds} that are planned"
                    )
