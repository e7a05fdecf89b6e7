"""One client's release of a few records, made by the run's own clipping, noise and order of steps.

It is what the server of the run would receive in round 0. Nothing is handed out and nothing is
charged: whoever makes it holds the records.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from aadp_kernels import NoiseKey, compiling
from fl_lightning.accounting.budget import Budget
from fl_lightning.data import FederatedDataModule
from fl_lightning.data.arrays import Arrays
from fl_lightning.data.partition import Partition
from fl_lightning.module import FederatedModule
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.processes.together import Processes
from fl_lightning.release.claim import Books
from fl_lightning.release.clients import Clients
from fl_lightning.release.one_by_one import OneByOne
from fl_lightning.rules import Rules
from fl_lightning.values.round import LayerPolicy, Params


@dataclass(frozen=True)
class Upload:
    """What a server receives of one client, and what it knows besides.

    Args:
        gradient: the release as a mean gradient, each parameter's shape.
        records: how many there are; public.
        policy: clip norms and noise of the release, one row; None without privacy.
        noise: standard deviation of the noise in each number of a parameter's gradient, by
            parameter; 0 without privacy.
    """

    gradient: Params
    records: int
    policy: LayerPolicy | None
    noise: dict[str, float]


def victims(
    data: FederatedDataModule, *, count: int, records: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Records of `count` clients that hold few, drawn from all training records.

    Args:
        data: of the run.
        count: clients, at least 1.
        records: of each, at least 1.
        seed: of the draw.

    Raises:
        ValueError: the data has fewer records.
    """
    if count < 1 or records < 1 or count * records > len(data.x):
        raise ValueError(
            f"victims={count} with records={records} each: both must be at least 1, and all of "
            f"them at most the {len(data.x)} training records"
        )
    drawn = np.random.default_rng([seed, 2]).permutation(len(data.x))[: count * records]
    rows = torch.from_numpy(drawn).split(records)
    return [(data.x[own], data.y[own]) for own in rows]


def check_victim(module: FederatedModule) -> None:
    """Whether one client's release is there to be attacked.

    Raises:
        ValueError: the server sees sums alone.
    """
    if module.privacy.summed:
        raise ValueError(
            f"setting={module.privacy.setting!r}: no single client's release is seen there, and a "
            "sum is attacked as that of one client under record+local or client+local"
        )


def upload(
    module: FederatedModule, x: Tensor, y: Tensor, *, multiplier: float | None, seed: int
) -> Upload:
    """The release of a client with these records in round 0.

    Args:
        module: of the run; its rules and its network as it is.
        x, y: the client's records [B, ...] and labels [B, ...].
        multiplier: noise multiplier of the client; None without privacy.
        seed: of noise and coins.

    Raises:
        ValueError: see `check_victim`.

    Guarantees:
        Coins of batches are taken to have chosen every record: a release without it would show
        nothing of a record.
    """
    check_victim(module)
    rules, privacy, layout = _certain(module.rules), module.privacy, module.layout
    params = dict(module.network.named_parameters())
    whole = {n: params[n].detach() for n in layout.names}
    clients = Clients(
        _alone(x, y),
        module.network,
        module.loss,
        layout,
        privacy=privacy,
        training=rules.training,
        vectorize=False,
        max_examples=len(x),
    )
    books = None
    if privacy.private:
        assert multiplier is not None
        history = ReleasedHistory(privacy, 1, layout.dims)
        budget = Budget(privacy, [1], clients.training.sampling_rate or 1.0, layout.dims)
        budget.multiplier = torch.tensor([multiplier], dtype=torch.float64)
        books = Books(history, budget, cast(Any, None), Processes())
    releases = OneByOne(clients, rules, NoiseKey.from_seed(seed), books, Processes())
    key = NoiseKey.from_seed(seed).derive("upload")
    with compiling("never"):  # one release would never pay it back
        update = releases.draw(torch.tensor([0]), whole, key, 0)
    steps = _steps(rules, len(x))
    factor = -1.0 / (rules.client_lr * steps)
    gradient = {n: update.update[n][0] * factor for n in layout.names}
    return Upload(gradient, len(x), update.policy, _noise(module, rules, update.policy, len(x)))


def _alone(x: Tensor, y: Tensor) -> FederatedDataModule:
    """A population of one client, whose records these are."""
    arrays = Arrays(x, y, x[:0], y[:0], 0, "victim")
    data = FederatedDataModule(arrays, num_clients=1, val_fraction=0.0, min_client_size=1)
    prepared = type("Prepared", (), {})()
    prepared.__dict__ |= {
        "arrays": arrays,
        "x": x,
        "y": y,
        "partition": Partition(np.arange(len(x)), np.array([0, len(x)])),
    }
    data.__dict__["_prepared"] = prepared
    return data


def _certain(rules: Rules) -> Rules:
    return rules if rules.sampling_rate is None else replace(rules, sampling_rate=1.0)


def _steps(rules: Rules, records: int) -> int:
    """Local steps of a release: what it is compared with is the mean of their gradients."""
    training = rules.training
    if training.sampling_rate is not None:
        return training.noised_steps
    assert training.batch_size is not None
    return training.local_steps or training.local_epochs * -(-records // training.batch_size)


def _noise(
    module: FederatedModule, rules: Rules, policy: LayerPolicy | None, records: int
) -> dict[str, float]:
    layout, steps = module.layout, _steps(rules, records)
    if policy is None:
        return dict.fromkeys(layout.names, 0.0)
    each = [float(v) for v in policy.noise_scale[0]]
    if module.privacy.mechanism == "laplace":
        each = [v * 2**0.5 for v in each]
    if module.privacy.unit == "record":
        # A sum of gradients and its noise are divided together; steps add theirs up.
        each = [v / records / steps**0.5 for v in each]
    else:
        each = [v / (rules.client_lr * steps) for v in each]
    return {n: each[layer] for n, layer in zip(layout.names, layout.layer_of, strict=True)}
