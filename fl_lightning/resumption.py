"""Refuses to go on with a run by rules that its checkpoint was not made by.

An optimizer's state replaces whatever a new command line says of it, and fits no other optimizer.
So a difference is refused at the start, by both values, and is neither ignored nor left to fail.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fl_lightning.data import FederatedDataModule
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.privacy.named_options import flat_options
from fl_lightning.rules import Rules


def training_facts(network: nn.Module, configured: Any) -> dict[str, Any]:
    """Classes of network, server optimizer and schedule, with their plain arguments.

    Args:
        network: the global model.
        configured: a fresh optimizer, which no schedule and no step has changed, or a dictionary
            of it and its schedule.
    """
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    scheduler = configured["lr_scheduler"] if isinstance(configured, dict) else None
    facts: dict[str, Any] = {"network": class_path(type(network))}
    facts["server_optimizer"] = class_path(type(optimizer))
    facts |= _plain("server_optimizer", optimizer.defaults)
    facts["server_scheduler"] = None if scheduler is None else class_path(type(scheduler))
    return facts | ({} if scheduler is None else _plain("server_scheduler", scheduler.state_dict()))


def run_facts(
    network: nn.Module,
    spec: Mapping[str, Any] | None,
    rules: Rules,
    data: FederatedDataModule,
    checkpoint: Mapping[str, Any],
) -> dict[str, Any]:
    """What a checkpoint says of its run for whoever exports it; nothing of it is private.

    Args:
        network: the global model.
        spec: its class_path and init_args, if known.
        rules: of the run.
        data: of the run.
        checkpoint: as Lightning fills it.
    """
    fit = {"steps": rules.personal_steps, "lr": rules.personal_lr}
    personal = {"parameters": list(rules.personal), **fit} if rules.personal else None
    return {
        "network": {"class_path": class_path(type(network))} | dict(spec or {}),
        "personal": personal,
        "source": data.source if isinstance(data.source, str) else data.dataset_name,
        "clients": data.num_clients,
        "partition": data.partition_name,
        "setting": rules.privacy.setting,
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
    checkpoint: Mapping[str, Any],
    *,
    rules: Rules,
    max_epochs: int | None,
    training: Mapping[str, Any],
    state_dict: Mapping[str, Any],
) -> None:
    """Whether a run can go on from a checkpoint, as far as that needs neither ledger nor secret.

    Args:
        checkpoint: what is to go on.
        rules: of the run as it was asked for now.
        max_epochs: rounds that are asked for.
        training: `training_facts` as they are now.
        state_dict: of the module as it is now.

    Raises:
        ValueError: naming the option, its value and that of the checkpoint.
    """
    state = checkpoint.get("aadp_fl")
    if state is None:
        raise ValueError("ckpt_path: it is not the checkpoint of a federated run that has begun")
    check_promise(rules, state["promise"])
    _check_rounds(rules, state.get("planned_rounds"), max_epochs)
    known = state.get("training", {})
    for name, value in training.items() if known else ():
        if known.get(name) != value:
            raise ValueError(
                f"{name}={value}: the run to go on with was begun with {name}={known.get(name)}, "
                "which its checkpoint is of; leave it so, or start a new run in another folder"
            )
    _check_shapes(state_dict, checkpoint["state_dict"])


def promise_of(rules: Rules, records: str | None) -> dict[str, Any]:
    """The rules that a run must keep, because its noise was calibrated for them.

    Args:
        rules: of the run.
        records: public name of the records and who holds them; None while nobody knows it.
    """
    promise = flat_options(rules.privacy)
    if records is not None:
        promise["data"] = records
    if rules.privacy.unit == "record":
        promise["sampling_rate"] = rules.sampling_rate
    if rules.privacy.summed:
        promise["clients_per_round"] = rules.clients_per_round
        promise["weighting"] = rules.weighting
    return promise


def check_promise(rules: Rules, promised: Mapping[str, Any], records: str | None = None) -> None:
    """Whether the run still promises the same.

    Raises:
        ValueError: naming what was changed, with both values.
    """
    promised = flat_options(PrivacyConfig()) | dict(promised)  # options that came since
    for name, value in promise_of(rules, records).items():
        known = promised.get(name)
        if known != value:
            raise ValueError(
                f"{name}={value}: the run to go on with was begun with "
                f"{name}={known}; what was promised, to whom and for which "
                "records, cannot be changed: start a new run in another folder"
            )


def _check_rounds(rules: Rules, planned: int | None, max_epochs: int | None) -> None:
    if planned is None or not rules.privacy.private:
        return
    given = rules.planned_rounds
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
