"""Checks of a whole run before any work is done and any privacy is spent."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytorch_lightning as pl
from torch import Tensor

from fl_lightning.aggregate import WEIGHTINGS
from fl_lightning.client import input_dtype
from fl_lightning.data import FederatedDataModule
from fl_lightning.dry_round import dry_round
from fl_lightning.network_check import finish_network
from fl_lightning.privacy.config import per_client
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.trainer_check import check_trainer

if TYPE_CHECKING:
    from fl_lightning.module import FederatedModule

_LOG = logging.getLogger("pytorch_lightning")


def check_training(module: FederatedModule) -> None:
    """Values of the module that contradict each other or are out of range.

    Raises:
        ValueError: naming the argument and its value.
    """
    rate, batch_size = module.sampling_rate, module.batch_size
    if (rate is None) == (batch_size is None):
        raise ValueError(
            f"sampling_rate={rate} and batch_size={batch_size}: give one of the two and set the "
            "other to null"
        )
    if module.privacy.unit == "record" and rate is None:
        raise ValueError(
            f"batch_size={batch_size} with setting='record+local': shuffled minibatches have no "
            "accounting here; use sampling_rate"
        )
    if rate is not None and not 0 < rate <= 1:
        raise ValueError(f"sampling_rate={rate} must be in (0, 1]")
    if not 0 <= module.client_momentum < 1:
        raise ValueError(f"client_momentum={module.client_momentum} must be in [0, 1)")
    for name in ("batch_size", "local_steps", "clients_per_round", "planned_rounds"):
        value = getattr(module, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if module.local_epochs < 1:
        raise ValueError(f"local_epochs={module.local_epochs} must be at least 1")
    for name in ("client_lr", "memory_budget"):
        value = getattr(module, name)
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} must be positive and finite")
    for name, choices in (("weighting", WEIGHTINGS), ("execution", ("auto", "vmap", "loop"))):
        value = getattr(module, name)
        if value not in choices:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")
    if module.seed < 0:
        raise ValueError(f"seed={module.seed} must be at least 0")
    _check_denoise(module)


def _check_denoise(module: FederatedModule) -> None:
    """Whether the noise of a release is known to the server."""
    if not module.denoise:
        return
    privacy = module.privacy
    if not privacy.private or privacy.pooled:
        raise ValueError(
            f"denoise=True with setting={privacy.setting!r}: there is no noise of each client to "
            "take away; use record+local or client+local"
        )
    if privacy.unit == "record" and module.local_steps != 1:
        raise ValueError(
            f"denoise=True with local_steps={module.local_steps}: later steps start from noisy "
            "ones, so that the noise of a release is known for local_steps=1 alone"
        )


def check_run(module: FederatedModule, data: FederatedDataModule, trainer: pl.Trainer) -> bool:
    """What needs the data or the Trainer; then the dry round.

    The network is brought to where and how the Trainer will train it.

    Returns:
        Whether clients can be trained together under vmap.

    Raises:
        ValueError: naming the argument and its value.
    """
    check_trainer(module, trainer)
    sizes, k = data.client_sizes, data.num_clients
    small = (sizes < 2).nonzero()[:, 0].tolist()
    if small:
        raise ValueError(
            f"data: client {small[0]} has {int(sizes[small[0]])} record(s) (and {len(small) - 1} "
            "more have fewer than 2): every client needs at least 2; lower num_clients or raise "
            "alpha or min_client_size"
        )
    if module.clients_per_round is not None and module.clients_per_round > k:
        raise ValueError(
            f"clients_per_round={module.clients_per_round} is more than num_clients={k}"
        )
    _check_transform(module, data)
    finish_network(module.network, data.x[0].to(input_dtype(module.network, data.x)))
    _check_privacy(module, sizes)
    _check_pool(module, k)
    trainer.precision_plugin.convert_module(module)
    module.to(trainer.strategy.root_device)
    return dry_round(module, data, trainer)


def _check_transform(module: FederatedModule, data: FederatedDataModule) -> None:
    """Whether every record that the run uses was made from one record."""
    problem = f"data.transform={data.transform}: {data.transform_problem}"
    if data.transform_problem and module.privacy.private:
        raise ValueError(
            f"{problem}; clipping and noise do not bound what others learn so: make each record "
            "from itself and from public numbers alone"
        )
    if data.transform_problem:
        _LOG.info(f"{problem}; a private run would refuse it")


def _check_privacy(module: FederatedModule, sizes: Tensor) -> None:
    privacy, k = module.privacy, len(sizes)
    if not privacy.private:
        return
    ReleasedHistory(privacy, 1, module.layout.dims)  # clip norms that do not fit the layers
    for name in ("epsilon", "delta", "noise_multiplier"):
        value = getattr(privacy, name)
        if isinstance(value, list) and len(value) > k:
            raise ValueError(f"{name}={value} has {len(value)} numbers for {k} clients")
    for client, delta in enumerate(per_client(privacy.delta, k)):
        units = int(sizes[client]) if privacy.unit == "record" else k
        what = "records of that client" if privacy.unit == "record" else "clients"
        if units * delta >= 1:
            raise ValueError(
                f"delta={delta} of client {client} is not below 1/{units} ({what}): such a δ "
                "allows to publish one of them outright"
            )


def _check_pool(module: FederatedModule, num_clients: int) -> None:
    """Whether enough clients stay for their shares to be the whole noise."""
    if module.privacy.setting != "client+secure_sum":
        return
    size, least = module.clients_per_round or num_clients, module.privacy.min_survivors
    if least is not None and least > size:
        raise ValueError(f"min_survivors={least} is more than the {size} clients of a round")
    faults = module.faults
    if least is None and (faults.dropout or faults.deadline is not None):
        raise ValueError(
            f"min_survivors=null needs the whole cohort, but dropout={faults.dropout} and deadline="
            f"{faults.deadline} make clients fail: give the number whose shares are to be enough"
        )
