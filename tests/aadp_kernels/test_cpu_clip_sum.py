"""clip_sum_noise and layer_norms in numba against the torch specification."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aadp_kernels import Layout, NoiseKey, clip_sum_noise, layer_norms

pytest.importorskip("numba")

from aadp_kernels._cpu import clip_sum as kernel

BOTH = ("torch", "numba")
LAYOUT = Layout.build(
    {
        "a.weight": torch.zeros(37, 30),
        "a.bias": torch.zeros(5),
        "b": torch.zeros(3),
        "empty": torch.zeros(0, 4),
        "c": torch.zeros(()),
    }
)
MIXED = (torch.bfloat16, torch.float64, torch.float16, torch.float32, torch.float32)


def records(batch, dtypes=(torch.float32,) * 5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn((batch, *s), generator=generator) for s in LAYOUT.shapes]
    return [t.to(d) for t, d in zip(draws, dtypes, strict=True)]


def run(impl, tensors, clip=(10.0, 1.0, 1.0, 0.3), **kwargs):
    kwargs = {"scale": torch.tensor([0.5, 2.0, 0.0, 0.1]), "p": 1, "step": 3, **kwargs}
    key = NoiseKey.from_seed(1)
    return clip_sum_noise(tensors, layout=LAYOUT, clip=torch.tensor(clip), key=key, impl=impl,
                          **kwargs)  # fmt: skip


def assert_same(tensors, tolerance=1e-13, **kwargs):
    (expected, stat), (got, fast) = (run(impl, tensors, **kwargs) for impl in BOTH)
    for a, b in zip(fast[1:], stat[1:], strict=True):
        assert torch.equal(a, b)
    assert (fast[0] is None) == (stat[0] is None)
    if stat[0] is not None:
        torch.testing.assert_close(fast[0], stat[0], rtol=1e-13, atol=0, equal_nan=True)
    for a, b in zip(got, expected, strict=True):
        # Sums of many terms may cancel: the error is of the terms, which the clip norm bounds.
        eps = 0 if a.dtype == torch.float64 else 2 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=eps + tolerance, atol=100 * tolerance)
    return got


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 5, (torch.float64,) * 5, MIXED])
@pytest.mark.parametrize("batch", [0, 1, 33])
@pytest.mark.parametrize(("p", "votes"), [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize("most", [0, 1 << 18])
def test_sums_and_statistics_equal_the_specification(dtypes, batch, p, votes, most, monkeypatch):
    monkeypatch.setattr(kernel, "MOST", most)
    votes_at = torch.tensor([850.0, 2.0, 0.0, 0.5]) if votes else None
    mask = torch.arange(batch) % 5 != 2
    assert_same(records(batch, dtypes), p=p, mechanism="gaussian", mask=mask, votes_at=votes_at)


@pytest.mark.parametrize("most", [0, 1 << 18])
def test_weights_equal_the_specification(most, monkeypatch):
    monkeypatch.setattr(kernel, "MOST", most)
    mask, weights = torch.ones(33), torch.rand(33, generator=torch.Generator().manual_seed(1))
    mask[3], weights[7] = 0, 0
    whole = assert_same(records(33), mask=mask, scale=None)
    assert not torch.equal(whole[0], assert_same(records(33), mask=mask, weights=weights)[0])


def test_fast_noise_is_close_to_the_specification():
    for mechanism in ("laplace", "gaussian"):
        assert_same(records(9), mechanism=mechanism, form="fast", tolerance=2.0**-18 * 20)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_records_that_are_not_finite_or_padding_contribute_nothing(bad):
    tensors = records(6)
    tensors[0][1, 0, 3] = bad
    tensors[4][2] = bad
    mask = torch.tensor([1, 1, 1, 0, 1, 0])
    tensors[1][3] = bad
    votes_at = torch.full((4,), 1e9)
    scale = torch.zeros(4)
    got = assert_same(tensors, mask=mask, votes_at=votes_at, scale=scale, mechanism="laplace")
    live = [t[mask.bool()] for t in tensors]
    kept = [t[[0, 2, 3]] if i < 2 else t for i, t in enumerate(live)]
    kept[4] = live[4][[0, 1, 3]]
    for layer, members in enumerate(LAYOUT.members):
        own = [kept[i].double() for i in members]
        norm = sum(t.abs().reshape(len(t), -1).sum(1) for t in own)
        factor = ((10.0, 1.0, 1.0, 0.3)[layer] / norm).clamp(max=1)
        for i, t in zip(members, own, strict=True):
            torch.testing.assert_close(
                got[i].double(), torch.tensordot(factor, t, 1), rtol=1e-4, atol=1e-6
            )


def test_micro_batches_add_up_and_noise_goes_in_once():
    tensors = records(40)
    whole, _ = run("numba", tensors)
    parts = [[t[:25] for t in tensors], [t[25:] for t in tensors]]
    sums, _ = run("numba", parts[0], last=False)
    assert all(s.dtype == torch.float64 for s in sums)
    got, _ = run("numba", parts[1], accumulate=sums)
    for a, b in zip(got, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_threads_change_nothing():
    threads, results = torch.get_num_threads(), []
    layout = Layout.build([torch.zeros(100_003), torch.zeros(7)])
    tensors = [torch.randn(5, 100_003, generator=torch.Generator().manual_seed(0)),
               torch.randn(5, 7, generator=torch.Generator().manual_seed(1))]  # fmt: skip
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            sums, stats = clip_sum_noise(
                tensors, layout=layout, clip=torch.tensor([1.0, 1.0]), scale=None, p=1,
                impl="numba",
            )  # fmt: skip
            results.append((*sums, stats.l1_norm, layer_norms(
                tensors, layout=layout, p=2, cohort=True, impl="numba")))  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 4), st.floats(1e-20, 1e20), st.sampled_from([1, 2]),
    st.integers(0, 1 << 30),
)  # fmt: skip
def test_no_record_contributes_more_than_the_clip_norm(n, batch, clip, p, seed):
    generator = torch.Generator().manual_seed(seed)
    update = torch.randn(batch, n, generator=generator, dtype=torch.float64) * 3
    sums, _ = clip_sum_noise(
        [update], layout=Layout.build([update[0]]), clip=torch.tensor([clip], dtype=torch.float64),
        scale=None,
        p=p, impl="numba",
    )  # fmt: skip
    total = math.fsum(abs(v) ** p for v in sums[0].tolist()) ** (1 / p)
    assert total <= batch * clip * (1 + 1e-15)
    norm = update.norm(p=p, dim=1)
    if (norm * (1 + 1e-12) < clip).all():
        torch.testing.assert_close(sums[0], update.sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 5, (torch.float64,) * 5, MIXED])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("cohort", [True, False])
@pytest.mark.parametrize("moved", [True, False])
def test_layer_norms_equal_the_specification(dtypes, p, cohort, moved):
    tensors = records(3, dtypes)
    tensors[0][1, 0, 0], tensors[2][2, 1] = math.inf, math.nan
    tensors = tensors if cohort else [t[0] for t in tensors]
    reference = [t[0] for t in records(1, dtypes, seed=5)] if moved else None
    expected, got = (
        layer_norms(tensors, layout=LAYOUT, p=p, cohort=cohort, reference=reference, impl=impl)
        for impl in BOTH
    )
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0, equal_nan=True)
