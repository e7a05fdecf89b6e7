"""Records found by search: whose clipped gradient looks most like the release.

Reference:
    Geiping et al. 2020, arXiv:2003.14053: cosine distance, total variation, Adam on the signs of
    the gradient with a learning rate that falls, pixels kept in their range. Several victims are
    attacked at once, each by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from fl_lightning.attacks.victim import Upload
from fl_lightning.local.rows import columns
from fl_lightning.module import FederatedModule
from fl_lightning.values.round import Params


@dataclass(frozen=True)
class Search:
    """How an attacker searches; tuned on records that nothing is reported of.

    Args:
        steps: of Adam.
        lr: at the beginning; it is divided by ten at 3/8, 5/8 and 7/8 of the steps.
        variation: weight of the total variation without noise.
        noisy_variation: the same where there is noise.
    """

    steps: int = 400
    lr: float = 0.1
    variation: float = 1e-3
    noisy_variation: float = 3e-2


def invert(
    module: FederatedModule,
    uploads: Sequence[Upload],
    labels: Tensor,
    shape: tuple[int, ...],
    span: tuple[float, float],
    *,
    search: Search,
    seed: int,
) -> Tensor:
    """Images whose gradients are most like the releases, [V, B, *shape] in `span`.

    Args:
        module: of the run; its network as it was when the releases were made.
        uploads: of V victims with equally many records.
        labels: of their records [V, B], known or inferred.
        shape: of a record.
        span: smallest and largest value of a pixel, public.
        search: see there.
        seed: of the first guesses.
    """
    targets = _targets(module, uploads)
    low, high = span
    start = np.random.default_rng([seed, 3]).uniform(0.3, 0.7, (*labels.shape, *shape))
    start = low + (high - low) * start
    guess = torch.from_numpy(start).float().requires_grad_()
    optimizer = torch.optim.Adam([guess], lr=search.lr * (high - low))
    marks = [search.steps * i // 8 for i in (3, 5, 7)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, marks)
    noisy = any(any(u.noise.values()) for u in uploads)
    weight = search.noisy_variation if noisy else search.variation
    for _ in range(search.steps):
        optimizer.zero_grad()
        distance = _distance(module, targets, guess, labels)
        (distance.sum() + weight * total_variation(guess).sum()).backward()
        assert guess.grad is not None
        guess.grad.sign_()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            guess.clamp_(low, high)
    return guess.detach()


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels of each victim's images, [V]."""
    if images.ndim < 4:
        return images.new_zeros(len(images))
    down = (images[..., 1:, :] - images[..., :-1, :]).abs()
    right = (images[..., 1:] - images[..., :-1]).abs()
    return down.flatten(1).mean(1) + right.flatten(1).mean(1)


def _targets(module: FederatedModule, uploads: Sequence[Upload]) -> tuple[Params, Params]:
    """Releases and how much each layer counts, stacked [V, ...]; layers in units of their noise."""
    names = module.layout.names
    gradient = {n: torch.stack([u.gradient[n] for u in uploads]) for n in names}
    weights = {n: torch.tensor([1 / u.noise[n] if u.noise[n] else 1.0 for u in uploads])
               for n in names}  # fmt: skip
    return {n: gradient[n] * columns(weights[n], gradient[n]) for n in names}, weights


def _distance(
    module: FederatedModule, targets: tuple[Params, Params], guess: Tensor, labels: Tensor
) -> Tensor:
    """1 - cosine between release and guessed gradient of each victim, [V]."""
    params = {n: p.detach() for n, p in module.network.named_parameters()}
    names = module.layout.names

    def loss(own: Params, x: Tensor, y: Tensor) -> Tensor:
        return module.loss(functional_call(module.network, {**params, **own}, (x,)), y).mean()

    trained = {n: params[n] for n in names}
    found = vmap(grad(loss), in_dims=(None, 0, 0))(trained, guess, labels)
    wanted, weights = targets
    product = norm = other = torch.zeros(len(guess))
    for n in names:
        mine = (found[n] * columns(weights[n], found[n])).flatten(1)
        theirs = wanted[n].flatten(1)
        product = product + (mine * theirs).sum(1)
        norm = norm + mine.square().sum(1)
        other = other + theirs.square().sum(1)
    return 1 - product / (norm * other).clamp(min=1e-30).sqrt()
