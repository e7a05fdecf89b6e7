"""Who holds which record: pure functions of (labels, owners or their number, clients, seed)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_HELD_OUT_STREAM = 2


@dataclass(frozen=True, eq=False)
class Partition:
    """Client k holds records `indices[offsets[k]:offsets[k + 1]]`.

    Args:
        indices: int64 [n], every record at most once; the order within a client is random.
        offsets: int64 [K + 1], from 0 to n.
    """

    indices: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @property
    def num_clients(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> NDArray[np.int64]:
        """int64 [K], records a client."""
        return np.diff(self.offsets)

    def client(self, k: int) -> NDArray[np.int64]:
        """int64 [n_k], the records of client k (a view)."""
        if not 0 <= k < self.num_clients:
            raise ValueError(f"k={k} must lie in [0, num_clients={self.num_clients})")
        return self.indices[self.offsets[k] : self.offsets[k + 1]]


def held_out_partition(
    partition: Partition,
    seed: int,
    *,
    labels: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    owners: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    count: int,
) -> Partition:
    """Which held-out records are whose: clients hold out records like those that they train on.

    Args:
        partition: of the training records; every client has some.
        seed: >= 0.
        labels: classes of training and held-out records; None: they have none.
        owners: of training and held-out records in the data itself; None: it states none.
        count: held-out records M.

    Returns:
        A partition of M records. With owners, each record is its owner's, and nobody's where the
        owner is no client. Else it goes to the holder of a random training record of its class (of
        any class, where there is none).
    """
    clients = np.arange(partition.num_clients)
    of = np.full(count, -1)
    if owners is not None:
        names = owners[0][partition.indices[partition.offsets[:-1]]]
        for client, name in zip(clients, names, strict=True):
            of[owners[1] == name] = client
    else:
        generator = np.random.default_rng([seed, _HELD_OUT_STREAM])
        holder = np.repeat(clients, partition.sizes)
        of = generator.choice(holder, size=count)
        for label in np.unique(labels[1]) if labels is not None else ():
            assert labels is not None
            alike = holder[labels[0][partition.indices] == label]
            wanted = labels[1] == label
            if len(alike):
                of[wanted] = generator.choice(alike, size=int(wanted.sum()))
    order = np.argsort(of, kind="stable")
    sizes = np.bincount(of[of >= 0], minlength=len(clients))
    return Partition(order[np.count_nonzero(of < 0) :], _offsets(sizes))


def iid_partition(
    num_records: int, num_clients: int, seed: int = 0, *, min_size: int = 1
) -> Partition:
    """A random permutation cut into parts whose sizes differ by at most one.

    Args:
        num_records: N >= 1.
        num_clients: K >= 1.
        seed: >= 0; the same arguments give the same partition.
        min_size: records every client must get, >= 1.

    Raises:
        ValueError: an argument out of range, or num_clients * min_size > num_records.
    """
    _check(num_records, num_clients, seed, min_size)
    indices = np.random.default_rng(seed).permutation(num_records)
    sizes = np.full(num_clients, num_records // num_clients)
    sizes[: num_records % num_clients] += 1
    return Partition(indices, _offsets(sizes))


def dirichlet_partition(
    labels: ArrayLike, num_clients: int, seed: int = 0, *, alpha: float = 0.5, min_size: int = 1
) -> Partition:
    """Label skew: each class is dealt over the clients with proportions from Dirichlet(alpha).

    Class sizes a client are multinomial in these proportions. Clients left with fewer than
    `min_size` records then get random records, one at a time, from whichever client is the largest.

    Args:
        labels: integers [N], one a record.
        num_clients: K >= 1.
        seed: >= 0; the same arguments give the same partition.
        alpha: concentration > 0; towards 0 a class sits at one client, large is close to IID.
        min_size: records every client must get, >= 1.

    Raises:
        ValueError: an argument out of range, or num_clients * min_size > N.

    Reference:
        Hsu, Qi, Brown, 2019, arXiv:1909.06335 (there proportions over classes for each client;
        here over clients for each class, as Yurochkin et al., 2019, arXiv:1905.12022).
    """
    labels = _integers(labels)
    _check_alpha(alpha)
    _check(len(labels), num_clients, seed, min_size)
    rng = np.random.default_rng(seed)
    owner = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_clients, alpha))
        owner[members] = np.repeat(np.arange(num_clients), rng.multinomial(len(members), shares))
    shuffled = rng.permutation(len(labels))
    dealt = _by_owner(shuffled, owner, num_clients)
    if dealt.sizes.min() < min_size:
        _rebalance(owner, dealt, min_size)
        dealt = _by_owner(shuffled, owner, num_clients)
    return dealt


def shards_partition(
    labels: ArrayLike,
    num_clients: int,
    seed: int = 0,
    *,
    shards_per_client: int = 2,
    min_size: int = 1,
) -> Partition:
    """Records sorted by label, cut into equal shards that are dealt at random.

    Args:
        labels: integers [N], one a record.
        num_clients: K >= 1.
        seed: >= 0; the same arguments give the same partition.
        shards_per_client: >= 1; a client has at most about this many labels.
        min_size: records every client must get, >= 1.

    Raises:
        ValueError: an argument out of range, more shards than records, or shards too small for
            min_size.

    Reference:
        McMahan et al., 2017, arXiv:1602.05629 (their pathological non-IID partition).
    """
    labels = _integers(labels)
    if shards_per_client < 1:
        raise ValueError(f"shards_per_client={shards_per_client} must be >= 1")
    _check(len(labels), num_clients, seed, min_size)
    count = num_clients * shards_per_client
    smallest = shards_per_client * (len(labels) // count)
    if smallest < max(min_size, shards_per_client):
        raise ValueError(
            f"shards_per_client={shards_per_client}: {count} shards of {len(labels)} records give "
            f"some client {smallest}, fewer than {max(min_size, shards_per_client)}"
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    shard = np.repeat(np.arange(count), np.diff(np.linspace(0, len(labels), count + 1).astype(int)))
    owner = np.empty(len(labels), np.int64)
    owner[order] = (rng.permutation(count) // shards_per_client)[shard]
    return _by_owner(rng.permutation(len(labels)), owner, num_clients)


def quantity_partition(
    num_records: int, num_clients: int, seed: int = 0, *, alpha: float = 0.5, min_size: int = 1
) -> Partition:
    """Quantity skew: sizes are multinomial with proportions from Dirichlet(alpha), labels IID.

    Args:
        num_records: N >= 1.
        num_clients: K >= 1.
        seed: >= 0; the same arguments give the same partition.
        alpha: concentration > 0; towards 0 one client has nearly everything.
        min_size: records every client gets before the rest is dealt, >= 1.

    Raises:
        ValueError: an argument out of range, or num_clients * min_size > num_records.

    Reference:
        Li, Diao, Chen, He, 2022, arXiv:2102.02079 (quantity skew).
    """
    _check_alpha(alpha)
    _check(num_records, num_clients, seed, min_size)
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(num_clients, alpha))
    sizes = min_size + rng.multinomial(num_records - num_clients * min_size, shares)
    return Partition(rng.permutation(num_records), _offsets(sizes))


def natural_partition(
    owners: ArrayLike, num_clients: int, seed: int = 0, *, min_size: int = 1
) -> Partition:
    """The data's own clients: the `num_clients` owners with most records, in order of their ids.

    Args:
        owners: integers [N], who each record belongs to.
        num_clients: K >= 1.
        seed: >= 0; of the order within a client.
        min_size: records that an owner must have to become a client, >= 1.

    Returns:
        Records of owners that are left out are in no client.

    Raises:
        ValueError: an argument out of range, or fewer than K owners with min_size records; says how
            many there are.
    """
    owners = _integers(owners, "owners")
    _check(len(owners), num_clients, seed, 1)
    if min_size < 1:
        raise ValueError(f"min_size={min_size} must be >= 1: no client may be empty")
    ids, counts = np.unique(owners, return_counts=True)
    enough = int((counts >= min_size).sum())
    if num_clients > enough:
        raise ValueError(
            f"num_clients={num_clients} must be at most {enough}: of {len(ids)} owners so many "
            f"have at least {min_size} records"
        )
    largest = np.sort(ids[np.argsort(-counts, kind="stable")[:num_clients]])
    order = np.random.default_rng(seed).permutation(len(owners))
    order = order[np.isin(owners[order], largest)]
    rank = np.searchsorted(largest, owners[order])
    sizes = np.bincount(rank, minlength=num_clients)
    return Partition(order[np.argsort(rank, kind="stable")], _offsets(sizes))


def _integers(values: ArrayLike, name: str = "labels") -> NDArray[np.integer]:
    array = np.asarray(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integers [N], got {array.dtype} {array.shape}")
    return array


def _check_alpha(alpha: float) -> None:
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha={alpha} must be finite and > 0")


def _by_owner(order: NDArray[np.int64], owner: NDArray[np.int64], num_clients: int) -> Partition:
    indices = order[np.argsort(owner[order], kind="stable")]
    return Partition(indices, _offsets(np.bincount(owner, minlength=num_clients)))


def _rebalance(owner: NDArray[np.int64], dealt: Partition, min_size: int) -> None:
    """Give records of the largest clients to those below min_size, in place.

    While a client is short and K * min_size <= N, the largest holds more than min_size: it
    never becomes short itself.
    """
    sizes = dealt.sizes
    receivers = np.repeat(np.arange(len(sizes)), np.maximum(min_size - sizes, 0))
    for receiver in receivers:
        donor = int(sizes.argmax())
        sizes[donor] -= 1
        sizes[receiver] += 1
        owner[dealt.indices[dealt.offsets[donor] + sizes[donor]]] = receiver


def _offsets(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)


def _check(num_records: int, num_clients: int, seed: int, min_size: int) -> None:
    if num_records < 1:
        raise ValueError(f"num_records={num_records} must be >= 1")
    if num_clients < 1:
        raise ValueError(f"num_clients={num_clients} must be >= 1")
    if seed < 0:
        raise ValueError(f"seed={seed} must be >= 0")
    if min_size < 1:
        raise ValueError(f"min_size={min_size} must be >= 1: no client may be empty")
    if num_clients * min_size > num_records:
        raise ValueError(
            f"num_clients={num_clients} with at least {min_size} records each need "
            f"{num_clients * min_size} records, but there are {num_records}"
        )
