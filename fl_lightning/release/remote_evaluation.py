"""The server's half of private evaluations that nodes release: ask, copy their lines, average."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fl_lightning.accounting.evaluation import is_due
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.release.evaluation import Evaluated, evaluated
from fl_lightning.release.federation import Member
from fl_lightning.release.remote import Remote
from fl_lightning.values.round import Params

_LOG = logging.getLogger("pytorch_lightning")


def held_out_elsewhere(members: Sequence[Member], privacy: PrivacyConfig) -> np.ndarray:
    """Records that each node keeps for evaluations, int64 [K]; one that counts if it does not say.

    Raises:
        ValueError: no node keeps any, or answers cannot be weighed without their numbers.
    """
    every = f"evaluate_every={privacy.evaluate_every}"
    for client, member in enumerate(members):
        if member.held_out is None and privacy.unit == "record":
            raise ValueError(
                f"{every}: client {client} does not say how many records it has "
                "(announce_records=false), and right answers of records are weighed by that"
            )
    found = np.array([1 if m.held_out is None else m.held_out for m in members], dtype=np.int64)
    if not found.any():
        raise ValueError(f"{every}: no node holds records out; its data.val_fraction says how many")
    return found


class RemoteEvaluations:
    """Private evaluations of a run whose clients are nodes.

    Args:
        remote: who is asked; its books have the plan.
        privacy: of the run.
        params: the global model as it is now.
    """

    def __init__(
        self, remote: Remote, privacy: PrivacyConfig, params: Callable[[], Params]
    ) -> None:
        plan = remote.books.budget.evaluations
        assert plan is not None
        self.remote, self.privacy, self.params, self.plan = remote, privacy, params, plan
        self.clients = torch.from_numpy(np.flatnonzero(plan.records))

    def due(self, round: int) -> bool:
        """Whether a round ends with an evaluation."""
        return is_due(round, self.plan.rounds, self.plan.every)

    def release(self, round: int, context: str) -> Evaluated | None:
        """What the nodes that answer in time say of the model; None where none does.

        Args:
            round: that has just ended.
            context: what noise of a public seed is bound to.

        Raises:
            LedgerError: the copy of the ledger cannot be written.
        """
        asked = self.remote.ask("evaluate", self.clients.tolist(), self.params(), round, context)
        taken: dict[int, Tensor] = {}
        for client, (head, tensors) in asked.items():
            try:
                answers = tensors["answers"]
                if answers.shape != (1,) or answers.dtype != torch.float64:
                    raise ValueError("it is not one float64 number")
                if not bool(answers.isfinite().all()):
                    raise ValueError("it is not finite")
                line = self.remote.paid(client, head, [answers])
                if not line.evaluation or line.round != round:
                    raise ValueError("its ledger line is of another release")
            except (ValueError, KeyError, TypeError, IndexError) as error:
                _LOG.warning(f"client {client}: its evaluation is left out: {error}")
                continue
            taken[client] = answers
        if not taken:
            return None
        some = torch.tensor([*taken])
        return evaluated(
            self.privacy,
            torch.cat([*taken.values()]),
            self.remote.books.budget.evaluation_multiplier[some],
            torch.ones(len(some), dtype=torch.float64),
            torch.from_numpy(self.plan.records)[some],
        )
