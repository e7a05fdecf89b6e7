"""Rounds of `record+local` without Trainer and ledger, for studies of many small runs.

Rules, batches, clipping, votes and noise are those of a run, by the same functions; what is left
out (dry round, ledger, statement, callbacks) changes no number. Simulated: the seed is public.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from aadp_kernels import Layout, NoiseKey
from fl_lightning import FederatedDataModule, PrivacyConfig
from fl_lightning.accounting.budget import Budget
from fl_lightning.local.rules import LocalTraining
from fl_lightning.module import cross_entropy
from fl_lightning.privacy.allocation import division_ratio
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.privacy.mechanism import PrivateRecordGradient
from fl_lightning.release.clients import Clients

DELTA = 1e-5
_LOOKED_AT = 64  # records whose gradients give the raw norms
_HARMED, _DRAWS = 256, 12  # records and draws that say how far noise moves predictions


@dataclass(frozen=True)
class Plan:
    """What a run is beside its network and records.

    Attributes:
        privacy: options of PrivacyConfig; epsilon or noise_multiplier among them.
        rounds: of one local step each, with a learning rate that falls to 0 along a line.
        rate: Poisson rate of a record in a step.
        lr: the server's first learning rate.
        vectorize: whether clients train under one vmap; a loop over them suits large layers.
    """

    privacy: dict[str, Any]
    rounds: int
    rate: float
    lr: float
    vectorize: bool = True


@functools.lru_cache
def multiplier(epsilon: float, rounds: int, rate: float, dims: tuple[int, ...]) -> float:
    """Total noise multiplier of a client that takes part in every round."""
    budget = Budget(PrivacyConfig(epsilon=epsilon, delta=DELTA), [rounds], rate, dims)
    budget.calibrate(1)
    return float(budget.multiplier[0])


def trained(
    network: nn.Module,
    data: FederatedDataModule,
    plan: Plan,
    seed: int,
    *,
    watch: Callable[[int, dict[str, Tensor]], object] | None = None,
) -> dict[str, Any]:
    """Train all clients in every round; the network is changed.

    Args:
        network: the model.
        data: records and who holds them.
        plan: of the run.
        seed: of noise and coins, public.
        watch: is shown round and parameters before each round and after the last.

    Returns:
        `division_ratio`: median over the clients of R from released history (None for one layer).
    """
    config = PrivacyConfig(**plan.privacy, delta=DELTA, seed=seed, noise_form="fast")
    params = {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}
    flat = dict.fromkeys(params, "all") if config.clipping == "flat" else None
    layout, layers = Layout.build(params, flat), Layout.build(params)
    training = LocalTraining(1.0, 0.0, plan.rate, None, 1, 1, seed)
    clients = Clients(
        data, network, cross_entropy, layout, privacy=config, training=training,
        vectorize=plan.vectorize, max_examples=1 << 30,
    )  # fmt: skip
    count = data.num_clients
    history, everyone = ReleasedHistory(config, count, layout.dims), torch.arange(count)
    z = plan.privacy.get("noise_multiplier")
    if z is None:
        z = multiplier(float(plan.privacy["epsilon"]), plan.rounds, plan.rate, layers.dims)
    total = torch.full((count,), z, dtype=torch.float64)
    key = NoiseKey.from_seed(seed, rng=config.rng)
    for round in range(plan.rounds):
        if watch is not None:
            watch(round, params)
        hook = PrivateRecordGradient(
            clients.clipped_sums, history, layout, key=key.derive("noise", round),
            clients=everyone, multiplier=total,
        )  # fmt: skip
        update = clients.train(everyone, params, key.derive("coins", round), round, hook)
        lr = plan.lr * (1 - round / plan.rounds)
        params = {n: p + lr * update[n].mean(0) for n, p in params.items()}
    if watch is not None:
        watch(plan.rounds, params)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in params:
                parameter.copy_(params[name])
    several = layout.num_layers > 1
    released = float(division_ratio(history.l1_norm, history.dims).median()) if several else None
    return {"released_ratio": released}


def share_right(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Records whose class is right, in percent: `accuracy`, and `recall`, the mean over classes."""
    network.eval()
    with torch.no_grad():
        right = torch.cat([network(part).argmax(1) for part in x.split(512)]) == y
    network.train()
    recalls = [right[y == c].double().mean() for c in y.unique()]
    return {
        "accuracy": round(100 * float(right.double().mean()), 3),
        "recall": round(100 * float(torch.stack(recalls).mean()), 3),
    }


