"""Partitions: every record once, minimum sizes, determinism, skew."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_lightning.data import (
    dirichlet_partition,
    iid_partition,
    natural_partition,
    quantity_partition,
    shards_partition,
)


def assert_sound(partition, num_records, num_clients, min_size):
    assert partition.indices.dtype == partition.offsets.dtype == np.int64
    assert partition.num_clients == num_clients
    assert partition.offsets[0] == 0
    assert partition.offsets[-1] == num_records
    assert partition.sizes.min() >= min_size
    np.testing.assert_array_equal(np.sort(partition.indices), np.arange(num_records))
    parts = [partition.client(k) for k in range(num_clients)]
    np.testing.assert_array_equal(np.concatenate(parts), partition.indices)


@settings(max_examples=60, deadline=None)
@given(
    num_clients=st.integers(1, 30),
    min_size=st.integers(1, 4),
    spare=st.integers(0, 50),
    num_classes=st.integers(1, 5),
    log_alpha=st.floats(-12, 6),
    seed=st.integers(0, 2**32),
)
def test_every_record_once_and_no_small_client(
    num_clients, min_size, spare, num_classes, log_alpha, seed
):
    num_records = num_clients * min_size + spare
    labels = np.arange(num_records) % num_classes
    iid = iid_partition(num_records, num_clients, seed, min_size=min_size)
    assert_sound(iid, num_records, num_clients, min_size)
    assert np.ptp(iid.sizes) <= 1
    skewed = dirichlet_partition(labels, num_clients, seed, alpha=10**log_alpha, min_size=min_size)
    assert_sound(skewed, num_records, num_clients, min_size)


def test_pure_function_of_the_arguments():
    labels = np.arange(500) % 10
    makers = [
        lambda seed, clients: iid_partition(500, clients, seed),
        lambda seed, clients: dirichlet_partition(labels, clients, seed),
    ]
    for make in makers:
        first = make(3, 7)
        np.random.seed(1)  # noqa: NPY002 (the global generator must not matter)
        again = make(3, 7)
        np.testing.assert_array_equal(first.indices, again.indices)
        np.testing.assert_array_equal(first.offsets, again.offsets)
        assert not np.array_equal(first.indices, make(4, 7).indices)


def top_class_share(partition, labels):
    """Mean over clients of the share of their commonest class."""
    counts = [np.bincount(labels[partition.client(k)]) for k in range(partition.num_clients)]
    return np.mean([count.max() / count.sum() for count in counts])


def test_alpha_sets_the_skew():
    labels = np.arange(20_000) % 10
    shares = [
        top_class_share(dirichlet_partition(labels, 20, 0, alpha=alpha), labels)
        for alpha in (0.05, 0.5, 1e4)
    ]
    assert shares[0] > shares[1] > shares[2]
    assert shares[0] > 0.5
    # 1000 records of 10 even classes: 6 standard deviations above 100 are 157.
    assert shares[2] < 0.157


def test_proportions_follow_the_dirichlet():
    # Share of one class at one client: mean 1/K, variance (1/K)(1 - 1/K)/(K*alpha + 1).
    clients, alpha, runs = 5, 0.7, 400
    labels = np.zeros(5000, np.int64)
    shares = np.concatenate(
        [dirichlet_partition(labels, clients, s, alpha=alpha).sizes / 5000 for s in range(runs)]
    )
    expected = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert shares.mean() == pytest.approx(1 / clients)
    # 2000 shares, kurtosis below 4: the relative error of the variance is 4% at most; take 5 of it.
    assert np.var(shares) == pytest.approx(expected, rel=0.2)


def test_rebalancing_takes_no_more_than_needed():
    labels = np.zeros(1000, np.int64)
    kept = dirichlet_partition(labels, 10, 0, alpha=0.05, min_size=5)
    loose = dirichlet_partition(labels, 10, 0, alpha=0.05, min_size=1)
    assert (kept.sizes == 5).any()
    assert kept.sizes.argmax() == loose.sizes.argmax()
    assert np.abs(kept.sizes - loose.sizes).sum() <= 2 * 5 * 10


def test_records_are_not_sorted_within_a_client():
    only = dirichlet_partition(np.repeat(np.arange(10), 100), 1, 0)
    assert not np.array_equal(only.indices, np.arange(1000))


def test_ten_thousand_clients_are_cheap():
    took = []
    for _ in range(5):
        start = time.process_time()
        partition = iid_partition(1_000_000, 10_000, 0)
        took.append(time.process_time() - start)
    assert partition.sizes.tolist() == [100] * 10_000
    # 0.05 s on one slow core; a loop over records or clients takes far longer than 0.25 s.
    assert min(took) < 0.25


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_clients": 0}, "num_clients=0"),
        ({"num_clients": 11}, "num_clients=11 .* need 11 records, but there are 10"),
        ({"num_clients": 4, "min_size": 3}, "need 12 records"),
        ({"min_size": 0}, "min_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha": float("inf")}, "alpha=inf"),
    ],
)
def test_refusals(kwargs, message):
    kwargs = {"num_clients": 2, **kwargs}
    with pytest.raises(ValueError, match=message):
        dirichlet_partition(np.zeros(10, np.int64), **kwargs)
    if "alpha" not in kwargs:
        with pytest.raises(ValueError, match=message):
            iid_partition(10, **kwargs)


def test_refuses_odd_labels_and_missing_clients():
    with pytest.raises(ValueError, match="float64"):
        dirichlet_partition(np.zeros(10), 2)
    with pytest.raises(ValueError, match="num_records=0"):
        iid_partition(0, 1)
    with pytest.raises(ValueError, match="k=2"):
        iid_partition(10, 2).client(2)


# --- shards, quantity, natural ---


def test_shards_give_few_labels_a_client() -> None:
    labels = np.repeat(np.arange(10), 60)
    split = shards_partition(labels, 10, 3, shards_per_client=2)
    assert sorted(split.indices) == list(range(600))
    assert split.sizes.tolist() == [60] * 10
    kinds = [len(np.unique(labels[split.client(k)])) for k in range(10)]
    # 20 shards of 30 records from classes of 60: a shard has one label.
    assert max(kinds) == 2
    assert len({tuple(split.client(k)) for k in range(10)}) == 10
    again = shards_partition(labels, 10, 4, shards_per_client=2)
    assert not np.array_equal(split.indices, again.indices)


def test_shards_are_refused_when_too_small() -> None:
    with pytest.raises(ValueError, match="shards_per_client=0"):
        shards_partition([0, 1, 2, 3], 2, shards_per_client=0)
    with pytest.raises(ValueError, match="6 shards of 4 records give some client 0"):
        shards_partition([0, 1, 2, 3], 2, shards_per_client=3)
    with pytest.raises(ValueError, match="some client 4, fewer than 5"):
        shards_partition(np.zeros(17, int), 3, shards_per_client=2, min_size=5)


def test_quantity_skews_sizes_only() -> None:
    split = quantity_partition(5000, 20, 1, alpha=0.3, min_size=5)
    assert sorted(split.indices) == list(range(5000))
    assert split.sizes.min() >= 5
    assert split.sizes.max() > 4 * np.median(split.sizes)
    even = quantity_partition(5000, 20, 1, alpha=1e4, min_size=5)
    assert even.sizes.max() < 1.5 * even.sizes.min()
    with pytest.raises(ValueError, match="alpha=0"):
        quantity_partition(10, 2, alpha=0)


def test_natural_keeps_the_largest_owners_in_order() -> None:
    owners = np.array([3] * 5 + [0] * 2 + [7] * 9 + [1] * 5)
    split = natural_partition(owners, 3, 2, min_size=3)
    assert [set(owners[split.client(k)]) for k in range(3)] == [{1}, {3}, {7}]
    assert split.sizes.tolist() == [5, 5, 9]
    assert len(set(split.indices)) == 19
    with pytest.raises(ValueError, match="num_clients=4 must be at most 3: of 4 owners"):
        natural_partition(owners, 4, min_size=3)
