"""A run whose rounds share noise, as one Gaussian mechanism for every client.

Round t releases, in units of its noise, y_t = x_t + sum_j d_j z_{t-j}: j < p, d_0 = 1, z_t standard
Gaussian and fresh in every round. What a client contributes to x_t has a norm of at most a_t, which
is 1 / (its noise multiplier in that round), weights and votes included; a_t = 0 where it takes no
part. Clip norms, shares and whatever else x_t depends on may follow from earlier releases.

Two neighbours that give the same y_0 ... y_{t-1} have drawn different noise: let V_t be by how much
z_t differs. y_t is the same for both where V_t = (difference of x_t) - sum_{j>0} d_j V_{t-j}. So,
with d_j <= 0 for j > 0, |V_t| <= v_t for v_t = a_t + sum_{j>0} |d_j| v_{t-j}, which is v = C a with
the inverse C of D. Given the past, y_t is a Gaussian that moves by |V_t| <= v_t, whatever the past
is; a sequence of Gaussians whose moves have squares that add up to at most m² in every course of
events is as private as one Gaussian of multiplier 1/m (Smith and Thakurta 2022, arXiv:2210.17520).
So the run costs a client what one Gaussian of multiplier 1 / |C a| costs. Three things follow:

- v_t > 0 in rounds after the client's last. All planned rounds count, or a run that goes on would
  show more than was charged; and no round may follow the planned ones.
- To leave out some of the |d_j| makes no v_t larger. So a round that is given up costs nothing,
  and later rounds need not take back noise that was never released: they leave it out, and the
  others keep their places.
- To take part less often than planned, or with less weight, makes no v_t larger.

A second release of a round would be another x with its own a: it is refused.

What inexact noise costs (`exactness`) is derived step by step given the past, with the move of the
step. So each planned round costs a client what a Gaussian of multiplier 1 / max v_t does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from aadp_kernels import factorization
from fl_lightning.accounting.exactness import SamplerCost, calibrate_charged
from fl_lightning.values.event import NoiseEvent

# Rounding of a few thousand sums: moves are stated larger by this, multipliers once more.
_ROUNDING = 1 + 1e-9
_ENTRIES_AT_ONCE = 1 << 22
_CLIENTS_TO_CHOOSE_BY = 1000

Floats = npt.NDArray[np.float64]
Cost = Callable[[NoiseEvent], SamplerCost]


def check_coefficients(coefficients: Sequence[float]) -> tuple[float, ...]:
    """Coefficients of a run, if the proof is one for them.

    Raises:
        ValueError: they do not begin with 1, a later one is above 0, or they are not finite.
    """
    found = tuple(float(d) for d in coefficients)
    if not found or found[0] != 1 or not all(math.isfinite(d) and d <= 0 for d in found[1:]):
        raise ValueError(f"coefficients must be 1, then finite numbers of at most 0, got {found}")
    return found


@dataclass(frozen=True)
class Moves:
    """How far clients move the noise of a whole run. Public.

    Args:
        whole: L2 norm over all planned rounds, |C a|; float64 [n].
        largest: that of the round in which it is largest, max v_t; float64 [n].
    """

    whole: Floats
    largest: Floats


def moves(
    coefficients: Sequence[float],
    horizon: int,
    *,
    count: int,
    clients: npt.NDArray[np.int64],
    rounds: npt.NDArray[np.int64],
    sizes: Floats | None = None,
) -> Moves:
    """How far each of some clients moves the noise, all planned rounds together.

    Args:
        coefficients: d_0 = 1, d_1, ... as `check_coefficients` wants them.
        horizon: planned rounds T.
        count: how many clients there are.
        clients, rounds: each participation, by a client in [0, count) and a round in [0, T) [n].
        sizes: the norm a of each participation, in noise scales [n]; None: 1.

    Raises:
        ValueError: a round beyond the plan, a client that there is not.
    """
    d = check_coefficients(coefficients)
    if len(rounds) and not (rounds.min() >= 0 and rounds.max() < horizon):
        raise ValueError(f"round {rounds.max()} is not one of the {horizon} planned rounds")
    if len(clients) and not (clients.min() >= 0 and clients.max() < count):
        raise ValueError(f"client {clients.max()} is not one of {count} clients")
    order = np.argsort(clients, kind="stable")
    clients, rounds = clients[order], rounds[order]
    sizes = np.ones(len(clients)) if sizes is None else sizes[order]
    whole, largest = np.zeros(count), np.zeros(count)
    at_once = max(1, _ENTRIES_AT_ONCE // horizon)
    for start in range(0, count, at_once):
        end = min(start + at_once, count)
        mine = slice(*np.searchsorted(clients, [start, end]))
        v = np.zeros((horizon, end - start))
        np.add.at(v, (rounds[mine], clients[mine] - start), sizes[mine])
        for t in range(1, horizon):
            for j in range(1, min(len(d), t + 1)):
                v[t] -= d[j] * v[t - j]
        whole[start:end] = np.sqrt((v**2).sum(0)) * _ROUNDING
        largest[start:end] = v.max(0) * _ROUNDING
    return Moves(whole, largest)


@dataclass(frozen=True)
class CorrelatedPlan:
    """What a run with correlated noise is planned to be. Public, and fixed before round 0.

    Args:
        coefficients: d_0 = 1, d_1, ... of the noise.
        horizon: planned rounds.
        sizes_of_one: how far each client moves the noise if it takes part as planned, in units of
            what it moves a single round by.
    """

    coefficients: tuple[float, ...]
    horizon: int
    sizes_of_one: Moves

    @classmethod
    def of(
        cls, coefficients: Sequence[float], schedule: npt.NDArray[np.int64], num_clients: int
    ) -> CorrelatedPlan:
        """The plan for a public schedule of cohorts, int64 [rounds, m]."""
        found = check_coefficients(coefficients)
        return cls(found, len(schedule), _planned(found, schedule, num_clients))

    def terms(self, round: int, released: Callable[[int], bool]) -> list[tuple[int, float]]:
        """Which earlier rounds' noise a round takes back, and by which coefficients.

        Args:
            round: of the run.
            released: whether a round before it was released.
        """
        back = enumerate(self.coefficients[1 : round + 1], 1)
        return [(round - j, d) for j, d in back if released(round - j)]


def _planned(
    coefficients: Sequence[float],
    schedule: npt.NDArray[np.int64],
    num_clients: int,
    first: int | None = None,
) -> Moves:
    """Moves of all clients, or of the first ones, that take part as planned."""
    horizon, size = schedule.shape
    if size == num_clients:  # all are alike, and rounds times clients would be gigabytes
        one = np.zeros(horizon, dtype=np.int64)
        alike = moves(coefficients, horizon, count=1, clients=one, rounds=np.arange(horizon))
        return Moves(alike.whole.repeat(num_clients), alike.largest.repeat(num_clients))
    count = min(num_clients, first or num_clients)
    clients, rounds = schedule.ravel(), np.repeat(np.arange(horizon), size)
    there = clients < count
    return moves(coefficients, horizon, count=count, clients=clients[there], rounds=rounds[there])


def best_for(
    bands: int, last_model: Floats, schedule: npt.NDArray[np.int64], num_clients: int
) -> tuple[float, ...]:
    """The coefficients that leave least noise in the last model, from public facts alone.

    Args:
        bands: p >= 1.
        last_model: what each release is multiplied by in the last model [1, rounds].
        schedule: clients of every round, int64 [rounds, m].
        num_clients: clients of the population.

    Returns:
        Those with the least product of noise and the largest move of a client (of the first 1,000
        clients, in a large population); 1 alone, independent noise, where none is better.
    """

    def largest(coefficients: Sequence[float]) -> float:
        few = None if schedule.shape[1] == num_clients else _CLIENTS_TO_CHOOSE_BY
        return float(_planned(coefficients, schedule, num_clients, few).whole.max())

    return factorization.best_coefficients(bands, last_model, largest)


def whole_run(
    event: NoiseEvent, whole: float, largest: float, horizon: int, cost: Cost
) -> tuple[NoiseEvent, SamplerCost]:
    """What a run costs a client: one event, and what inexact noise adds.

    Args:
        event: of a round, for mechanism and adjacency.
        whole, largest: see `Moves`, above 0.
        horizon: planned rounds.
        cost: what a step costs beyond its event.

    Returns:
        (event of the run, `SamplerCost` of all rounds).
    """
    one = cost(replace(event, noise_multiplier=1 / largest))
    extra = SamplerCost(horizon * one.epsilon, horizon * one.delta)
    return replace(event, noise_multiplier=1 / whole), extra


def least_multiplier(
    event: NoiseEvent,
    plan: CorrelatedPlan,
    members: Sequence[int],
    *,
    epsilon: float,
    delta: float,
    cost: Cost,
) -> float:
    """The noise multiplier of a round with which none of some clients passes its target.

    Args:
        event: of a round, for mechanism and adjacency.
        plan: of the run.
        members: clients of this target.
        epsilon, delta: the target.
        cost: what a step costs beyond its event; never more for a larger multiplier.

    Raises:
        ValueError: inexact noise alone costs more than the target.
    """
    whole = max(float(plan.sizes_of_one.whole[members].max()), 1.0)
    largest = max(float(plan.sizes_of_one.largest[members].max()), 1.0)

    def extra(run: NoiseEvent) -> SamplerCost:
        z = run.noise_multiplier * whole
        return whole_run(event, whole / z, largest / z, plan.horizon, cost)[1]

    run = replace(event, noise_multiplier=1.0)
    return calibrate_charged(run, 1, epsilon, delta, extra) * whole * _ROUNDING
