"""Every client's account: which noised steps a ledger charges it with, and the ε they come to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from typing import Any

import numpy as np

from fl_lightning.accounting.composition import compose_epsilon
from fl_lightning.accounting.correlated import moves, whole_run
from fl_lightning.accounting.evaluation import evaluation_cost
from fl_lightning.accounting.sum_costs import client_multipliers, extra_of, num_clients, of_client
from fl_lightning.values.event import NoiseEvent
from fl_lightning.values.release import ALL_CLIENTS, Release


@dataclass(frozen=True, slots=True)
class Charge:
    """What one release costs one client: its event in each step, and what comes on top of all."""

    event: NoiseEvent
    steps: int
    epsilon: float
    delta: float
    guarantee: bool


@dataclass(slots=True)
class Account:
    """One client's charges, each with how often it was made; in the order of their first lines.

    Where rounds share noise there is one charge for the whole run: then `rounds` says in how many
    the client took part, and `largest` how far it moves the one that it moves most.

    `held_out` is what evaluations cost a record that was held out for them, where a record is the
    unit: no record is charged with both. Where a client is the unit they are among its charges.
    """

    delta: float
    charges: dict[Charge, int] = field(default_factory=dict)
    held_out: dict[Charge, int] = field(default_factory=dict)
    rounds: int | None = None
    largest: float | None = None

    @property
    def releases(self) -> int:
        made = sum(self.charges.values()) if self.rounds is None else self.rounds
        return made + sum(self.held_out.values())

    @property
    def steps(self) -> int:
        """Noised steps of these releases."""
        return sum(self.counts().values()) if self.rounds is None else self.rounds

    def counts(self) -> dict[NoiseEvent, int]:
        """How often each event happened."""
        counts: Counter[NoiseEvent] = Counter()
        for charge, times in self.charges.items():
            counts[charge.event] += times * charge.steps
        return dict(counts)

    def on_top(self) -> tuple[float, float]:
        """Epsilon and delta beyond the events, correctly rounded sums over all releases."""
        return _sum_over(self.charges, "epsilon"), _sum_over(self.charges, "delta")

    def epsilon(self) -> float:
        """By PLD, what comes on top included; 0 without releases."""
        if self.held_out:
            return max(one.epsilon() for one in self.units())
        if not self.charges:
            return 0.0
        inflation, tails = self.on_top()
        left = self.delta - tails
        return compose_epsilon(self.counts(), left) + inflation if left >= 0 else math.inf

    def units(self) -> list[Account]:
        """An account for each kind of unit: of which no unit is in two."""
        alone = Account(self.delta, self.charges, rounds=self.rounds, largest=self.largest)
        held = [Account(self.delta, self.held_out)] if self.held_out else []
        return [alone, *held] if self.charges or not held else held


def _sum_over(charges: Mapping[Charge, int], name: str) -> float:
    if len(charges) == 1:
        ((charge, times),) = charges.items()
        return times * getattr(charge, name)
    values = (repeat(getattr(charge, name), times) for charge, times in charges.items())
    return math.fsum(chain.from_iterable(values))


def accounts(header: Mapping[str, Any], releases: Iterable[Release]) -> dict[int, Account]:
    """Every client's account; clients that the header lists and that released nothing included.

    Raises:
        ValueError: the header does not fit the lines.
    """
    if header.get("coefficients") is not None:
        return _of_whole_run(header, list(releases))
    found = {client: _empty(header, client) for client in range(num_clients(header))}
    # Of each kind of sum: by the clients that could be in it, how often and since which line.
    sums: dict[tuple[Any, ...], tuple[Release, dict[str | None, list[int]]]] = {}
    first: dict[tuple[int, Charge], int] = {}
    known: dict[tuple[Any, ...], Charge] = {}  # most lines cost what others do
    evaluations = []
    for line, release in enumerate(releases):
        if release.evaluation:
            evaluations.append(release)
            continue
        if release.client == ALL_CLIENTS:
            _, sets = sums.setdefault(_kind(release), (release, {}))
            sets.setdefault(release.clients, [0, line])[0] += 1
            continue
        charge = _charge_of(release, known)
        own = found.setdefault(release.client, _empty(header, release.client)).charges
        if sums:
            first.setdefault((release.client, charge), line)
        own[charge] = own.get(charge, 0) + 1
    for release, sets in sums.values():
        for client, charge, times, line in _of_sums(header, release, sets):
            own = found[client].charges
            first[client, charge] = min(line, first.get((client, charge), line))
            own[charge] = own.get(charge, 0) + times
    if sums:
        for client, account in found.items():
            ordered = sorted(account.charges, key=lambda c, k=client: first.get((k, c), -1))
            account.charges = {charge: account.charges[charge] for charge in ordered}
    _add_evaluations(header, found, evaluations)
    return found


def _charge_of(release: Release, known: dict[tuple[Any, ...], Charge]) -> Charge:
    """What a release of one client costs it; equal costs are one object, kept in `known`."""
    beyond = release.steps, release.epsilon_inflation, release.tail_delta, release.guarantee
    noise = release.mechanism, release.noise_multiplier, release.sampling_rate, release.adjacency
    charge = known.get((noise, beyond))
    if charge is None:
        charge = known[noise, beyond] = Charge(release.event, *beyond)
    return charge


def _add_evaluations(
    header: Mapping[str, Any], found: dict[int, Account], releases: Sequence[Release]
) -> None:
    """Charge each client with its evaluations, by its own noise multiplier."""
    everyone, form = num_clients(header), header.get("noise_form", "wide")
    for release in releases:
        ids = release.members(everyone)
        for client, z in zip(
            ids.tolist(), client_multipliers(header, release).tolist(), strict=True
        ):
            event = replace(release.event, noise_multiplier=z)
            account = found.setdefault(client, _empty(header, client))
            cost = evaluation_cost(event, form, account.delta)
            charge = Charge(event, 1, cost.epsilon, cost.delta, release.guarantee)
            apart = header["evaluation"]["apart"]
            own = account.held_out if apart else account.charges
            own[charge] = own.get(charge, 0) + 1


def _empty(header: Mapping[str, Any], client: int) -> Account:
    delta = of_client(header["delta"], client)
    return Account(math.nan if delta is None else delta)


def _of_whole_run(header: Mapping[str, Any], releases: Sequence[Release]) -> dict[int, Account]:
    """One charge a client, for all planned rounds at once, by the rounds that it took part in."""
    everyone, horizon = num_clients(header), int(header["horizon"])
    found = {client: _empty(header, client) for client in range(everyone)}
    if not releases:
        return found
    ids = [release.members(everyone) for release in releases]
    with np.errstate(divide="ignore"):
        sizes = [1 / client_multipliers(header, release) for release in releases]
    clients = np.concatenate(ids)
    moved = moves(
        header["coefficients"],
        horizon,
        count=everyone,
        clients=clients,
        rounds=np.repeat([r.round for r in releases], [len(who) for who in ids]),
        sizes=np.concatenate(sizes),
    )
    extra = extra_of(header, votes=any(r.vote_noise_scale is not None for r in releases))
    guarantee = all(release.guarantee for release in releases)
    for client, times in enumerate(np.bincount(clients, minlength=everyone).tolist()):
        if not times:
            continue
        account, largest = found[client], float(moved.largest[client])
        delta = 0.0 if math.isnan(account.delta) else account.delta
        event, cost = whole_run(
            releases[0].event,
            float(moved.whole[client]),
            largest,
            horizon,
            lambda event, delta=delta: extra(event, delta),
        )
        account.charges[Charge(event, 1, cost.epsilon, cost.delta, guarantee)] = 1
        account.rounds, account.largest = times, largest
    return found


def _kind(release: Release) -> tuple[Any, ...]:
    """The facts of a sum that decide its cost: sums with equal facts cost a client the same."""
    stated = None if release.is_sum else (release.epsilon_inflation, release.tail_delta)
    votes = release.vote_noise_scale is not None
    return release.event, release.steps, release.largest_weight, votes, release.guarantee, stated


def _of_sums(
    header: Mapping[str, Any], release: Release, sets: Mapping[str | None, Sequence[int]]
) -> Iterable[tuple[int, Charge, int, int]]:
    """The cost of sums of one kind for each client: (client, charge, how often, first line)."""
    everyone = num_clients(header)
    times = np.zeros(everyone, dtype=np.int64)
    first = np.full(everyone, np.iinfo(np.int64).max)
    for text, (count, line) in sets.items():
        ids = release.members_of(text, everyone)
        times[ids] += count
        first[ids] = np.minimum(first[ids], line)
    ids = np.flatnonzero(times)
    multipliers = client_multipliers(header, release, ids).tolist()
    own_extra = release.is_sum
    extra = extra_of(header, votes=release.vote_noise_scale is not None) if own_extra else None
    stated = (release.epsilon_inflation, release.tail_delta)
    known: dict[tuple[float, float | None], Charge] = {}
    for client, multiplier in zip(ids.tolist(), multipliers, strict=True):
        delta = of_client(header["delta"], client) if own_extra else None
        charge = known.get((multiplier, delta))
        if charge is None:
            event = NoiseEvent(
                release.mechanism, multiplier, release.sampling_rate, release.adjacency
            )
            if extra is not None:
                cost = extra(event, delta or 0.0)
                stated = release.steps * cost.epsilon, release.steps * cost.delta
            charge = Charge(event, release.steps, *stated, release.guarantee)
            known[multiplier, delta] = charge
        yield client, charge, int(times[client]), int(first[client])


def largest_epsilon(found: Mapping[int, Account]) -> float:
    """The largest ε over the clients; of accounts that another one outdoes none is computed."""
    units = [unit for account in found.values() for unit in account.units()]
    different = {(account.delta, *account.charges.items()): account for account in units}
    hard: list[tuple[tuple[Any, ...], tuple[float, ...]]] = []
    largest = 0.0
    for account in sorted(different.values(), key=_strictness):
        kind, harm = _harm(account)
        if kind and any(k == kind and _at_least(h, harm) for k, h in hard):
            continue
        hard.append((kind, harm))
        largest = max(largest, account.epsilon())
    return largest


def _strictness(account: Account) -> float:
    return min((charge.event.noise_multiplier for charge in account.charges), default=math.inf)


def _harm(account: Account) -> tuple[tuple[Any, ...], tuple[float, ...]]:
    """(kind, measures): among accounts of one kind, no less in every measure is no less ε."""
    counts = account.counts()
    if len(counts) != 1:
        return (), ()
    ((event, steps),) = counts.items()
    kind = event.mechanism, event.sampling_rate, event.adjacency
    return kind, (-event.noise_multiplier, steps, -account.delta, *account.on_top())


def _at_least(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True))
