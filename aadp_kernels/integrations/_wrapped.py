"""What a private optimizer asks of the optimizer and of the model that it is given."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def check_kind(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse what cannot be made private step by step."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "optimizer must not be LBFGS: it evaluates its closure many times in a step, each time "
            "on private records without noise"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError("optimizer must not be differentiable: a step is not differentiated")
    distributed = torch.distributed.is_available() and isinstance(
        model, nn.parallel.DistributedDataParallel
    )
    if distributed or isinstance(model, nn.DataParallel):
        raise ValueError("model must not be distributed: pass the module, and `reduce` for sums")


def trained_parameters(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> dict[str, nn.Parameter]:
    """The optimizer's parameters that are trained, by their names in the model, in its order."""
    wanted = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    found = {name: p for name, p in model.named_parameters() if id(p) in wanted}
    if len(found) != len(wanted):
        raise ValueError(
            f"the optimizer has {len(wanted) - len(found)} parameters that the model has not; "
            "make the optimizer from the result of with_clipping"
        )
    trained = {name: p for name, p in found.items() if p.requires_grad}
    if not trained:
        raise ValueError("the optimizer has no parameter that is trained: all are frozen")
    check_precision(trained)
    return trained


def check_precision(trained: Mapping[str, torch.Tensor]) -> None:
    """Refuse sums in half precision: their rounding grows with the batch, and no clip bounds it."""
    for name, parameter in trained.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"parameter {name!r} is {str(parameter.dtype).removeprefix('torch.')}: the sum of "
                "clipped gradients would be rounded to it, which nothing accounts for; keep what "
                "is trained in float32 (what is frozen may be bfloat16) and compute under "
                "torch.autocast"
            )
