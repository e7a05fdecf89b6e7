"""The public schedule of cohorts: balanced, without duplicates, a pure function."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_lightning.accounting.cohort import cohort_schedule, participations_of


@settings(max_examples=60, deadline=None, derandomize=True)
@given(clients=st.integers(1, 23), data=st.data(), rounds=st.integers(1, 40))
def test_balanced_without_duplicates_after_every_round(clients, data, rounds):
    size = data.draw(st.integers(1, clients))
    schedule = cohort_schedule(clients, size, rounds, seed=data.draw(st.integers(0, 99)))
    assert schedule.shape == (rounds, size)
    counts = np.zeros(clients, int)
    for cohort in schedule:
        assert len(set(cohort.tolist())) == size
        counts[cohort] += 1
        assert counts.max() - counts.min() <= 1
    assert counts.sum() == rounds * size


def test_pure_function_of_its_arguments_and_longer_runs_begin_alike():
    schedule = cohort_schedule(10, 3, 20, seed=4)
    np.random.seed(1)  # noqa: NPY002 - the global generator must not matter
    assert np.array_equal(schedule, cohort_schedule(10, 3, 20, seed=4))
    assert np.array_equal(schedule[:7], cohort_schedule(10, 3, 7, seed=4))
    assert not np.array_equal(schedule, cohort_schedule(10, 3, 20, seed=5))


def test_everyone_takes_part_without_sampling():
    assert np.array_equal(cohort_schedule(4, 4, 2, seed=0), [[0, 1, 2, 3]] * 2)


@pytest.mark.parametrize("size", [0, 5, -1])
def test_impossible_cohorts_are_refused(size):
    with pytest.raises(ValueError, match=f"clients_per_round={size}"):
        cohort_schedule(4, size, 2, seed=0)


@pytest.mark.parametrize("size", [3, 20])
def test_participations_are_counted(size):
    schedule = cohort_schedule(20, size, 7, seed=1)
    counts = [int((schedule == client).sum()) for client in range(20)]
    assert participations_of(schedule, 20).tolist() == counts
    assert sum(counts) == 7 * size


def test_a_schedule_of_everyone_takes_no_memory():
    schedule = cohort_schedule(10**6, 10**6, 10**6, seed=0)
    assert schedule.shape == (10**6, 10**6)
    assert schedule[999_999][-1] == 10**6 - 1
    assert participations_of(schedule, 10**6)[5] == 10**6
