"""Shadow models: an attacker's own runs on records of the same kind, many of them at once.

The clients of several federations stand side by side, each with the model of its own federation.
So local training, clipping and noise are those of the attacked run, by the same code; what differs
is who holds which record, and the noise. Nothing of it is released or charged: these are models of
the attacker.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from aadp_kernels import NoiseKey
from fl_lightning.accounting.budget import Budget
from fl_lightning.accounting.cohort import cohort_schedule
from fl_lightning.attacks.candidates import Candidates
from fl_lightning.attacks.likelihood import check_sides, scaled_confidences
from fl_lightning.data.partition import Partition
from fl_lightning.local.execution import bytes_per_example
from fl_lightning.module import FederatedModule, cross_entropy
from fl_lightning.networks.inputs import input_dtype
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.processes.together import Processes
from fl_lightning.release.claim import Books
from fl_lightning.release.clients import Clients
from fl_lightning.release.one_by_one import OneByOne, weigh
from fl_lightning.server.aggregate import WeightedMean
from fl_lightning.server.optimizer import make_optimizer, make_schedule
from fl_lightning.values.round import Params

_MOST_BYTES = 2**28  # of records, and of models, of federations that are trained together


@dataclass(frozen=True)
class Plan:
    """How the attacked run was trained, as far as that is public.

    Args:
        module: with the network as it was before round 0.
        sizes: records of each client [K].
        rounds: that were done.
        planned: rounds that cohorts were planned for.
        multiplier: noise multiplier of each client [K]; None without privacy.
    """

    module: FederatedModule
    sizes: npt.NDArray[np.int64]
    rounds: int
    planned: int
    multiplier: Tensor | None


def check_shadows(module: FederatedModule) -> None:
    """Whether shadows can be trained as the run was.

    Raises:
        ValueError: its clients do not release one by one.
    """
    if module.privacy.summed:
        raise ValueError(
            f"setting={module.privacy.setting!r}: shadow models are trained for settings that "
            "release client by client; leave them out (shadows=0)"
        )


def shadow_confidences(
    plan: Plan, candidates: Candidates, *, shadows: int, seed: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Train shadow models and ask each about every candidate.

    Args:
        plan: of the attacked run.
        candidates: records that shadows draw theirs from, as many as the run had, at random.
        shadows: models, at least 4.
        seed: of draws and noise, the attacker's.

    Returns:
        Scaled confidences [S, n], and which records each model had [S, n].

    Raises:
        ValueError: too few shadows, or too few candidates to leave any out.
    """
    check_shadows(plan.module)
    total = int(plan.sizes.sum())
    if shadows < 4:
        raise ValueError(f"shadows={shadows} must be at least 4")
    if total >= len(candidates):
        raise ValueError(f"candidates={len(candidates)}: the run alone has {total} records")
    rows = _dealt(len(candidates), total, shadows, seed)
    member = np.zeros((shadows, len(candidates)), dtype=bool)
    np.put_along_axis(member, rows, True, 1)
    check_sides(member)
    found = []
    for first in range(0, shadows, _at_once(plan, candidates)):
        part = rows[first : first + _at_once(plan, candidates)]
        for network in trained_shadows(plan, candidates, part, seed=seed, number=first):
            found.append(
                scaled_confidences(
                    network,
                    plan.module.loss,
                    candidates.x,
                    candidates.y,
                    probability=is_probability(plan.module),
                )
            )
    return np.stack(found), member


def _dealt(candidates: int, total: int, shadows: int, seed: int) -> npt.NDArray[np.int64]:
    """Candidates of each shadow model [S, total]; each is in as many of them, up to one."""
    dealt = cohort_schedule(candidates, total, shadows, seed)
    orders = (np.random.default_rng([seed, s, 1]).permutation(row) for s, row in enumerate(dealt))
    return np.stack(list(orders))


def is_probability(module: FederatedModule) -> bool:
    """Whether exp(-loss) is the probability of a label."""
    inner = getattr(module.loss, "loss", None)
    return module.loss is cross_entropy or isinstance(inner, nn.CrossEntropyLoss)


