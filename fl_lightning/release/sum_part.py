"""A node's part of a secure sum: its own clipped update with its part of the noise, paid for.

It is a run of a population of one, whose sums hold others too: what this client can move a sum by,
and what noise is in it, follow from the public rules alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aadp_kernels import NoiseKey
from fl_lightning.keys import binding
from fl_lightning.privacy.noised_sum import NoisedSum
from fl_lightning.privacy.weights import weights_within
from fl_lightning.release.summed import Summed
from fl_lightning.values.round import Params

_ME = torch.zeros(1, dtype=torch.int64)


class SumPart:
    """One client's part of one round. Private until it is masked.

    Args:
        releases: of the node's run.
        params: global model.
        round: round number.
        multiplier: noise multiplier of the sum for a client of weight 1, > 0.
        asked: this client's weight over the largest in the sum, in (0, 1]; its ε may lower it.
        context: what coins and noise of a public seed are bound to.

    Raises:
        ValueError: nothing is left to spend, or the votes alone cost more than the client has.

    Guarantees:
        The client's noise multiplier in the sum is at least the one that its ε was calibrated to,
        if the parts of `min_survivors` clients are in the sum. Its noise is drawn from a key that
        is made here and thrown away (or from the public seed), so no two parts share any.
    """

    def __init__(
        self,
        releases: Summed,
        params: Params,
        *,
        round: int,
        multiplier: float,
        asked: float,
        context: str,
    ) -> None:
        rules, budget = releases.rules.privacy, releases.books.budget
        if not budget.can_pay_each(_ME.numpy(), 1)[0]:
            raise ValueError("nothing is left of the budget of this run")
        base = releases.sum_rules.weights
        self._largest = float(base[0]) / asked
        weights = weights_within(
            base.numpy(),
            budget.multiplier.numpy(),
            z=multiplier,
            largest=self._largest,
            mechanism=rules.mechanism,
            vote_share=rules.votes,
        )
        self._weights = torch.from_numpy(weights)
        self._releases, self._params, self._round, self._z = releases, params, round, multiplier
        own = releases.key if releases.key.simulated else NoiseKey.random(rules.rng)
        self._key = binding.round_key(own, context, round, 0)
        layout = releases.clients.layout
        self._sum = NoisedSum(
            releases.books.history,
            layout,
            multiplier=multiplier,
            survivors=releases.sum_rules.survivors,
            key=self._key.derive("noise"),
            dtypes=[params[name].dtype for name in layout.names],
        )

    def blocks(self) -> list[tuple[int, float, float]]:
        """Sizes, bounds and noise scales of the numbers in the sum, as this node computes them."""
        return self._sum.blocks()

    def values(self) -> list[Tensor]:
        """Train, clip, weigh and add noise: float64, one tensor a block; private."""
        clients = self._releases.clients
        update = clients.train(_ME, self._params, self._key.derive("coins"), self._round)
        self._sum.add(update, clients.numbers, self._weights)
        sums, votes = self._sum.with_noise_parts()
        return [*sums, votes] if self._sum.policy.vote_noise_scale is not None else sums

    def write(self, digest: str) -> str:
        """Charge the round and write its line, durably.

        Args:
            digest: of what leaves.

        Returns:
            The head of the ledger.

        Raises:
            LedgerError: the line cannot be written; nothing counts.
        """
        books = self._releases.books
        line = self._releases.line(
            self._sum.policy,
            digest,
            _ME,
            self._weights,
            z=self._z,
            round=self._round,
            key=self._key,
            largest=self._largest,
        )
        books.ledger.append([line])
        books.budget.spend(line)
        return books.ledger.head_hash
