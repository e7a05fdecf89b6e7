"""What a ledger line costs the clients that it is charged to, from the facts in the header.

A line of a sum holds what is common to its clients. A client's own noise multiplier follows from
the header's weights and calibrated multipliers by the formulas that weighted the sum
(`privacy.weights`), to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fl_lightning.privacy.weights import event_multiplier, weights_within
from fl_lightning.values.event import NoiseEvent
from fl_lightning.values.release import ALL_CLIENTS, Release

if TYPE_CHECKING:
    from fl_lightning.accounting.exactness import SamplerCost

# What a header must state for lines of sums.
SUM_FACTS = ("weights", "noise_multiplier", "vote_share", "client_sizes", "noise_form", "dims")


def num_clients(header: Mapping[str, Any]) -> int:
    """Clients of the population as far as the header lists them."""
    lists = (header.get(name) for name in ("client_sizes", "delta", "epsilon"))
    return max((len(value) for value in lists if isinstance(value, list)), default=0)


def of_client(value: Any, client: int) -> float | None:
    """A header's per-client number: one for all, or a list."""
    if isinstance(value, list):
        value = value[client] if client < len(value) else None
    return None if value is None else float(value)


def of_clients(header: Mapping[str, Any], name: str) -> np.ndarray:
    """A header's per-client number of every client, float64 [K]."""
    value, count = header[name], num_clients(header)
    if isinstance(value, list) and len(value) != count:
        raise ValueError(f"{name} has {len(value)} numbers for {count} clients")
    return np.broadcast_to(np.array(value, dtype=np.float64), (count,))


def client_multipliers(
    header: Mapping[str, Any], release: Release, clients: np.ndarray | None = None
) -> np.ndarray:
    """The noise multiplier that a line means for each client that it is charged to.

    Args:
        header: facts of the run.
        release: a line of its ledger.
        clients: ids, ascending, of clients that it, or another sum that it stands for, is charged
            to [n]; None: all of its own.

    Returns:
        float64 [n].

    Raises:
        ValueError: the header does not fit the line.
    """
    ids = release.members(num_clients(header)) if clients is None else clients
    if release.evaluation and release.client == ALL_CLIENTS:
        return evaluation_multipliers(header)[ids]
    if not release.is_sum:
        return np.full(len(ids), release.noise_multiplier)
    assert release.largest_weight is not None
    if ids[-1] >= num_clients(header):
        raise ValueError(f"client {ids[-1]} is not among the {num_clients(header)} clients")
    base, calibrated = (of_clients(header, name)[ids] for name in ("weights", "noise_multiplier"))
    rules = {"mechanism": release.mechanism, "vote_share": float(header["vote_share"])}
    z = release.noise_multiplier
    weights = weights_within(base, calibrated, z=z, largest=release.largest_weight, **rules)
    return event_multiplier(weights, z, **rules)


def evaluation_multipliers(header: Mapping[str, Any]) -> np.ndarray:
    """Each client's own noise multiplier of a private evaluation, float64 [K]."""
    value = header["evaluation"]["noise_multiplier"]
    return np.broadcast_to(np.array(value, dtype=np.float64), (num_clients(header),))


def extra_of(
    header: Mapping[str, Any], *, votes: bool
) -> Callable[[NoiseEvent, float], SamplerCost]:
    """What a noised step costs beyond its event, by the header's form of noise and layers.

    Args:
        header: facts of the run, with `noise_form` and `dims`.
        votes: whether votes are released with the layers.

    Returns:
        A function of the event and the client's delta.
    """
    from fl_lightning.accounting.exactness import inexact_noise, noise_streams

    streams = noise_streams(header["dims"], votes=votes)
    noise_parts = header["min_survivors"] if header["setting"] == "client+secure_sum" else None
    form = header["noise_form"]

    def extra(event: NoiseEvent, delta: float) -> SamplerCost:
        return inexact_noise(event, form, streams=streams, delta=delta, noise_parts=noise_parts)

    return extra


def largest_extra(
    event: NoiseEvent,
    multipliers: np.ndarray,
    deltas: np.ndarray,
    extra: Callable[[NoiseEvent, float], SamplerCost],
) -> SamplerCost:
    """The largest costs beyond their events over the clients of one release.

    Args:
        event: the event, of any multiplier.
        multipliers: each client's own [n].
        deltas: each client's δ [n].
        extra: cost of an event at a δ; never more for a larger multiplier.
    """
    from fl_lightning.accounting.exactness import SamplerCost

    costs = []
    for delta in np.unique(deltas).tolist():
        least = float(multipliers[deltas == delta].min())
        own = NoiseEvent(event.mechanism, least, event.sampling_rate, event.adjacency)
        costs.append(extra(own, delta))
    return SamplerCost(max(c.epsilon for c in costs), max(c.delta for c in costs))


def spent_digest(spent: np.ndarray) -> str:
    """Digest of the steps that every client has spent, 32 hex digits.

    Args:
        spent: whole numbers [K].
    """
    import hashlib

    return hashlib.sha256(np.ascontiguousarray(spent, dtype="<i8").tobytes()).hexdigest()[:32]
