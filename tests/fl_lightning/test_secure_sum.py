"""Secure sums: the survivors' sum to the bit, whoever drops out; below the threshold nothing."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from scipy import stats

pytest.importorskip("cryptography")

from fl_lightning.deploy.secure_sum.grid import Block, as_words
from fl_lightning.deploy.secure_sum.masks import add_mask
from fl_lightning.deploy.secure_sum.server import GivenUp, SumServer
from fl_lightning.values.message import decode
from tests.fl_lightning.secure_sums import STAGES, Members, terms_of, up_to

PLACES = (None, *STAGES)


def check(members: int, shares: int, corrupt: int, silent_at: dict[int, str]) -> None:
    terms = terms_of(members, shares=shares, corrupt=corrupt)
    group, server = Members(terms, silent_at), SumServer(terms)
    left = [
        {k for k in range(members) if STAGES.index(silent_at.get(k, "sum-signatures")) > stage}
        for stage in range(4)
    ]
    left.append({k for k in range(members) if k not in silent_at})
    if len(left[4]) < terms.threshold:
        with pytest.raises(GivenUp, match=f"{terms.threshold} are needed"):
            server.run(group.ask)
        revealed = [k for do, k, _ in group.said if do == "sum-signatures"]
        assert len(revealed) < terms.threshold
        # Nobody is asked further once too few are left.
        enough = [len(there) >= terms.threshold for there in left]
        assert {do for do, *_ in group.said} <= set(STAGES[: enough.index(False) + 1])
        return
    total = server.run(group.ask)
    assert server.survivors == sorted(left[2])
    assert torch.equal(total, group.plain_sum(server.survivors))


@pytest.mark.parametrize("members", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_pattern_of_silence(members: int) -> None:
    for places in itertools.product(PLACES, repeat=members):
        check(members, 1, 0, {k: s for k, s in enumerate(places) if s is not None})


@pytest.mark.slow
@pytest.mark.parametrize("shares", [1, 3])
def test_every_pattern_of_silence_of_four(shares: int) -> None:
    for places in itertools.product(PLACES, repeat=4):
        check(4, shares, 0, {k: s for k, s in enumerate(places) if s is not None})


@pytest.mark.parametrize("members", range(4, 13))
def test_as_many_as_may_fall_silent_at_each_stage_and_one_more(members: int) -> None:
    draw = random.Random(members)
    may = members - terms_of(members).threshold
    for stage in STAGES:
        gone = draw.sample(range(members), may + 1)
        check(members, 1, 0, dict.fromkeys(gone[:may], stage))
    check(members, 1, 0, {k: draw.choice(STAGES) for k in draw.sample(range(members), may)})
    check(members, 1, 0, dict.fromkeys(gone, draw.choice(STAGES)))


@pytest.mark.slow
@pytest.mark.parametrize("members", range(5, 13))
def test_every_number_of_the_silent_by_stage(members: int) -> None:
    draw = random.Random(members)
    may = members - terms_of(members).threshold
    for counts in itertools.product(range(may + 1), repeat=5):
        if sum(counts) <= may:
            gone = iter(draw.sample(range(members), may))
            stages = (s for s, count in zip(STAGES, counts, strict=True) for _ in range(count))
            check(members, 1, 0, {next(gone): stage for stage in stages})


def test_the_threshold_holds_the_noise_and_lets_two_sets_have_an_honest_member_in_common() -> None:
    for members, corrupt in itertools.product(range(2, 30), range(10)):
        for shares in range(1, members - corrupt + 1):
            try:
                t = (
                    terms_of(2, shares=1)
                    .__class__(
                        run="a" * 64,
                        round=0,
                        members=tuple(f"{k:064x}" for k in range(members)),
                        shares=shares,
                        corrupt=corrupt,
                        context="b" * 64,
                        blocks=(Block(1, 1.0, 1.0),),
                    )
                    .threshold
                )
            except ValueError:
                continue
            assert t - corrupt >= shares
            assert 2 * t - members > corrupt
            assert 2 <= t <= members


# --- what the server sees of one member ---


def uniform(numbers: torch.Tensor) -> bool:
    """Whether the bytes of numbers look uniform, at every place of the 64-bit word by itself."""
    places = as_words(numbers).view(np.uint8).reshape(-1, 8).T
    found = [stats.chisquare(np.bincount(place, minlength=256)).pvalue for place in places]
    return min(found) > 1e-6


def masked_by(number: int) -> tuple[torch.Tensor, object, Members]:
    """A member's masked numbers, its secrets, and the group."""
    terms = terms_of(4, blocks=(Block(20_000, 1.0, 2.0),))
    group, server = Members(terms), SumServer(terms)
    up_to(group, server.begin(), server, "sum-survivors")
    _, tensors = decode(next(a for do, k, a in group.said if (do, k) == ("sum-shares", number)))
    return tensors["masked"], group.clients[number]._secrets, group


@pytest.mark.parametrize("number", [0, 3])
def test_masked_numbers_are_uniform_without_either_kind_of_mask(number: int) -> None:
    """What is left after the server takes off the kind that it may learn is uniform still."""
    masked, secrets, group = masked_by(number)
    assert uniform(masked)
    without_own = masked.clone()
    add_mask(as_words(without_own), secrets.own_mask, sign=-1)
    assert uniform(without_own)
    without_pairs = masked.clone()
    for seed, sign in secrets.pair_masks.values():
        add_mask(as_words(without_pairs), seed, sign=-sign)
    assert uniform(without_pairs)
    # One pair is enough to hide a member from all the others.
    almost = without_own.clone()
    for seed, sign in list(secrets.pair_masks.values())[1:]:
        add_mask(as_words(almost), seed, sign=-sign)
    assert uniform(almost)
    # The test does see numbers that lack both kinds.
    add_mask(as_words(without_pairs), secrets.own_mask, sign=-1)
    assert torch.equal(without_pairs, group.numbers[number].held)
    assert not uniform(without_pairs)


def test_masks_of_two_rounds_have_nothing_in_common() -> None:
    (first, _, group), (second, _, other) = masked_by(1), masked_by(1)
    assert uniform(first - second)
    assert not torch.equal(first, second)
    secrets = [client._secrets for client in (*group.clients, *other.clients)]
    assert len({one.own_mask for one in secrets}) == 8
    # A pair has one seed, each other pair another.
    assert len({seed for one in secrets for seed, _ in one.pair_masks.values()}) == 12
