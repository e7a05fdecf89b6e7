"""One release of a whole cohort: the noised weighted sum of clipped client updates.

Under ``client+aggregator`` a trusted server adds the noise, once, and keeps the cohort secret;
under ``client+secure_sum`` every client adds a share and only the sum of them is ever seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aadp_kernels import NoiseKey, poisson_mask
from fl_lightning import binding, secrets
from fl_lightning.client import plain_gradient
from fl_lightning.client_set import encode
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.privacy.mechanism import noise_event
from fl_lightning.privacy.pooled_sum import PooledSum
from fl_lightning.privacy.weights import event_multiplier, pooled_weights
from fl_lightning.release import ALL_CLIENTS, Release
from fl_lightning.sharing import record
from fl_lightning.sums import largest_extra, spent_digest
from fl_lightning.types import Params, PrivateUpdate

if TYPE_CHECKING:
    from fl_lightning.population import ClientPopulation


@dataclass(frozen=True)
class Pool:
    """Public rules of a noised sum over a cohort.

    Args:
        weights: weights asked for, of every client [K].
        rate: Poisson rate of a client in a round, drawn secretly; None: the cohort is public.
        survivors: fewest clients whose shares must be the whole noise; None: noise from one hand.
        clients_at_once: clients trained together.
    """

    weights: Tensor
    rate: float | None
    survivors: int | None
    clients_at_once: int


def make_pool(
    privacy: PrivacyConfig,
    client_sizes: Tensor,
    *,
    clients_per_round: int | None,
    weighting: str,
    clients_at_once: int,
) -> Pool | None:
    """The rules of a run's sums; None for the settings that release client by client."""
    if not privacy.pooled:
        return None
    everyone = len(client_sizes)
    size = clients_per_round or everyone
    weights = client_sizes.double() if weighting == "records" else torch.ones(everyone).double()
    survivors = shares_needed(privacy, size)
    poisson = privacy.poisson_cohort and size < everyone
    return Pool(weights, size / everyone if poisson else None, survivors, clients_at_once)


def shares_needed(privacy: PrivacyConfig, cohort: int) -> int | None:
    """Fewest clients whose shares are the whole noise; None where it is from one hand."""
    if privacy.setting != "client+secure_sum":
        return None
    return privacy.min_survivors or cohort


_ROW = torch.zeros(1, dtype=torch.int64)  # the cohort has one released history


def release(
    population: ClientPopulation, candidates: Tensor, params: Params, round: int, context: str
) -> PrivateUpdate:
    """Draw the cohort, train, clip, sum, add noise, and write the ledger before anything is seen.

    Every process trains its part of the cohort; the sums meet in one all-reduce, and what follows
    is the same in all of them.

    Args:
        population: the clients.
        candidates: ids that may take part: all that can pay under Poisson sampling, else the cohort
            itself (survivors of the round).
        params: global model.
        round: round number.
        context: digest of everything else that local training depends on.

    Returns:
        The mean update as one row [1, ...], of client `ALL_CLIENTS`; no row where too few clients
        survive for their shares to be enough noise.
    """
    privacy, history, ledger = population.privacy, population.history, population.ledger
    pool = population.pool
    assert ledger is not None
    assert pool is not None
    if len(candidates) < (pool.survivors or 1):
        return _nothing(population, params)
    z, weights = pooled_weights(
        pool.weights[candidates],
        population.budget.multiplier[candidates],
        mechanism=privacy.mechanism,
        vote_share=privacy.votes,
    )
    before = history.rows(_ROW)
    inputs = [candidates, weights, z, *params.values(), *before.values()]
    redraw = 0
    try:
        while True:
            key = binding.round_key(population.key, context, round, redraw, *inputs)
            update = noised_mean(population, candidates, weights, z, params, key, round)
            line = _ledger_line(population, update, candidates, weights, z, round, key)
            known = ledger.find(ALL_CLIENTS, round)
            if not any(o.binding == line.binding and o.digest != line.digest for o in known):
                break
            history.restore(_ROW, before)
            redraw += 1
        paid = any(o.digest == line.digest and o.clients == line.clients for o in known)
        able = population.budget.can_release_each(candidates.numpy(), 1)
        if not paid and not able.all():
            # Who could come only to repeat what is paid for cannot be in another sum.
            history.restore(_ROW, before)
            return release(population, candidates[torch.from_numpy(able)], params, round, context)
        fresh = [] if paid else [line]
        record(ledger, fresh, population.processes)
    except BaseException:
        history.restore(_ROW, before)
        raise
    for line in fresh:
        population.budget.spend(line)
    return update