def _at_once(plan: Plan, candidates: Candidates) -> int:
    """Federations that are trained together."""
    record = candidates.x[0].numel() * candidates.x.element_size()
    model = 4 * sum(plan.module.layout.dims) * len(plan.sizes)
    largest = max(1, record * int(plan.sizes.sum()), model)
    return max(1, _MOST_BYTES // largest)


@dataclass(frozen=True)
class _Side:
    """Records of federations side by side, as `Clients` reads them."""

    x: Tensor
    y: Tensor
    partition: Partition
    client_sizes: Tensor

    @property
    def num_clients(self) -> int:
        return len(self.client_sizes)


def trained_shadows(
    plan: Plan,
    candidates: Candidates,
    rows: npt.NDArray[np.int64],
    *,
    seed: int,
    number: int = 0,
) -> list[nn.Module]:
    """The last models of federations whose clients hold `rows` [S, N] of the candidates.

    Args:
        plan: of the attacked run.
        candidates: records.
        rows: of each federation, client after client.
        seed: of noise and coins.
        number: of the first federation; others draw other noise.
    """
    key = NoiseKey.from_seed(seed).derive("shadows", number)
    module, rules = plan.module, plan.module.rules
    count, everyone = len(rows), len(plan.sizes)
    sizes = np.tile(plan.sizes, count)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    side = _Side(
        candidates.x, candidates.y, Partition(rows.ravel(), offsets), torch.from_numpy(sizes)
    )
    releases = _releases(plan, side, key)
    networks = [copy.deepcopy(module.network) for _ in range(count)]
    optimizers = [
        make_optimizer(module.server_optimizer, [p for p in n.parameters() if p.requires_grad])
        for n in networks
    ]
    schedules = [make_schedule(module.server_scheduler, o) for o in optimizers]
    size = rules.cohort_size(everyone)
    schedule = cohort_schedule(everyone, size, plan.planned, rules.seed)
    for round in range(plan.rounds):
        cohort = torch.from_numpy(np.array(schedule[round]))
        clients = (everyone * torch.arange(count)[:, None] + cohort).ravel()
        params = _stacked(networks, module.layout.names, size)
        update = releases.draw(clients, params, key.derive("round", round), round)
        for s in range(count):
            mean = WeightedMean(module.layout)
            own = list(range(s * size, (s + 1) * size))
            weigh(mean, update.select(own), rules, releases.clients)
            mean.write_gradient(networks[s], denoise=rules.denoise)
            optimizers[s].step()
            optimizers[s].zero_grad()
            if schedules[s] is not None:
                schedules[s].step()
    return networks


def _releases(plan: Plan, side: _Side, key: NoiseKey) -> OneByOne:
    """What the clients of all federations release; no ledger, since nothing leaves the attacker."""
    module, privacy = plan.module, plan.module.privacy
    example = side.x[0].to(input_dtype(module.network, side.x))
    bytes_each = bytes_per_example(module.network, example)
    clients = Clients(
        cast(Any, side),
        module.network,
        module.loss,
        module.layout,
        privacy=privacy,
        training=module.rules.training,
        vectorize=module.rules.execution != "loop",
        max_examples=max(1, int(module.rules.memory_budget * 2**30 / bytes_each)),
        stacked=True,
    )
    books = None
    if privacy.private:
        assert plan.multiplier is not None
        count = side.num_clients // len(plan.sizes)
        history = ReleasedHistory(privacy, side.num_clients, module.layout.dims)
        rate = module.rules.sampling_rate if privacy.unit == "record" else None
        budget = Budget(privacy, [1] * side.num_clients, rate or 1.0, module.layout.dims)
        budget.multiplier = plan.multiplier.repeat(count)
        books = Books(history, budget, cast(Any, None), Processes())
    return OneByOne(clients, module.rules, key, books, Processes())


def _stacked(networks: list[nn.Module], names: tuple[str, ...], times: int) -> Params:
    """Each network's trained parameters, once a client of its cohort, [S·m, ...]."""
    known = [dict(network.named_parameters()) for network in networks]
    return {
        name: torch.stack([k[name].detach() for k in known]).repeat_interleave(times, 0)
        for name in names
    }
