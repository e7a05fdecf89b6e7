"""Digests of what is released and of what noise is bound to."""

import hashlib

import pytest
import torch
from blake3 import blake3

from fl_lightning.keys import digests


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("like", [None, "blake3:0", "0123"])
def test_rows_are_hashed_each_by_itself_whatever_the_threads(threads, like):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        numbers, empty = torch.arange(9), torch.zeros(9, 0)
        # Large enough to be worth a second thread.
        columns = [numbers.float()[:, None].expand(9, 30_000), numbers, empty]
        found = digests.digests(columns, like=like)
    finally:
        torch.set_num_threads(before)
    state = hashlib.sha256() if like == "0123" else blake3()
    for value in (column[4] for column in columns):
        data = value.numpy().tobytes()
        state.update(f"{value.dtype}{tuple(value.shape)}:{len(data)}:".encode() + data)
    assert found[4] == ("" if like == "0123" else "blake3:") + state.hexdigest()
    assert len(set(found)) == 9
    assert digests.digests([]) == []


def test_without_blake3_digests_are_sha256_and_bound_to_other_keys(monkeypatch):
    columns, facts = [torch.arange(6.0).view(2, 3)], digests.platform_facts()
    quick, bulk = digests.digests(columns), digests.bulk_digest(columns)
    monkeypatch.setattr(digests, "blake3", None)
    assert digests.digests(columns) == digests.digests(columns, like="0123")
    assert digests.bulk_digest(columns) != bulk
    assert digests.platform_facts() != facts
    with pytest.raises(ValueError, match="pip install blake3"):
        digests.digests(columns, like=quick[0])


def test_bulk_digest_sees_every_bit_shape_and_border():
    base = [torch.arange(800_000.0), torch.zeros(3, 2), 1.5]
    first = digests.bulk_digest(base)
    assert (
        digests.bulk_digest([v.clone() if isinstance(v, torch.Tensor) else v for v in base])
        == first
    )
    for where in (0, digests._PIECE - 1, digests._PIECE, 799_999):
        other = base[0].clone()
        other[where] = torch.nextafter(other[where], torch.tensor(torch.inf))
        assert digests.bulk_digest([other, *base[1:]]) != first
    others = [
        [base[0].view(2, -1), *base[1:]],
        [base[0], torch.zeros(2, 3), 1.5],
        [base[0], torch.zeros(6), 1.5],
        [base[0][: digests._PIECE], base[0][digests._PIECE :], *base[1:]],
        [*base[:2], 1.25],
        base[:2],
        [base[1], base[0], 1.5],
    ]
    assert len({first, *map(digests.bulk_digest, others)}) == len(others) + 1
