"""Membership by likelihood ratio from shadow models (LiRA).

Reference:
    Carlini et al. 2022, arXiv:2112.03570: confidences are scaled to logits, a Gaussian is fitted to
    those of shadow models that had the record and of those that had not, and the attacked model's
    is compared with both (online) or with the second alone (offline).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fl_lightning.networks.inputs import input_dtype

Array = npt.NDArray[np.float64]
# With fewer shadow models on a side one variance for all records is less wrong than one for each
# (Carlini et al., fig. 11).
ENOUGH_FOR_OWN_VARIANCE = 32
LEAST = 2


def scaled_confidences(
    network: nn.Module,
    loss: Callable[[Any, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    probability: bool,
    batch: int = 1024,
) -> Array:
    """What a model's loss says of each record, scaled so that a Gaussian fits it, float64 [n].

    Args:
        network: the model.
        loss: of each record.
        x, y: records [n, ...].
        probability: whether exp(-loss) is the probability p of the label, as for cross entropy:
            log(p / (1 - p)); else the negative loss.
        batch: records computed at once.
    """
    found, was_training = [], network.training
    network.eval()
    try:
        with torch.no_grad():
            for some_x, some_y in zip(x.split(batch), y.split(batch), strict=True):
                outputs = network(some_x.to(input_dtype(network, some_x)))
                # In float32 the confidence of a sure model would be 1.
                outputs = outputs.double() if isinstance(outputs, Tensor) else outputs
                found.append(loss(outputs, some_y).double().cpu())
    finally:
        network.train(was_training)
    losses = torch.cat(found).numpy()
    if not probability:
        return -losses
    # A model that is surer than float64 can say would be an outlier of any Gaussian.
    losses = np.clip(losses, 1e-16, None)
    return -losses - np.log(-np.expm1(-losses))


def online(target: Array, shadows: Array, member: npt.NDArray[np.bool_]) -> Array:
    """Log likelihood ratio of each record, [n]: higher for members.

    Args:
        target: confidences of the attacked model [n].
        shadows: those of the shadow models [S, n].
        member: which records each shadow model had [S, n].

    Raises:
        ValueError: shapes differ, or a record has fewer than two shadow models on a side.
    """
    _check(target, shadows, member)
    inside, spread_in = _gaussian(shadows, member)
    outside, spread_out = _gaussian(shadows, ~member)
    return _log_density(target, inside, spread_in) - _log_density(target, outside, spread_out)


def offline(target: Array, shadows: Array, member: npt.NDArray[np.bool_]) -> Array:
    """How far each record's confidence lies above that of models without it, [n].

    In standard deviations, whose order is that of the published one-sided probability.

    Args, Raises: as in `online`.
    """
    _check(target, shadows, member)
    outside, spread = _gaussian(shadows, ~member)
    return (target - outside) / spread


def _check(target: Array, shadows: Array, member: npt.NDArray[np.bool_]) -> None:
    if shadows.shape != member.shape or target.shape != shadows.shape[1:]:
        raise ValueError(
            f"target {target.shape}, shadows {shadows.shape} and member {member.shape} must be "
            "[n], [S, n] and [S, n]"
        )
    check_sides(member)


def check_sides(member: npt.NDArray[np.bool_]) -> None:
    """Whether each record is in enough shadow models and out of enough, [S, n].

    Raises:
        ValueError: it is not.
    """
    fewest = int(np.minimum(member.sum(0), (~member).sum(0)).min())
    if fewest < LEAST:
        raise ValueError(
            f"shadows={len(member)}: a record has {fewest} shadow models with it, or without, and "
            f"{LEAST} are needed: take more"
        )


def _gaussian(values: Array, chosen: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
    """Mean and standard deviation of the chosen values of each record, [n] each."""
    count = chosen.sum(0)
    mean = np.where(chosen, values, 0.0).sum(0) / count
    square = np.where(chosen, values - mean, 0.0) ** 2
    if count.min() >= ENOUGH_FOR_OWN_VARIANCE:
        variance = square.sum(0) / (count - 1)
    else:
        variance = np.full_like(mean, square.sum() / (count - 1).sum())
    return mean, np.sqrt(variance + 1e-12)


def _log_density(value: Array, mean: Array, spread: Array) -> Array:
    return -0.5 * ((value - mean) / spread) ** 2 - np.log(spread)
