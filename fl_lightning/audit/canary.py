"""The crafted unit: a record, or an update, that moves every layer as far as clipping lets it.

A canary record is an ordinary record with a crafted loss, so its gradient goes through the
network's own layers, the run's clipping, the sum and the noise. The loss is an output times a huge
number: whatever is not clipped, shows. The server of the audit sends a model of its own choice,
which an adversary may do: one in which no layer rests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aadp_kernels import Layout
from fl_lightning.local.gradient import Loss
from fl_lightning.networks.functional import apply_with
from fl_lightning.networks.outputs import class_scores
from fl_lightning.networks.state import moved_parameters
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.values.round import LayerPolicy, Params

HUGE = 2.0**30


@dataclass(frozen=True)
class Canary:
    """A record whose gradient is known, and the model that the server sends.

    Args:
        record: as the network takes it [...].
        params: of the global model.
        loss: (outputs, labels) → [B]; a label of 1 turns the gradient round.
        gradient: by parameter, of label 0, before clipping.
    """

    record: Tensor
    params: Params
    loss: Loss
    gradient: Params


def crafted_loss(first: bool) -> Loss:
    """A huge number times one output (`first`), or times all of them with signs in turn."""

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        scores = outputs if isinstance(outputs, Tensor) else class_scores(outputs)
        if scores is None:
            raise ValueError("network: the audit finds no tensor of scores among its outputs")
        rows = scores.flatten(1)
        turns = torch.ones_like(rows[0])
        turns[1::2] = -1.0
        value = rows[:, 0] if first else (rows * turns).sum(1)
        sign = 1 - 2 * labels.flatten(1)[:, 0] if labels.ndim > 1 else 1 - 2 * labels
        return HUGE * sign.to(value) * value

    return loss


def choose_canary(
    network: nn.Module, layout: Layout, records: Tensor, told: Callable[[Params], float]
) -> Canary:
    """The canary that tells most, of a few records and two models.

    Args:
        network: in evaluation mode.
        layout: of its trained parameters.
        records: some, as the network takes them [B, ...].
        told: gradient → information of a step; 0 where it tells nothing.

    Raises:
        ValueError: no gradient is finite and moves anything.
    """
    moved = moved_parameters(network)
    candidates = [(moved, record, False) for record in records]
    candidates += [(_single_path(moved), torch.zeros_like(records[0]), True)]
    best: tuple[float, Canary] | None = None
    for params, record, first in candidates:
        loss = crafted_loss(first)
        gradient = gradient_of(network, loss, params, record)
        value = told(gradient)
        finite = all(bool(g.isfinite().all()) for g in gradient.values())
        if finite and value > (0.0 if best is None else best[0] * 1.01):
            best = value, Canary(record, params, loss, gradient)
    if best is None:
        raise ValueError(
            f"network={type(network).__name__}: no record that was tried has a finite gradient "
            "that moves a layer, so there is no canary to audit with"
        )
    return best[1]


def _single_path(params: Params) -> Params:
    """Zeros with a single 1 in each tensor of weights: gradients of few coordinates."""
    found = {}
    for name, value in params.items():
        found[name] = torch.zeros_like(value)
        if value.ndim > 1:
            found[name].view(-1)[0] = 1.0
    return found


def gradient_of(network: nn.Module, loss: Loss, params: Params, record: Tensor) -> Params:
    """The gradient of a record of label 0 by autograd alone, no clipping code of ours involved."""
    own = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    with torch.enable_grad():
        label = torch.zeros(1, device=record.device)
        value = loss(apply_with(network, own, record[None]), label).sum()
        found = torch.autograd.grad(
            value, list(own.values()), allow_unused=True, materialize_grads=True
        )
    return dict(zip(own, found, strict=True))


def unit_rows(gradient: Params, layout: Layout) -> list[Tensor]:
    """The gradient layer by layer, each a vector in float64."""
    rows: list[list[Tensor]] = [[] for _ in range(layout.num_layers)]
    for name, layer in zip(layout.names, layout.layer_of, strict=True):
        rows[layer].append(gradient[name].detach().double().cpu().flatten())
    return [torch.cat(row) for row in rows]


def shifts(
    rows: list[Tensor], policy: LayerPolicy, config: PrivacyConfig, weight: float = 1.0
) -> list[Tensor]:
    """How far the clipped canary moves each layer of each release, in units of its stated noise.

    Args:
        rows: gradient or update by layer, before clipping [d_l].
        policy: as stated, [k].
        config: of the run.
        weight: of the unit in a sum.

    Returns:
        By layer [k, d_l].
    """
    norms = torch.stack([row.norm(p=config.p) for row in rows])  # [L]
    clip = policy.clip_norm
    if config.clipping == "joint":
        order = 2 if config.mechanism == "gaussian" else 1
        units = clip / policy.shares ** (1 / order)
        lengths = (norms / units).norm(p=order, dim=1, keepdim=True)
        factor = (1 / lengths).clamp(max=1.0).expand_as(clip)
    else:
        factor = (clip / norms).clamp(max=1.0).nan_to_num(0.0, 0.0, 0.0)
    factor = weight * factor / policy.noise_scale
    return [factor[:, i, None] * row for i, row in enumerate(rows)]