class RawRatios:
    """R from the norms of unprotected gradients, round by round; only a simulation may look.

    Args:
        network: the model.
        data: its first records are looked at.
        rounds: at which of them.
    """

    def __init__(
        self, network: nn.Module, data: FederatedDataModule, rounds: tuple[int, ...]
    ) -> None:
        self.network, self.data, self.rounds = network, data, rounds
        self.found: list[float] = []
        self.norms: list[list[float]] = []

    def __call__(self, round: int, params: dict[str, Tensor]) -> None:
        if round not in self.rounds:
            return
        dims = torch.tensor(Layout.build(params).dims, dtype=torch.float64)
        norms = _layer_norms(self.network, params, self.data)
        self.norms.append([round_to(n) for n in norms.tolist()])
        # Of L2 norms n; the function takes n·√d.
        self.found.append(round_to(float(division_ratio(norms * dims.sqrt(), dims))))


def harm_ratio(
    network: nn.Module, params: dict[str, Tensor], data: FederatedDataModule, size: float
) -> float:
    """How far noise moves predictions under the best division, over how far under flat clipping.

    Both have one multiplier and let the median record's gradient through. Flat clipping has noise
    of one size a coordinate, A² = Σ n_l²; the division that makes Σ d_l·A_l² least has
    A_l² = (n_l/√d_l)·Σ n_j·√d_j. Their energies are in the ratio R; their harm need not be.

    Args:
        network: the model.
        params: its parameters, at which gradients and predictions are taken.
        data: its first records are looked at, private.
        size: standard deviation of the flat noise, a coordinate.

    Returns:
        Mean Kullback-Leibler divergence of predictions before and after the one noise, over that of
        the other. Near a fit that is how much the loss grows.
    """
    layout, norms = Layout.build(params), _layer_norms(network, params, data)
    root = torch.tensor(layout.dims, dtype=torch.float64).sqrt()
    best = ((norms / root) * (norms * root).sum()).sqrt() / norms.norm()
    x, generator = data.x[:_HARMED], torch.Generator().manual_seed(0)

    def predicted(moved: dict[str, Tensor]) -> Tensor:
        return functional_call(network, moved, (x,)).log_softmax(1)

    far = [0.0, 0.0]
    with torch.no_grad():
        still = predicted(params)
        for _ in range(_DRAWS):
            noise = {n: torch.randn(p.shape, generator=generator) for n, p in params.items()}
            for i, scales in enumerate((best, torch.ones_like(best))):
                moved = {
                    name: params[name] + size * float(scales[layer]) * noise[name]
                    for name, layer in zip(layout.names, layout.layer_of, strict=True)
                }
                far[i] += float((still.exp() * (still - predicted(moved))).sum(1).mean())
    return round_to(far[0] / far[1])


def _layer_norms(
    network: nn.Module, params: dict[str, Tensor], data: FederatedDataModule
) -> Tensor:
    """Median L2 norm of each layer over the gradients of some records, [L]."""
    layout, x, y = Layout.build(params), data.x[:_LOOKED_AT], data.y[:_LOOKED_AT]

    def loss(given: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(network, given, (x[None],)), y[None])[0]

    squares = torch.zeros(len(x), layout.num_layers, dtype=torch.float64)
    # One after another: encoders look at a mask's values, which vmap forbids.
    for row, record, target in zip(squares, x, y, strict=True):
        gradients = grad(loss)(params, record, target)
        for name, layer in zip(layout.names, layout.layer_of, strict=True):
            row[layer] += gradients[name].double().square().sum()
    return squares.sqrt().median(0).values


def round_to(value: float) -> float:
    """Four digits, for files."""
    return float(f"{value:.4g}")