def noised_mean(
    population: ClientPopulation,
    candidates: Tensor,
    weights: Tensor,
    z: float,
    params: Params,
    key: NoiseKey,
    round: int,
) -> PrivateUpdate:
    """Train, clip, add up and add noise; nothing is paid for yet, so nothing may be handed out."""
    coins = key.derive("coins")
    pool = population.pool
    assert pool is not None
    taking_part, rate = torch.ones(len(candidates), dtype=torch.bool), pool.rate
    if rate is not None:
        everyone = len(population.data.client_sizes)
        taking_part = poisson_mask(everyone, rate, key=coins.derive("cohort"), step=0)[candidates]
    total = PooledSum(
        population.history,
        population.layout,
        multiplier=z,
        survivors=pool.survivors,
        key=key.derive("noise"),
        dtypes=[params[name].dtype for name in population.layout.names],
        processes=population.processes,
    )
    hook = plain_gradient(population.plain)
    own = population.processes.share(taking_part.nonzero()[:, 0])

    def train() -> None:
        for group in own.split(pool.clients_at_once) if len(own) else ():
            clients, weight = candidates[group], weights[group]
            total.add(population.train(clients, params, hook, coins, round), clients, weight)

    total.gather(train)
    # Public denominators: what was expected, not who came.
    expected = 1.0 if rate is None else rate
    return total.release(
        divisor=expected * float(weights.sum()), expected_votes=expected * len(candidates)
    )


def _ledger_line(
    population: ClientPopulation,
    update: PrivateUpdate,
    candidates: Tensor,
    weights: Tensor,
    z: float,
    round: int,
    key: NoiseKey,
) -> Release:
    """The sum's line; what is a client's own follows from it and the header (see `sums`)."""
    privacy, policy, budget, pool = (
        population.privacy,
        update.policy,
        population.budget,
        population.pool,
    )
    assert policy is not None
    assert population.ledger is not None
    assert pool is not None
    ids = candidates.numpy()
    sent, votes = [value[0] for value in update.update.values()], policy.vote_noise_scale
    event = noise_event(privacy, z, 1.0 if pool.rate is None else pool.rate)
    own = event_multiplier(weights, z, mechanism=privacy.mechanism, vote_share=privacy.votes)
    extra = largest_extra(event, own.numpy(), budget.delta[ids], budget.extra_at)
    return Release(
        client=ALL_CLIENTS,
        round=round,
        attempt=len(population.ledger.find(ALL_CLIENTS, round)),
        first_step=len(population.ledger),
        steps=1,
        mechanism=event.mechanism,
        noise_multiplier=event.noise_multiplier,
        sampling_rate=event.sampling_rate,
        adjacency=event.adjacency,
        vote_noise_scale=None if votes is None else float(votes[0]),
        num_layers=population.layout.num_layers,
        clip_norm=tuple(policy.clip_norm[0].tolist()),
        shares=tuple(policy.shares[0].tolist()),
        binding=secrets.public_name(key),
        digest=secrets.digest([*sent, population.history.l1_norm[0]]),
        quantum=population.quantum(policy.noise_scale[0]),
        epsilon_inflation=extra.epsilon,
        tail_delta=extra.delta,
        guarantee=privacy.guarantee,
        largest_weight=float(pool.weights[candidates].max()),
        clients=None if len(ids) == len(pool.weights) else encode(ids),
        spent=spent_digest(budget.spent),
    )


def _nothing(population: ClientPopulation, params: Params) -> PrivateUpdate:
    """A round that was given up before anything was revealed."""
    policy = population.history.policy(_ROW[:0], torch.empty(0, dtype=torch.float64))
    return PrivateUpdate.nothing(params, policy, population.layout.num_layers)
