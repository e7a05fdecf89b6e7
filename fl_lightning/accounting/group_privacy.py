"""What a run guarantees to several units together: exact where it can be, else an upper bound.

| setting | group | what it does |
|---|---|---|
| record+local | g records of one client | as many as the coins take move one noise together |
| record+local | a record at each of m clients | m independent noises: composition |
| client+local | g clients, or a person at g of them | g independent noises: composition |
| sums of clients | g clients, or a person at g of them | their sensitivities add up in one noise |
| sums that share noise | g clients, or a person at g of them | so do those of the whole run |

Records of a group that lie at several clients are protected at least as well as when all are at the
client with the least noise: the same coins move several noises, and the whole shift by less.

Gaussians without coins have a closed form: multipliers 1/sum(1/z_k) in one noise, and
1/sqrt(sum(1/z_k²)) in independent ones. Clients that took part in different rounds move the rounds
by vectors whose norms add up (Minkowski), which is an upper bound. Everything else is composed by
`shift_mixtures`. Under replace_one with coins the figure is an upper bound: at least one record of
the group is taken with probability 1 - (1 - q)^g, and how many there are is given away.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from scipy import special, stats

from fl_lightning.accounting.composition import SMALLEST_PLD_DELTA, compose_epsilon
from fl_lightning.accounting.group_tails import Sampler, group_extra
from fl_lightning.accounting.shift_mixtures import ShiftMixture, mixture_delta, mixture_epsilon
from fl_lightning.values.event import NoiseEvent

# Larger shifts than this in one step leave nothing that a finer analysis could protect.
_LARGEST_SHIFT = 60.0
_MOST_SUMS = 64
_MOST_STEPS = 10**6


@dataclass(frozen=True)
class ClientSteps:
    """What one client's units went through. Public.

    Args:
        counts: how often each noised step happened.
        delta: the client's delta.
        rounds: (round, number of the step in it) of all steps, for noised sums.
        largest: where rounds share noise, how far the client moves the round that it moves most.
    """

    counts: Mapping[NoiseEvent, int]
    delta: float
    rounds: frozenset[tuple[int, int]] = frozenset()
    largest: float = 0.0


@dataclass(frozen=True)
class GroupFigure:
    """The guarantee of a group. Public.

    Args:
        size: units or clients in the group.
        epsilon: at `delta`, for ideal noise, plus the inflation of the noise that was drawn.
        delta: the smallest delta of a client.
        at: an epsilon that was asked for, and
        delta_at: delta of the group there, for ideal noise.
        extra_delta: to be added to both deltas for the noise that was drawn; NaN: not known.
        exact: False: an upper bound.
    """

    size: int
    epsilon: float
    delta: float
    at: float
    delta_at: float
    extra_delta: float
    exact: bool


@dataclass(frozen=True)
class GroupSteps:
    """All steps as a group sees them.

    Args:
        counts: how often each step happened.
        exact: whether some group sees just these.
        joint: shift of the one Gaussian that all steps are together, None where they are not one.
        loose: events that are at least as bad, for what the finer analysis cannot do.
    """

    counts: Mapping[ShiftMixture, int]
    exact: bool
    joint: float | None = None
    loose: Mapping[NoiseEvent, int] | None = None


def records_of_one_client(accounts: Sequence[ClientSteps], size: int) -> GroupSteps:
    """Steps of a group of `size` records, all of the client with the least noise."""
    counts, exact, _ = _worst(accounts)
    return GroupSteps(
        {_records(event, size): n for event, n in counts.items()},
        exact and not any(e.sampled_replacement for e in counts),
        joint=size * _joint(counts) if _is_one_gaussian(counts) else None,
        loose={_one_coin(event, size): n for event, n in counts.items()},
    )


def apart(accounts: Sequence[ClientSteps], size: int) -> GroupSteps:
    """Steps as a unit at each of `size` clients sees them, whose noises are independent."""
    if all(_is_one_gaussian(a.counts) for a in accounts):
        members = sorted(accounts, key=lambda a: -_joint(a.counts))[:size]
        together: Counter[ShiftMixture] = Counter()
        for event, n in ((e, n) for a in members for e, n in a.counts.items()):
            together[_records(event, 1)] += n
        joint = math.sqrt(math.fsum(_joint(a.counts) ** 2 for a in members))
        return GroupSteps(together, True, joint=joint)
    counts, exact, alike = _worst(accounts)
    return GroupSteps(
        {_records(event, 1): n * size for event, n in counts.items()},
        exact and alike >= size,
        loose={event: n * size for event, n in counts.items()},
    )


def in_one_sum(accounts: Sequence[ClientSteps], size: int) -> GroupSteps:
    """Steps of a group of `size` clients that are in the same noised sums."""
    events = [event for a in accounts for event in a.counts]
    mechanism, rate = events[0].mechanism, max(e.sampling_rate for e in events)
    order = [(max(1 / e.noise_multiplier for e in a.counts), len(a.rounds), a) for a in accounts]
    order = sorted(order, key=lambda x: (-x[0], -x[1]))[:size]
    # No group is in more releases than there are, or than its members' together.
    rounds = min(
        len(frozenset().union(*(a.rounds for a in accounts))),
        sum(sorted((len(a.rounds) for a in accounts), reverse=True)[:size]),
    )
    step, rounded = _sum_of_coins(mechanism, [move for move, _, _ in order], rate)
    aligned = all(len(a.counts) == 1 and a.rounds == order[0][2].rounds for _, _, a in order)
    one_rate = all(e.sampling_rate == rate for e in events)
    loose = NoiseEvent(mechanism, 1 / step.shifts[-1], 1 - (1 - rate) ** size)
    if not all(_is_one_gaussian(a.counts) for a in accounts):
        exact = aligned and one_rate and not rounded and rounds == len(order[0][2].rounds)
        return GroupSteps({step: rounds}, exact, loose={loose: rounds})
    joint = math.fsum(sorted((_joint(a.counts) for a in accounts), reverse=True)[:size])
    return GroupSteps({step: rounds}, aligned, joint=joint)


def in_correlated_sums(accounts: Sequence[ClientSteps], size: int, *, horizon: int) -> GroupSteps:
    """Steps of a group of `size` clients in sums whose rounds share noise.

    Their moves of a whole run add up (Minkowski), and so do those of each of its planned rounds;
    exactly so for clients that took part in the same rounds, by the same factor.

    Args:
        accounts: of clients that took part.
        size: of the group.
        horizon: planned rounds.
    """
    members = sorted(accounts, key=lambda a: _joint(a.counts), reverse=True)[:size]
    largest = math.fsum(sorted((a.largest for a in accounts), reverse=True)[:size])
    exact = len({(a.rounds, a.largest, _joint(a.counts)) for a in members}) == 1
    step = ShiftMixture("gaussian", (largest,), (1.0,))
    return GroupSteps({step: horizon}, exact, joint=math.fsum(_joint(a.counts) for a in members))


def group_figure(
    steps: GroupSteps, sampler: Sampler | None, *, size: int, delta: float, at: float
) -> GroupFigure:
    """The guarantee of a group whose steps are known.

    Args:
        steps: with noise in all of them.
        sampler: of the noise; None where it is not known.
        size: of the group, for the record.
        delta: in [0, 1).
        at: epsilon >= 0 whose delta is asked for as well.
    """
    if steps.joint is not None:
        one = NoiseEvent("gaussian", 1 / steps.joint)
        epsilon, there, exact = compose_epsilon({one: 1}, delta), _delta(steps.joint, at), True
    elif _is_fine(steps, delta):
        epsilon = mixture_epsilon(steps.counts, delta)
        there, exact = mixture_delta(steps.counts, at, finest=delta), True
    else:
        epsilon, there, exact = compose_epsilon(steps.loose or {}, delta), math.nan, False
        there = delta if at >= epsilon else there
    if sampler is None:
        return GroupFigure(size, epsilon, delta, at, there, math.nan, exact and steps.exact)
    larger = delta if math.isnan(there) else max(delta, there)
    extra = group_extra(sampler, steps.counts, epsilon, larger)
    return GroupFigure(
        size, epsilon + extra.epsilon, delta, at, there, extra.delta, exact and steps.exact
    )


def _is_fine(steps: GroupSteps, delta: float) -> bool:
    """Whether the distribution of the loss can be had to a useful accuracy."""
    if delta == 0:
        return True
    near = max(mixture.shifts[-1] for mixture in steps.counts) <= _LARGEST_SHIFT
    return near and delta >= SMALLEST_PLD_DELTA and sum(steps.counts.values()) <= _MOST_STEPS


def _delta(shift: float, epsilon: float) -> float:
    """Closed form of one Gaussian (Balle and Wang 2018, theorem 8)."""
    if math.isinf(epsilon):
        return 0.0
    first = float(special.ndtr(shift / 2 - epsilon / shift))
    second = math.exp(epsilon + float(special.log_ndtr(-shift / 2 - epsilon / shift)))
    return max(0.0, first - second)


def _is_one_gaussian(counts: Mapping[NoiseEvent, int]) -> bool:
    return all(e.mechanism == "gaussian" and e.sampling_rate == 1 for e in counts)


def _joint(counts: Mapping[NoiseEvent, int]) -> float:
    """Shift of the one Gaussian that Gaussians without coins are together."""
    return math.sqrt(math.fsum(n / e.noise_multiplier**2 for e, n in counts.items()))


def _worst(accounts: Sequence[ClientSteps]) -> tuple[Mapping[NoiseEvent, int], bool, int]:
    """Steps that are at least as bad as any client's; whether some client has them, and how many.

    Less noise, more coins and more steps are each worse.
    """
    known = Counter(frozenset(a.counts.items()) for a in accounts)
    if len(known) == 1:
        return accounts[0].counts, True, len(accounts)
    events = [event for a in accounts for event in a.counts]
    worst = replace(
        events[0],
        noise_multiplier=min(e.noise_multiplier for e in events),
        sampling_rate=max(e.sampling_rate for e in events),
    )
    counts = {worst: max(sum(a.counts.values()) for a in accounts)}
    alike = known[frozenset(counts.items())]
    return counts, alike > 0, alike


def _records(event: NoiseEvent, size: int) -> ShiftMixture:
    """A step of a group of `size` units of one batch, each with a coin of its own."""
    rate, move = event.sampling_rate, 1 / event.noise_multiplier
    if rate == 1:
        return ShiftMixture(event.mechanism, (size * move,), (1.0,))
    numbers = range(1, size + 1) if event.sampled_replacement else range(size + 1)
    weights = [float(stats.binom.pmf(k, size, rate)) for k in numbers]
    kept = [(k, w) for k, w in zip(numbers, weights, strict=True) if w > 0]
    if not event.sampled_replacement:
        return ShiftMixture(
            event.mechanism, tuple(k * move for k, _ in kept), tuple(w for _, w in kept)
        )
    # The multiplier is relative to the exchange of two units: each moves half as far.
    some = math.fsum(w for _, w in kept)
    return ShiftMixture(
        event.mechanism,
        tuple(k * move / 2 for k, _ in kept),
        tuple(w / some for _, w in kept),
        exchange=some,
    )


def _one_coin(event: NoiseEvent, size: int) -> NoiseEvent:
    """At least as bad as `_records`: all of the group is taken where at least one is."""
    rate = -math.expm1(size * math.log1p(-event.sampling_rate)) if event.sampling_rate < 1 else 1.0
    return replace(event, noise_multiplier=event.noise_multiplier / size, sampling_rate=rate)


def _sum_of_coins(mechanism: str, moves: Sequence[float], rate: float) -> tuple[ShiftMixture, bool]:
    """The sum of moves that happen by coins of their own; whether sums were rounded up."""
    if rate == 1:
        return ShiftMixture(mechanism, (math.fsum(moves),), (1.0,)), False
    if len(set(moves)) == 1:
        event = NoiseEvent(mechanism, 1 / moves[0], rate)
        return _records(event, len(moves)), False
    law, rounded = {0.0: 1.0}, False
    for move in moves:
        grown: dict[float, float] = {}
        for total, weight in law.items():
            grown[total] = grown.get(total, 0.0) + weight * (1 - rate)
            grown[total + move] = grown.get(total + move, 0.0) + weight * rate
        law = grown
    if len(law) > _MOST_SUMS:
        rounded, fine, law = True, law, {}
        grid = math.fsum(moves) / _MOST_SUMS
        for total, weight in fine.items():
            up = math.ceil(total / grid * (1 - 1e-12)) * grid
            law[max(up, total)] = law.get(max(up, total), 0.0) + weight
    totals = sorted(law)
    return ShiftMixture(mechanism, tuple(totals), tuple(law[t] for t in totals)), rounded
