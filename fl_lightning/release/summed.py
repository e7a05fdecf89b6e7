"""One release of a whole cohort: the noised weighted sum of clipped client updates.

Under ``client+aggregator`` a trusted server adds the noise, once, and keeps the cohort secret;
under ``client+secure_sum`` every client adds a part of it and only the sum of them is ever seen.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aadp_kernels import NoiseKey, poisson_mask
from fl_lightning.accounting.sum_costs import largest_extra, spent_digest
from fl_lightning.keys import binding, digests
from fl_lightning.keys.released_noise import ReleasedNoise
from fl_lightning.privacy.mechanism import noise_event
from fl_lightning.privacy.noised_sum import NoisedSum, SharedNoise
from fl_lightning.privacy.weights import event_multiplier, sum_weights
from fl_lightning.release.claim import Books, Draw, claim
from fl_lightning.release.clients import Clients
from fl_lightning.release.lines import line_writer
from fl_lightning.rules import Rules
from fl_lightning.server.aggregate import WeightedMean
from fl_lightning.values.client_set import encode
from fl_lightning.values.release import ALL_CLIENTS, Release
from fl_lightning.values.round import LayerPolicy, Params, PrivateUpdate

_LOG = logging.getLogger("pytorch_lightning")
_ROW = torch.zeros(1, dtype=torch.int64)  # the cohort has one released history


@dataclass(frozen=True)
class SumRules:
    """Public rules of a noised sum over a cohort.

    Args:
        weights: weights asked for, of every client [K].
        rate: Poisson rate of a client in a round, drawn secretly; None: the cohort is public.
        survivors: fewest clients whose parts must be the whole noise; None: noise from one hand.
    """

    weights: Tensor
    rate: float | None
    survivors: int | None


def sum_rules(rules: Rules, client_sizes: Tensor) -> SumRules | None:
    """The rules of a run's sums; None for the settings that release client by client."""
    if not rules.privacy.summed:
        return None
    everyone = len(client_sizes)
    by_records = rules.weighting == "records"
    weights = client_sizes.double() if by_records else torch.ones(everyone).double()
    rate = rules.cohort_rate(everyone)
    return SumRules(weights, rate, noise_parts_needed(rules, everyone))


def noise_parts_needed(rules: Rules, num_clients: int) -> int | None:
    """Fewest clients whose parts are the whole noise; None where it is from one hand."""
    if rules.privacy.setting != "client+secure_sum":
        return None
    return rules.privacy.min_survivors or rules.cohort_size(num_clients)


