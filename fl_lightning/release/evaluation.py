"""Private evaluations: how many held-out records the model gets right, released with noise.

Each is planned before round 0, written to the ledger before it is seen, and is the same one, free
of charge, when a run that was stopped repeats its round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadp_kernels import NoiseKey
from fl_lightning.accounting.evaluation import EvaluationPlan, evaluation_cost, is_due
from fl_lightning.keys import binding, digests, run_key
from fl_lightning.networks.inputs import input_dtype
from fl_lightning.networks.outputs import predictions
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.privacy.mechanism import noise_event
from fl_lightning.privacy.noised_counts import bounded_answers, noised_answers
from fl_lightning.release.claim import Books, same_noise_other_bytes, write_lines
from fl_lightning.release.personal_models import Trained, outputs_of, personal_models
from fl_lightning.values.client_set import encode
from fl_lightning.values.release import ALL_CLIENTS, Release


@dataclass(frozen=True)
class Evaluated:
    """A released evaluation. Public.

    Args:
        accuracy: share of right answers with noise; it may lie outside [0, 1].
        standard_error: standard deviation of its noise alone.
        clients: how many clients were in it.
    """

    accuracy: float
    standard_error: float
    clients: int


def plan_evaluations(privacy: PrivacyConfig, records: np.ndarray, rounds: int) -> EvaluationPlan:
    """The private evaluations of a run with `privacy.evaluate_every`.

    Args:
        privacy: of the run.
        records: held-out records of each client, int64 [K].
        rounds: planned.
    """
    return EvaluationPlan(
        privacy.evaluate_every,
        rounds,
        privacy.evaluation_share,
        privacy.unit == "record",
        privacy.noise_form,
        records,
    )


class Evaluations:
    """Releases of the held-out records of a run.

    Args:
        run: what is trained, and the records that clients hold out.
        key: the run's secret.
        books: what is paid from and written in; its budget has the plan.
        number: at a node, what its one client is called in the federation.
    """

    def __init__(
        self, run: Trained, key: NoiseKey, books: Books, number: int | None = None
    ) -> None:
        plan = books.budget.evaluations
        assert plan is not None
        self.run, self.books, self.plan = run, books, plan
        self.privacy = run.rules.privacy
        self.key = key.derive("evaluation")
        self.clients = torch.from_numpy(np.flatnonzero(plan.records))
        self._numbers = self.clients if number is None else torch.tensor([number])

    def due(self, round: int) -> bool:
        """Whether a round ends with an evaluation."""
        return is_due(round, self.plan.rounds, self.plan.every)

    def right_answers(self) -> Tensor:
        """Right answers of each client with held-out records, float64 [k]. Private."""
        network, was = self.run.network, self.run.network.training
        network.eval()
        with torch.no_grad():
            right = self._right()
        network.train(was)
        held = self.run.data.held_out_partition
        return torch.stack([right[held.client(k)].sum() for k in self.clients.tolist()])

    def _right(self) -> Tensor:
        """1 for each held-out record that is answered right, else 0, float64 [M]."""
        data, network, loss = self.run.data, self.run.network, self.run.loss
        models = personal_models(self.run)
        x, y = data.held_out
        right, held = torch.zeros(len(x), dtype=torch.float64), data.held_out_partition
        owned = torch.from_numpy(held.indices)
        owners = torch.from_numpy(np.repeat(np.arange(held.num_clients), held.sizes))
        device, dtype = next(network.parameters()).device, input_dtype(network, x)
        batches = (t.split(data.eval_batch_size) for t in (owned, owners))
        for some, who in zip(*batches, strict=True):
            records, labels = x[some].to(device, dtype), y[some].to(device)
            for rows, outputs in outputs_of(network, models, records, who):
                known = predictions(outputs, labels[rows], loss, data.num_classes)
                assert known is not None, "the check before round 0 saw predictions"
                right[some[rows]] = (known == labels[rows]).double().cpu()
        return right

    def release(self, round: int, context: str) -> Evaluated | None:
        """Evaluate the model, as `noised`; None where no client can pay for another one."""
        noised, weights, keep = self.noised(round, context)
        if not keep:
            return None
        # A sum is one number, of all that have a part in it.
        some = slice(None) if self.privacy.summed else keep
        multipliers = self.books.budget.evaluation_multiplier[self.clients][some]
        records = torch.from_numpy(self.plan.records)[self.clients][some]
        return evaluated(self.privacy, noised[some], multipliers, weights[some], records)

    def noised(self, round: int, context: str) -> tuple[Tensor, Tensor, list[int]]:
        """Evaluate the model, and write the ledger before anything is handed out.

        Args:
            round: that has just ended.
            context: digest of what the model depends on and the round does not hold.

        Returns:
            (noised numbers of right answers, weights, places of those that are paid for); see
            `noised_answers`. Others must not be handed out.

        Raises:
            LedgerError: the ledger cannot be written; nothing was released.
        """
        books = self.books
        records = torch.from_numpy(self.plan.records)[self.clients]
        right = books.processes.first(self.right_answers)
        answers = bounded_answers(right, records, self.privacy.unit)
        multipliers = books.budget.evaluation_multiplier[self.clients]
        params = [p.detach() for p in self.run.network.parameters()]
        redraw = 0
        while True:
            inputs = [*params, answers, multipliers]
            key = binding.round_key(self.key, context, round, redraw, *inputs)
            noised, weights = noised_answers(
                answers, multipliers, self._numbers, self.privacy, key.derive("noise")
            )
            lines = self._lines(noised, multipliers, round, key)
            known = [books.ledger.find(line.client, round, evaluation=True) for line in lines]
            if not any(map(same_noise_other_bytes, lines, known)):
                break
            redraw += 1
        paid = [
            any(old.digest == line.digest for old in those)
            for line, those in zip(lines, known, strict=True)
        ]
        keep = [i for i, line in enumerate(lines) if paid[i] or books.budget.can_pay(line)]
        fresh = [lines[i] for i in keep if not paid[i]]
        write_lines(books, fresh)
        for line in fresh:
            books.budget.spend(line)
        return noised, weights, keep

    def _lines(
        self, noised: Tensor, multipliers: Tensor, round: int, key: NoiseKey
    ) -> list[Release]:
        """One line a client; one for all of them in a sum, by its client with the least noise."""
        ids, zs = self.clients.tolist(), multipliers.tolist()
        if self.privacy.summed:
            ids, zs = [ALL_CLIENTS], [min(zs)]
        shown = digests.digests([noised])
        return [self._line(*one, round, key) for one in zip(ids, zs, shown, strict=True)]

    def _line(self, client: int, z: float, digest: str, round: int, key: NoiseKey) -> Release:
        budget, every = self.books.budget, self.plan.records
        event = noise_event(self.privacy, z, 1.0)
        deltas = budget.delta if client == ALL_CLIENTS else budget.delta[[client]]
        costs = [evaluation_cost(event, self.plan.form, d) for d in np.unique(deltas).tolist()]
        known = self.books.ledger.find(client, round, evaluation=True)
        some = client == ALL_CLIENTS and not every.all()
        return Release(
            client=client,
            round=round,
            attempt=len(known),
            first_step=budget.evaluation_lines if client == ALL_CLIENTS else self._before(client),
            steps=1,
            mechanism=event.mechanism,
            noise_multiplier=z,
            sampling_rate=1.0,
            adjacency=event.adjacency,
            num_layers=1,
            clip_norm=(1.0,),
            shares=(1.0,),
            binding=run_key.public_name(key),
            digest=digest,
            epsilon_inflation=max(c.epsilon for c in costs),
            tail_delta=max(c.delta for c in costs),
            clients=encode(self.clients.numpy()) if some else None,
            evaluation=True,
        )

    def _before(self, client: int) -> int:
        return int(self.books.budget.evaluated[client])


def evaluated(
    privacy: PrivacyConfig, noised: Tensor, multipliers: Tensor, weights: Tensor, records: Tensor
) -> Evaluated:
    """The accuracy that noised answers say.

    Args:
        privacy: of the run.
        noised: one number a client [k], or their sum [1].
        multipliers, weights: of each client in it [k]; see `noised_answers`.
        records: held-out records of each [k].
    """
    deviation = math.sqrt(2) if privacy.mechanism == "laplace" else 1.0
    if privacy.summed:
        divisor, noise = float(weights.sum()), float(multipliers.min())
    else:
        whole = records.double() if privacy.unit == "record" else torch.ones(len(records))
        divisor = float(whole.sum())
        noise = float(multipliers.square().sum().sqrt())
    return Evaluated(float(noised.sum()) / divisor, deviation * noise / divisor, len(multipliers))


def check_evaluation(data: Any, known: Tensor | None) -> None:
    """Whether private evaluations have records to read and answers to count.

    Args:
        data: of the run.
        known: classes that the network predicts for some records; None: it says none.

    Raises:
        ValueError: naming the option.
    """
    if not data.val_fraction:
        raise ValueError(
            "evaluate_every with data.val_fraction=0: no client holds records out; give a fraction "
            "above 0"
        )
    if known is None:
        raise ValueError(
            "evaluate_every: neither data nor outputs say which answers are right; only classes "
            "have an accuracy"
        )
    if not data.held_out_partition.sizes.any():
        raise ValueError("evaluate_every: no client has held-out records; raise data.val_fraction")
