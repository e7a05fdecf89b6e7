"""The server's half of secure sums: propose one, take what is left of it, write it down.

A node has paid and written before its masked numbers leave. The server's ledger is a copy: it
charges every node that was asked for them, also where the sum was given up; the ledger that counts
is each node's own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aadp_kernels import NoiseKey
from fl_lightning.keys import digests
from fl_lightning.privacy.noised_sum import NoisedSum
from fl_lightning.release.agreement import Agreement
from fl_lightning.release.claim import Books
from fl_lightning.release.clients import Clients
from fl_lightning.release.federation import (
    Federation,
    SumOutcome,
    SumProposal,
    join_request,
)
from fl_lightning.release.summed import Summed
from fl_lightning.rules import Rules
from fl_lightning.values.round import LayerPolicy, Params, PrivateUpdate

_LOG = logging.getLogger("pytorch_lightning")
_ROW = torch.zeros(1, dtype=torch.int64)


class RemoteSum(Summed):
    """Sums of nodes.

    Args:
        clients: of the server's public sample: shapes, sizes and rules.
        rules: of the run.
        key: names the lines of the copy; it hides nothing.
        books: the copy of the ledger, and what it says of budgets.
        federation: the nodes, with a protocol for sums.
        terms: what was proposed to each.

    Raises:
        ValueError: the federation has no protocol for sums.
    """

    def __init__(
        self,
        clients: Clients,
        rules: Rules,
        key: NoiseKey,
        books: Books,
        federation: Federation,
        terms: Sequence[Agreement],
    ) -> None:
        super().__init__(clients, rules, key, books)
        if federation.sum is None:
            raise ValueError(
                "setting='client+secure_sum': this federation has no protocol for secure sums"
            )
        self._propose = federation.sum
        self._federation = federation
        self._terms = terms
        self._whole = False  # whether all of the last cohort were in its sum
        self.heads: dict[int, str] = {}
        self._there = 0

    def participants(self, cohort: Tensor, released: Sequence[PrivateUpdate]) -> int:
        """Clients whose numbers are in the last sum."""
        return self._there if any(len(update.clients) for update in released) else 0

    def release(
        self, candidates: Tensor, params: Params, round: int, context: str
    ) -> PrivateUpdate:
        """The sum of those nodes that stay until its end.

        Args:
            candidates: ids of the cohort.
            params: global model.
            round: round number.
            context: what the noise of a simulation is bound to.

        Returns:
            The mean update as one row [1, ...]; no row where the sum was given up.

        Raises:
            LedgerError: the copy of the ledger cannot be written.
        """
        survivors = self.sum_rules.survivors
        assert survivors is not None
        if len(candidates) < max(survivors, 2):
            return self._nothing(params)
        if not self._whole:
            self._remind(candidates.tolist())
        z, weights = self.weights_of(candidates)
        history = self.books.history
        noised = NoisedSum(
            history,
            self.clients.layout,
            multiplier=z,
            survivors=survivors,
            key=self.key,
            dtypes=[params[name].dtype for name in self.clients.layout.names],
        )
        base = self.sum_rules.weights[candidates]
        outcome = self._propose(
            SumProposal(
                run=self._terms[0].run,
                round=round,
                clients=candidates.tolist(),
                noise_parts=survivors,
                multiplier=z,
                asked=(base / base.max()).tolist(),
                blocks=noised.blocks(),
                context=context,
                params=params,
                history=history.rows(_ROW),
            )
        )
        self._there = len(outcome.survivors)
        self._whole = self._there == len(candidates)
        self.heads |= outcome.heads
        update = self._update(noised, outcome, candidates, weights, params)
        if len(outcome.charged):
            sent = [value[0] for value in update.update.values()] if len(update.clients) else []
            digest = digests.digest([*sent, history.l1_norm[0]])
            self._write(noised.policy, digest, candidates, weights, outcome, z=z, round=round)
        return update

    def _remind(self, clients: list[int]) -> None:
        """Join again, for nodes that forgot a run before it released anything."""
        self._federation.answers({k: join_request(self._terms[k], 0) for k in clients})

    def _update(
        self,
        noised: NoisedSum,
        outcome: SumOutcome,
        candidates: Tensor,
        weights: Tensor,
        params: Params,
    ) -> PrivateUpdate:
        if outcome.sums is None:
            _LOG.warning("a sum of nodes was given up; what they charged stays charged")
            return self._nothing(params)
        shapes = self.clients.layout.shapes
        sums = [s.view(shape) for s, shape in zip(outcome.sums, shapes, strict=False)]
        votes = outcome.sums[-1][None].float()  # not read where there are none
        there = torch.from_numpy(np.isin(candidates.numpy(), outcome.survivors))
        return noised.released(
            sums, votes, divisor=float(weights[there].sum()), expected_votes=int(there.sum())
        )

    def _write(
        self,
        policy: LayerPolicy,
        digest: str,
        candidates: Tensor,
        weights: Tensor,
        outcome: SumOutcome,
        *,
        z: float,
        round: int,
    ) -> None:
        """One line for those that may have paid; for the whole cohort where they alone would have
        had other noise or weights, so that the line fits the header."""
        asked = torch.from_numpy(np.isin(candidates.numpy(), outcome.charged))
        multiplier, base = self.books.budget.multiplier, self.sum_rules.weights
        few = candidates[asked]
        same = float(multiplier[few].min()) == z and base[few].max() == base[candidates].max()
        charged, theirs = (few, weights[asked]) if same else (candidates, weights)
        key = self.key.derive("sum", round)
        line = self.line(policy, digest, charged, theirs, z=z, round=round, key=key)
        self.books.ledger.append([line])
        self.books.budget.spend(line)
