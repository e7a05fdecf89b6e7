"""What a node holds, and the rules of a run around its own network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fl_lightning.deploy.policy import Policy, Refused, check_terms
from fl_lightning.module import FederatedModule
from fl_lightning.release.agreement import (
    Agreement,
    check_deployable,
    network_digest,
    privacy_of,
    training_of,
)


@dataclass(frozen=True)
class Holding:
    """What a node holds, apart from its folder. Private.

    Args:
        data: its records, a population of one.
        network: what it trains; of its own code, never of a server's.
        loss: of each record, or None: cross entropy.
        policy: of its holder.
        memory_budget: GiB for activations.
        personal: names of the parameters that stay with the holder, taken out of the network.
    """

    data: Any
    network: torch.nn.Module
    loss: torch.nn.Module | None
    policy: Policy
    memory_budget: float = 1.0
    personal: tuple[str, ...] = ()


def member_module(holding: Holding, terms: Agreement, folder: Path) -> FederatedModule:
    """The rules of a run around the holder's own network.

    Raises:
        Refused: the policy does not allow the terms, or they make no sense.
    """
    policy = holding.policy
    try:
        privacy, training = privacy_of(terms, policy.epsilon, policy.delta), training_of(terms)
        check_terms(policy, terms, privacy, training)
        if sorted(training.personal) != sorted(holding.personal):
            raise Refused(
                f"policy: personal layers are {list(training.personal)}, the holder keeps "
                f"{list(holding.personal)}"
            )
        for name in holding.personal:
            holding.network.get_parameter(name).requires_grad_(True)  # the module takes them out
        module = FederatedModule(
            holding.network,
            privacy,
            sampling_rate=training.sampling_rate,
            batch_size=training.batch_size,
            local_steps=training.local_steps,
            local_epochs=training.local_epochs,
            client_lr=training.lr,
            client_momentum=training.momentum,
            client_proximal=training.proximal,
            personal_layers=training.personal,
            personal_steps=training.personal_steps,
            personal_lr=training.personal_lr,
            planned_rounds=terms.rounds,
            execution="loop",
            memory_budget=holding.memory_budget,
            seed=training.seed,
            loss=holding.loss,
            run_dir=str(folder),
        )
        module.member = True
        check_deployable(module.rules)
        if privacy.evaluate_every and not holding.data.val_fraction:
            raise Refused(
                f"policy: evaluate_every is {privacy.evaluate_every}, and the holder keeps no "
                "records for evaluations (data.val_fraction is 0)"
            )
    except Refused:
        raise
    except ValueError as error:  # of the terms alone: no record was looked at
        raise Refused(f"terms: {error}") from error
    if terms.network != network_digest(holding.network, module.loss):
        raise Refused("policy: network is another one than the node's own")
    return module
