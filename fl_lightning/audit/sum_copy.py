"""A canary client in copies of a run's sums.

Each copy is a trial of its own: secret, ledger and noise of all rounds are its own, and its rounds
are the run's, cohorts included. All other clients send nothing: what they would add is known to the
adversary.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadp_kernels import NoiseKey
from fl_lightning.audit.canary import HUGE, shifts, unit_rows
from fl_lightning.audit.finished import Finished
from fl_lightning.audit.local_copy import (
    Seen,
    crafted_update,
    stated_rows,
    vote_rows,
    watch_votes,
)
from fl_lightning.audit.readings import Readings, joined, read_pieces
from fl_lightning.ledger.accounts import accounts
from fl_lightning.processes.together import Processes
from fl_lightning.release.summed import Summed
from fl_lightning.run import Run, begin_run
from fl_lightning.run_spec import RunSpec
from fl_lightning.server.optimizer import weights_in_last_model
from fl_lightning.values.round import Params

_SEEDS_APART = 1_000_003


def sum_trials(
    finished: Finished,
    client: int,
    coins: np.ndarray,
    *,
    seed: int | None,
    folder: Path,
    seconds: float,
) -> Seen:
    """Run the copies, one a coin, or as many as the time allows.

    Args:
        finished: the run, of a setting that releases sums.
        client: the one that is the canary, with its own weight and noise multiplier.
        coins: whether it is there, bool [n].
        seed: of the copies' noise; None: secrets of their own.
        folder: empty; secrets and ledgers of the copies.
        seconds: after which no copy is begun; how many there are says nothing of their outcomes.
    """
    started = time.perf_counter()
    params = {n: p.detach() for n, p in finished.module.network.named_parameters()}
    params = {name: params[name] for name in finished.module.layout.names}
    found: list[Tensor] = []
    charged, rate = 0.0, 1.0
    for i, there in enumerate(coins.tolist()):
        if found and time.perf_counter() - started > seconds:
            break
        own = None if seed is None else seed * _SEEDS_APART + i
        run = _begin(finished, seed=own, folder=folder / str(i))
        found.append(_trial(run, finished.rounds, client, there, params))
        assert run.ledger is not None
        if not i:
            account = accounts(run.ledger.header, run.ledger.releases)[client]
            charged, rate = account.epsilon(), run.budget.sampling_rate
        run.ledger.close()
    readings = [joined(list(trial[:, None])) for trial in found]
    return Seen(
        coins[: len(found)],
        Readings(*(np.concatenate([getattr(r, n) for r in readings]) for n in _FIELDS)),
        rate,
        charged,
        time.perf_counter() - started,
    )


_FIELDS = ("there", "opposite", "noise")


def _begin(finished: Finished, *, seed: int | None, folder: Path) -> Run:
    """A copy of the run before round 0, with the run's noise multipliers."""
    privacy = replace(
        finished.rules.privacy, epsilon=None, evaluate_every=0,
        noise_multiplier=finished.multipliers(), seed=seed,
    )  # fmt: skip
    rules = replace(finished.rules, privacy=privacy, execution="loop")
    module = finished.module

    def last_model(rounds: int) -> np.ndarray:
        return weights_in_last_model(module.server_optimizer, module.server_scheduler, rounds)

    spec = RunSpec(
        rules, module.network, module.loss, module.layout, finished.data, folder, Processes(),
        vmaps=False, last_model=last_model, resumed=None,
    )  # fmt: skip
    return begin_run(spec, finished.planned)


def _trial(run: Run, rounds: int, client: int, there: bool, params: Params) -> Tensor:
    """What all rounds of a copy say of the canary: [steps, pieces, 3]."""
    privacy, layout, sums = run.spec.rules.privacy, run.spec.layout, run.releases
    assert isinstance(sums, Summed)
    replaced = privacy.resolved_adjacency == "replace_one"
    direction = crafted_update(layout, privacy.p)
    rows = [HUGE * row for row in unit_rows(direction, layout)]
    own = HUGE if there else -HUGE if replaced else math.nan
    sums.clients.train = _sender(client, own, direction)  # pyright: ignore
    votes: list[Tensor] = []
    watch_votes(run.history, votes)
    white = _Whitened()
    found = []
    for round in range(rounds):
        cohort = run.cohort(round)
        among = client in cohort.tolist()
        if run.budget.plan is None and not among:
            continue  # it says nothing of the canary
        update = sums.release(cohort, params, round, run.context(cohort))
        if not len(update.clients):
            continue  # given up before anything was revealed
        assert update.policy is not None
        _, weights = sums.weights_of(cohort)
        divisor = sums.divisor_of(weights)
        whole = {n: v.double() * divisor for n, v in update.update.items()}
        pieces = stated_rows(whole, update.policy, layout)
        weight = float(weights[cohort == client]) if among else 0.0
        moved = shifts(rows, update.policy, privacy, weight)
        if update.policy.votes_at is not None:
            said, meant = vote_rows(votes.pop(), update.policy, replaced)
            pieces, moved = [*pieces, said], [*moved, meant * among]
        terms = run.budget.plan.terms(round, white.known) if run.budget.plan else []
        pieces, moved = white.rows(round, terms, pieces, moved)
        found.append(read_pieces(pieces, moved, privacy.mechanism)[0])
    return torch.stack(found)


def _sender(client: int, own: float, direction: Params) -> Any:
    """What the clients of a copy send: the canary its crafted update, others nothing.

    An update that is not finite adds zeros to the sum and does not vote.
    """

    def train(ids: Tensor, params: Params, key: NoiseKey, round: int) -> Params:
        sent = torch.full((len(ids),), math.nan)
        sent[ids == client] = own
        return {
            n: sent.view(-1, *[1] * v.ndim).to(params[n]) * v.to(params[n])
            for n, v in direction.items()
        }

    return train


class _Whitened:
    """Releases whose noise is their own, from releases that share noise with earlier ones."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def known(self, round: int) -> bool:
        return round in self._rows

    def rows(
        self, round: int, terms: Any, pieces: list[Tensor], moved: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What is left of a release, and of how far it is moved, without the earlier noise."""
        for earlier, coefficient in terms:
            old_pieces, old_moved = self._rows[earlier]
            pieces = [p - coefficient * o for p, o in zip(pieces, old_pieces, strict=True)]
            moved = [m - coefficient * o for m, o in zip(moved, old_moved, strict=True)]
        self._rows[round] = pieces, moved
        return pieces, moved
