"""Who takes part in which round: a public, balanced schedule."""

from __future__ import annotations

import numpy as np


def cohort_schedule(
    num_clients: int, cohort_size: int, rounds: int, seed: int, *, one_order: bool = False
) -> np.ndarray:
    """Clients of every round, int64 [rounds, cohort_size].

    The population is dealt out in seeded permutations, one after another, so that numbers of
    participations differ by at most one and a noise multiplier can be calibrated to them exactly.
    No client stands twice in a cohort. The schedule is public: it amplifies nothing.

    Args:
        num_clients: clients of the population, K ≥ 1.
        cohort_size: clients a round, 1 ≤ m ≤ K.
        rounds: planned rounds.
        seed: public seed.
        one_order: whether all passes deal in the order of the first, so that clients come back
            after equally many rounds (up to one): what noise that rounds share wants.

    Raises:
        ValueError: if the cohort is empty or larger than the population.
    """
    if not 1 <= cohort_size <= num_clients:
        raise ValueError(
            f"clients_per_round={cohort_size} must be between 1 and the population of "
            f"{num_clients} clients"
        )
    if cohort_size == num_clients:
        # One row that stands for all: rounds times clients would be gigabytes.
        return np.broadcast_to(np.arange(num_clients), (rounds, num_clients))
    dealt = np.empty(0, dtype=np.int64)
    passes = 0
    while len(dealt) < rounds * cohort_size:
        order = np.random.default_rng([seed, 0 if one_order else passes]).permutation(num_clients)
        begun = len(dealt) % cohort_size
        if begun:
            # Those already in the cohort that this pass completes wait until its end.
            waiting = np.isin(order, dealt[-begun:])
            order = np.concatenate([order[~waiting], order[waiting]])
        dealt = np.concatenate([dealt, order])
        passes += 1
    return np.sort(dealt[: rounds * cohort_size].reshape(rounds, cohort_size), axis=1)


def participations_of(schedule: np.ndarray, num_clients: int) -> np.ndarray:
    """How often each client is on a schedule, int64 [num_clients]."""
    if schedule.shape[1] == num_clients:
        return np.full(num_clients, len(schedule))
    return np.bincount(schedule.ravel(), minlength=num_clients)
