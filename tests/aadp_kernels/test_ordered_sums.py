"""Norms have the same bits in plain torch and in numba, however layers are cut."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aadp_kernels import Layout, layer_norms
from aadp_kernels._torch.ordered_sums import ordered_sums
from aadp_kernels.addresses import SUM_LANES, SUM_UNIT


def by_hand(parts, p):
    """One row's sum, number by number."""
    whole, first, units = 0.0, 0, {}
    for part in parts:
        for i, value in enumerate(part.tolist()):
            unit = (first + i) // SUM_UNIT
            start = max(0, unit * SUM_UNIT - first)  # of the part, in this unit
            block, place = divmod(i - start, 4 * SUM_LANES)
            key = (unit, id(part), block)
            units.setdefault(unit, {}).setdefault(key, np.zeros(4 * SUM_LANES))[place] = value
        first += len(part)
    for blocks in units.values():
        lanes = [0.0] * SUM_LANES
        for block in blocks.values():
            powers = [abs(v) if p == 1 else v * v for v in block.tolist()]
            for j in range(SUM_LANES):
                a, b, c, d = (powers[j + k * SUM_LANES] for k in range(4))
                lanes[j] += (a + b) + (c + d)
        total = 0.0
        for lane in lanes:
            total += lane
        whole += total
    return whole


SIZES = st.lists(
    st.sampled_from([0, 1, 31, 32, 33, 127, 128, 129, 500, 512, 513, 65_535, 65_537]),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(SIZES, st.sampled_from([1, 2]), st.integers(0, 1 << 30))
@example([65_000, 1_000, 70_000], 2, 0)
def test_the_order_is_as_it_is_written(sizes, p, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(2, n, generator=generator, dtype=torch.float64) for n in sizes]
    found = ordered_sums(parts, p)
    for row in range(2):
        assert float(found[row]) == by_hand([part[row] for part in parts], p)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.sampled_from([1, 2]), st.booleans(), st.integers(1, 3), st.integers(0, 1 << 30))
def test_numba_has_the_same_bits(sizes, p, moved, rows, seed):
    pytest.importorskip("numba")
    generator = torch.Generator().manual_seed(seed)
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    shapes = [torch.empty(n, dtype=dtypes[i % 3]) for i, n in enumerate(sizes)]
    layout = Layout.build(shapes, groups=[i % 2 for i in range(len(sizes))])
    tensors = [torch.randn(rows, len(t), generator=generator).to(t.dtype) for t in shapes]
    reference = [torch.randn(len(t), generator=generator) for t in shapes] if moved else None
    found = [
        layer_norms(tensors, layout=layout, p=p, reference=reference, cohort=True, impl=impl)
        for impl in ("torch", "numba")
    ]
    assert torch.equal(*found)


def test_no_rows():
    assert ordered_sums([torch.zeros(0, 70, dtype=torch.float64)], 2).shape == (0,)


def test_sums_are_close_to_the_true_ones():
    x = torch.randn(1, 200_003, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for p in (1, 2):
        true = math.fsum(abs(v) ** p for v in x[0].tolist())
        assert float(ordered_sums([x], p)) == pytest.approx(true, rel=1e-13)