class Summed:
    """Releases of sums, and what the server makes of them.

    Args:
        clients: who trains.
        rules: of the run.
        key: the run's secret.
        books: what is paid from and written in; its processes share the clients of a sum.
        noise: of released rounds, where rounds share noise (its budget has a plan); else None.
    """

    def __init__(
        self,
        clients: Clients,
        rules: Rules,
        key: NoiseKey,
        books: Books,
        noise: ReleasedNoise | None = None,
    ) -> None:
        found = sum_rules(rules, clients.data.client_sizes)
        assert found is not None
        self.sum_rules = found
        self.clients = clients
        self.rules = rules
        self.key = key
        self.books = books
        self.noise = noise
        # By what name the ledger knows the noise of each released round.
        self._names = {} if noise is None else {line.round: line.binding for line in books.ledger}

    def can_take_part(self, clients: np.ndarray, round: int) -> np.ndarray:
        """Whether each client can pay for a sum or has paid for that of this round, [k]."""
        can_pay = self.books.budget.can_pay_each(clients, 1)
        for line in self.books.ledger.find(ALL_CLIENTS, round):
            can_pay |= line.covers(clients)
        return can_pay

    def cohort(self, scheduled: np.ndarray, round: int) -> Tensor:
        """Clients that may be in the sum: it waits for nobody who fails or is late, [m]."""
        faults = self.rules.faults
        there = scheduled[~faults.failing(scheduled, round)]
        there = there[~faults.late(there, round)]
        return torch.from_numpy(there[self.can_take_part(there, round)])

    def groups(self, cohort: Tensor) -> Sequence[Tensor]:
        """The whole sum."""
        return [cohort] if len(cohort) else []

    def participants(self, cohort: Tensor, released: Sequence[PrivateUpdate]) -> int:
        """Clients of a sum as far as that is public: their expected number if coins decide."""
        if not any(len(update.clients) for update in released):
            return 0
        return round((self.sum_rules.rate or 1.0) * len(cohort))

    def release(
        self, candidates: Tensor, params: Params, round: int, context: str
    ) -> PrivateUpdate:
        """Draw the cohort, train, clip, sum, add noise, and write the ledger; then it is seen.

        Every process trains its part of the cohort; the sums meet in one all-reduce, and what
        follows is the same in all of them.

        Args:
            candidates: ids that may take part: all that can pay under Poisson sampling, else the
                cohort itself (survivors of the round).
            params: global model.
            round: round number.
            context: digest of everything else that local training depends on.

        Returns:
            The mean update as one row [1, ...], of client `ALL_CLIENTS`; no row where too few
            clients survive for their parts to be enough noise.
        """
        if len(candidates) < (self.sum_rules.survivors or 1):
            return self._nothing(params)
        z, weights = self.weights_of(candidates)
        earlier = self._earlier(round)

        def draw(redraw: int, before: dict[str, Tensor]) -> Draw:
            inputs = [candidates, weights, z, *params.values(), *before.values()]
            inputs += [digests.digest(map(repr, earlier))] if earlier else []
            key = binding.round_key(self.key, context, round, redraw, *inputs)
            update, key = self._draw(candidates, params, key, round)
            assert update.policy is not None
            sent = [value[0] for value in update.update.values()]
            digest = digests.digest([*sent, self.books.history.l1_norm[0]])
            line = self.line(update.policy, digest, candidates, weights, z=z, round=round, key=key)
            return Draw(update, [line])

        update = claim(self.books, _ROW, draw)
        if len(update.clients):
            if self.noise is not None:
                (line,) = self.books.ledger.find(ALL_CLIENTS, round)
                self._names[round] = line.binding
            return update
        if self.noise is not None:
            _LOG.warning(
                f"round {round} was released before, with other bytes: with shared noise a round "
                "is released once, so it is given up"
            )
            return self._nothing(params)
        # Who could come only to repeat what is paid for cannot be in another sum.
        can_pay = self.books.budget.can_pay_each(candidates.numpy(), 1)
        return self.release(candidates[torch.from_numpy(can_pay)], params, round, context)

    def weights_of(self, candidates: Tensor) -> tuple[float, Tensor]:
        """The noise multiplier of the sum and the weights of those that may be in it.

        Where rounds share noise, they are relative to all clients and not to those of the round:
        a round takes back in its own scale what an earlier one added in that one's.
        """
        privacy, budget, asked = self.rules.privacy, self.books.budget, self.sum_rules.weights
        among = candidates if budget.plan is None else torch.arange(len(asked))
        z, found = sum_weights(
            asked[among].numpy(),
            budget.multiplier[among].numpy(),
            mechanism=privacy.mechanism,
            vote_share=privacy.votes,
        )
        weights = torch.from_numpy(found)
        return z, weights if budget.plan is None else weights[candidates]

    def divisor_of(self, weights: Tensor) -> float:
        """What the sum is divided by: public, what was expected and not who came."""
        if self.books.budget.plan is None:
            return (self.sum_rules.rate or 1.0) * float(weights.sum())
        # The same in all rounds that share noise.
        everyone = torch.arange(len(self.sum_rules.weights))
        size = self.rules.cohort_size(len(everyone))
        return size * float(self.weights_of(everyone)[1].mean())

    def draw(self, candidates: Tensor, params: Params, key: NoiseKey, round: int) -> PrivateUpdate:
        """Train, clip, add up and add noise; nothing is paid for yet: nothing may be handed out."""
        return self._draw(candidates, params, key, round)[0]

    def _draw(
        self, candidates: Tensor, params: Params, key: NoiseKey, round: int
    ) -> tuple[PrivateUpdate, NoiseKey]:
        """The update, and the key by whose name the ledger knows its noise."""
        clients, processes, rate = self.clients, self.books.processes, self.sum_rules.rate
        z, weights = self.weights_of(candidates)
        coins = key.derive("coins")
        taking_part = torch.ones(len(candidates), dtype=torch.bool)
        if rate is not None:
            mask = poisson_mask(clients.data.num_clients, rate, key=coins.derive("cohort"), step=0)
            taking_part = mask[candidates]
        total = NoisedSum(
            self.books.history,
            clients.layout,
            multiplier=z,
            survivors=self.sum_rules.survivors,
            key=key.derive("noise"),
            dtypes=[params[name].dtype for name in clients.layout.names],
            processes=processes,
            shared=self._shared(key, round),
        )
        own = processes.part_of(taking_part.nonzero()[:, 0])

        def train() -> None:
            for group in own.split(clients.at_once) if len(own) else ():
                ids, weight = candidates[group], weights[group]
                total.add(clients.train(ids, params, coins, round), ids, weight)

        total.gather(train)
        update = total.release(
            divisor=self.divisor_of(weights), expected_votes=(rate or 1.0) * len(candidates)
        )
        return update, key if total.shared is None else total.key

    def line(
        self,
        policy: LayerPolicy,
        digest: str,
        clients: Tensor,
        weights: Tensor,
        *,
        z: float,
        round: int,
        key: NoiseKey,
        largest: float | None = None,
    ) -> Release:
        """The line of the sum. What each client is charged follows from it and from the header.

        Args:
            policy: one row.
            digest: of what is seen.
            clients: ids that it is charged to [k].
            weights: theirs [k].
            z: noise multiplier for a client of weight 1.
            round: round number.
            key: of coins and noise.
            largest: the largest weight asked for in the sum; None: that of `clients`.
        """
        privacy, budget, asked = self.rules.privacy, self.books.budget, self.sum_rules
        ids = clients.numpy()
        event = noise_event(privacy, z, 1.0 if asked.rate is None else asked.rate)
        rules = {"mechanism": privacy.mechanism, "vote_share": privacy.votes}
        own = event_multiplier(weights.numpy(), z, **rules)
        plan = budget.plan
        among = asked.weights[clients] if plan is None else asked.weights
        if plan is not None:
            own = own / plan.sizes_of_one.largest[ids]
        return line_writer(self.books, privacy, policy, key, round, 1)(
            0,
            client=ALL_CLIENTS,
            event=event,
            extra=largest_extra(event, own, budget.delta[ids], budget.sampler_cost_at),
            first_step=len(self.books.ledger) - budget.evaluation_lines,
            digest=digest,
            largest_weight=largest or float(among.max()),
            clients=None if len(ids) == len(asked.weights) else encode(ids),
            spent=spent_digest(budget.spent),
            combined=None if plan is None else tuple(r for r, _, _ in self._earlier(round)),
        )

    def _earlier(self, round: int) -> list[tuple[int, float, str]]:
        """Rounds whose noise this one takes back: their number, coefficient and name."""
        plan, names = self.books.budget.plan, self._names
        if plan is None:
            return []
        return [(r, d, names[r]) for r, d in plan.terms(round, names.__contains__)]

    def _shared(self, key: NoiseKey, round: int) -> SharedNoise | None:
        noise = self.noise
        if noise is None:
            return None
        earlier = self._earlier(round)
        return SharedNoise(
            tuple(d for _, d, _ in earlier),
            tuple(noise.find(name) for _, _, name in earlier),
            lambda values: noise.keep(key, values),
        )

    def _nothing(self, params: Params) -> PrivateUpdate:
        """A round that was given up before anything was revealed."""
        policy = self.books.history.policy(_ROW[:0], torch.empty(0, dtype=torch.float64))
        return PrivateUpdate.nothing(params, policy, self.clients.layout.num_layers)

    def add_to(self, mean: WeightedMean, update: PrivateUpdate, round: int) -> None:
        """Add the sum to the server's mean, as it is."""
        layers = self.clients.layout.num_layers
        mean.add(update.update, torch.ones(len(update.clients), layers, dtype=torch.float64))

    def meet(
        self,
        mean: WeightedMean,
        released: list[PrivateUpdate],
        cohort: Tensor,
        params: Params,
    ) -> list[PrivateUpdate]:
        """Return the releases as they are: each process has the sum of all processes already."""
        return released
