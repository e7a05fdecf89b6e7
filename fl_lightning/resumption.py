"""What a run that goes on must have in common with what its checkpoint was made by.

An optimizer's state replaces whatever a new command line says of it, and fits no other optimizer.
So a difference is refused at the start, by both values, and is neither ignored nor left to fail.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fl_lightning.module import FederatedModule


def training_facts(module: FederatedModule) -> dict[str, Any]:
    """Classes of network, server optimizer and schedule, with their plain arguments.

    They are of a fresh optimizer, which no schedule and no step has changed.
    """
    configured = module.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    scheduler = configured["lr_scheduler"] if isinstance(configured, dict) else None
    facts: dict[str, Any] = {"network": class_path(type(module.network))}
    facts["server_optimizer"] = class_path(type(optimizer))
    facts |= _plain("server_optimizer", optimizer.defaults)
    facts["server_scheduler"] = None if scheduler is None else class_path(type(scheduler))
    return facts | ({} if scheduler is None else _plain("server_scheduler", scheduler.state_dict()))


def run_facts(module: FederatedModule, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its run for whoever exports it; nothing of it is private."""
    data, path = module.data, class_path(type(module.network))
    network = {"class_path": path} | (module.network_spec or {})
    return {
        "network": network,
        "source": data.source if isinstance(data.source, str) else data.dataset_name,
        "clients": data.num_clients,
        "partition": data.partition_name,
        "setting": module.privacy.setting,
        "rounds": rounds_done(checkpoint),
    }


def class_path(cls: type) -> str:
    """The shortest import path of a class, such as torch.optim.SGD for torch.optim.sgd.SGD."""
    parts = cls.__module__.split(".")
    for end in range(1, len(parts)):
        package = sys.modules.get(".".join(parts[:end]))
        if getattr(package, cls.__qualname__, None) is cls:
            return f"{'.'.join(parts[:end])}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def rounds_done(checkpoint: Mapping[str, Any]) -> int:
    """Rounds that a checkpoint holds."""
    return checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]


def check_resumption(
    module: FederatedModule, checkpoint: Mapping[str, Any], max_epochs: int | None
) -> None:
    """Whether a run can go on from a checkpoint, as far as that needs neither ledger nor secret.

    Args:
        module: the run as it was asked for now.
        checkpoint: what is to go on.
        max_epochs: rounds that are asked for.

    Raises:
        ValueError: naming the option, its value and that of the checkpoint.
    """
    state = checkpoint.get("aadp_fl")
    if state is None:
        raise ValueError("ckpt_path: it is not the checkpoint of a federated run that has begun")
    check_promise(module, state["promise"])
    _check_rounds(module, state.get("planned_rounds"), max_epochs)
    known = state.get("training", {})
    for name, value in training_facts(module).items() if known else ():
        if known.get(name) != value:
            raise ValueError(
                f"{name}={value}: the run to go on with was begun with {name}={known.get(name)}, "
                "which its checkpoint is of; leave it so, or start a new run in another folder"
            )
    _check_shapes(module.state_dict(), checkpoint["state_dict"])


def promise_of(module: FederatedModule, records: str | None) -> dict[str, Any]:
    """What multipliers and affordable steps are calibrated for.

    Args:
        module: the run.
        records: public name of the records and who holds them; None while nobody knows it.
    """
    promise = asdict(module.privacy)
    if records is not None:
        promise["data"] = records
    if module.privacy.unit == "record":
        promise["sampling_rate"] = module.sampling_rate
    if module.privacy.pooled:
        promise["clients_per_round"] = module.clients_per_round
        promise["weighting"] = module.weighting
    return promise


def check_promise(
    module: FederatedModule, promised: Mapping[str, Any], records: str | None = None
) -> None:
    """Whether the run still promises the same.

    Raises:
        ValueError: naming what was changed, with both values.
    """
    for name, value in promise_of(module, records).items():
        if promised.get(name) != value:
            raise ValueError(
                f"{name}={value}: the run to go on with was begun with "
                f"{name}={promised.get(name)}; what was promised, to whom and for which "
                "records, cannot be changed: start a new run in another folder"
            )


def _check_rounds(module: FederatedModule, planned: int | None, max_epochs: int | None) -> None:
    if planned is None or not module.privacy.private:
        return
    given = module.planned_rounds
    if given is not None and given != planned:
        raise ValueError(
            f"planned_rounds={given}: the run to go on with was begun with planned_rounds={planned}"
        )
    if max_epochs is not None and max_epochs > planned:
        raise ValueError(
            f"trainer.max_epochs={max_epochs}: the run to go on with was planned for {planned} "
            "rounds, and its noise with it; for more rounds start a new run, whose planned_rounds "
            "may be more than it trains at first"
        )


def _check_shapes(new: Mapping[str, Any], old: Mapping[str, Any]) -> None:
    for name in (*new, *(n for n in old if n not in new)):
        mine, known = (tuple(s[name].shape) if name in s else None for s in (new, old))
        if mine != known:
            words = ["missing" if shape is None else str(list(shape)) for shape in (mine, known)]
            raise ValueError(
                f"network: '{name.removeprefix('network.')}' is {words[0]}, and {words[1]} in the "
                "checkpoint to go on with; leave the network as it was begun"
            )


def _plain(prefix: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are numbers, words or lists of those."""
    result = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if _is_plain(value):
            result[f"{prefix}.{name.lstrip('_')}"] = value
    return result


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
