"""Checks of a whole run before any work is done and any privacy is spent."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from fl_lightning.kernel_choice import kernels_for
from fl_lightning.networks.inputs import input_dtype, meet_records
from fl_lightning.networks.outputs import predictions
from fl_lightning.preflight.dry_round import dry_round
from fl_lightning.preflight.proposed_run import ProposedRun
from fl_lightning.preflight.trainer_check import check_trainer
from fl_lightning.privacy.config import per_client
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.release.evaluation import check_evaluation
from fl_lightning.rules import Rules

_LOG = logging.getLogger("pytorch_lightning")


def check_run(proposed: ProposedRun) -> bool:
    """Check what needs the data or the Trainer, then try the dry round.

    The network is brought to where and how the Trainer will train it.

    Returns:
        Whether clients can be trained together under vmap.

    Raises:
        ValueError: naming the argument and its value.
    """
    rules, data, trainer = proposed.rules, proposed.data, proposed.trainer
    check_trainer(proposed)
    sizes, k = data.client_sizes, data.num_clients
    small = (sizes < 2).nonzero()[:, 0].tolist()
    if small:
        raise ValueError(
            f"data: client {small[0]} has {int(sizes[small[0]])} record(s) (and {len(small) - 1} "
            "more have fewer than 2): every client needs at least 2; lower num_clients or raise "
            "alpha or min_client_size"
        )
    if rules.clients_per_round is not None and rules.clients_per_round > k:
        raise ValueError(
            f"clients_per_round={rules.clients_per_round} is more than num_clients={k}"
        )
    _check_transform(proposed)
    meet_records(proposed.network, data)
    _check_privacy(proposed, sizes)
    if not proposed.member:
        _check_survivors(rules, k)
    trainer.precision_plugin.convert_module(proposed.module)
    proposed.module.to(trainer.strategy.root_device)
    with kernels_for(rules, proposed.layout, sizes, proposed.rounds):
        vmaps = dry_round(proposed)
    if rules.privacy.evaluate_every and not proposed.elsewhere:
        _check_evaluation(proposed)
    return vmaps


def _check_evaluation(proposed: ProposedRun) -> None:
    """Whether the answers of held-out records can be counted."""
    data, network = proposed.data, proposed.network
    known = None
    if data.val_fraction:
        x, y = (t[:2].to(next(network.parameters()).device) for t in data.held_out)
        was = network.training
        network.eval()
        with torch.no_grad():
            outputs = network(x.to(input_dtype(network, data.x)))
            known = predictions(outputs, y, proposed.loss, data.num_classes)
        network.train(was)
    check_evaluation(data, known)


def _check_transform(proposed: ProposedRun) -> None:
    """Whether every record that the run uses was made from one record."""
    data, private = proposed.data, proposed.rules.privacy.private
    problem = f"data.transform={data.transform}: {data.transform_problem}"
    if data.transform_problem and private:
        raise ValueError(
            f"{problem}; clipping and noise do not bound what others learn so: make each record "
            "from itself and from public numbers alone"
        )
    if data.transform_problem:
        _LOG.info(f"{problem}; a private run would refuse it")


def _check_privacy(proposed: ProposedRun, sizes: Tensor) -> None:
    privacy, k = proposed.rules.privacy, len(sizes)
    if not privacy.private:
        return
    ReleasedHistory(privacy, 1, proposed.layout.dims)  # clip norms that do not fit the layers
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


def _check_survivors(rules: Rules, num_clients: int) -> None:
    """Whether enough clients stay for their parts to be the whole noise."""
    if rules.privacy.setting != "client+secure_sum":
        return
    size, least = rules.cohort_size(num_clients), rules.privacy.min_survivors
    if least is not None and least > size:
        raise ValueError(f"min_survivors={least} is more than the {size} clients of a round")
    faults = rules.faults
    if least is None and (faults.dropout or faults.deadline is not None):
        raise ValueError(
            f"min_survivors=null needs the whole cohort, but dropout={faults.dropout} and deadline="
            f"{faults.deadline} make clients fail: give the number whose parts are to be enough"
        )
