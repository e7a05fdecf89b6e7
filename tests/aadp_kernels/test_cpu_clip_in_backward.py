"""Clipped sums of matrix products in numba against einsum over materialised gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from aadp_kernels import (
    clipped_conv1d,
    clipped_conv2d,
    clipped_embedding,
    clipped_layer_norm,
    clipped_linear,
)

pytest.importorskip("numba")

from aadp_kernels._cpu import backward_products as kernel
from aadp_kernels._cpu import records
from aadp_kernels._cpu.gram import gram_squares
from aadp_kernels.clip_in_backward.matrix_rules import Linear
from aadp_kernels.contract import ClipRule, GradientsNeeded, OneClient


def clipped(records, clip, p, mask):
    """Clipped sum of per-record gradients [B, n], in float64, and which are clipped."""
    norm = records.double().norm(p=p, dim=1)
    factor = torch.where(norm > clip, clip / norm, 1.0) * mask
    return factor @ records.double(), ((norm > clip) & (mask > 0)).sum()


def check(operation, x, weight, bias, slope, records, p, **options):
    """The operation's gradients are the clipped sums of `records` [B, weight and bias]."""
    mask = (torch.arange(len(x)) % 4 != 1).to(x.dtype)
    size = records.double().norm(p=p, dim=1)
    clip = size.median().to(x.dtype)
    leaves = [t.clone().requires_grad_() for t in (weight, bias)]
    probe = torch.zeros(3, dtype=x.dtype, requires_grad=True)
    y = operation(x, *leaves, clip=clip, mask=mask, probe=probe, p=p, **options)
    (y * slope).sum().backward()
    want, number = clipped(records, clip.double(), p, mask.double())
    got = torch.cat([leaf.grad.double().flatten() for leaf in leaves])
    tolerance = 1e-9 if x.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(clip) * len(x))
    # The median itself is a tie.
    assert abs(float(probe.grad[1]) - float(number)) <= 1
    return got


@settings(deadline=None, max_examples=60)
@given(
    batch=st.sampled_from([1, 3, 5, 70]), positions=st.integers(1, 6), features=st.integers(1, 30),
    out=st.integers(1, 70), p=st.sampled_from([1, 2]), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_sequences_of_any_shape(batch, positions, features, out, p, seed, dtype):
    torch.manual_seed(seed)
    x = torch.randn(batch, positions, features, dtype=dtype)
    slope = torch.randn(batch, positions, out, dtype=dtype)
    own = torch.einsum("bto,bti->boi", slope, x).flatten(1)
    records = torch.cat([own, slope.sum(1)], 1)
    weight, bias = torch.randn(out, features, dtype=dtype), torch.randn(out, dtype=dtype)
    check(clipped_linear, x, weight, bias, slope, records, p)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.sampled_from([1, 4, 33]), channels=st.integers(1, 5), out=st.integers(1, 20),
    groups=st.integers(1, 3), kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)), p=st.sampled_from([1, 2]),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]), last=st.booleans(),
)  # fmt: skip
def test_convolutions_of_any_shape(
    batch, channels, out, groups, kernel, stride, p, padding, seed, dtype, last
):
    torch.manual_seed(seed)
    x = torch.randn(batch, channels * groups, 5, 6, dtype=dtype)
    weight = torch.randn(out * groups, channels, *kernel, dtype=dtype)
    bias = torch.randn(out * groups, dtype=dtype)
    options = {"stride": stride, "padding": padding, "groups": groups}
    slope = torch.randn_like(F.conv2d(x, weight, **options))
    if last:
        x, slope = (t.to(memory_format=torch.channels_last) for t in (x, slope))
    rows = []
    for one, g in zip(x.double(), slope.double(), strict=True):
        w = weight.double().clone().requires_grad_()
        (F.conv2d(one[None], w, **options) * g).sum().backward()
        rows.append(torch.cat([w.grad.flatten(), g.sum((1, 2))]))
    check(clipped_conv2d, x, weight, bias, slope, torch.stack(rows), p, **options)


@pytest.mark.parametrize("batch", [1, 7, 64, 500])
def test_bits_do_not_depend_on_threads(batch):
    torch.manual_seed(0)
    x, weight = torch.randn(batch, 3, 40), torch.randn(20, 3, 4)
    # A gradient of y's own values could depend on the threads of torch's convolution.
    slope, results = torch.randn(batch, 20, 37), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = weight.clone().requires_grad_()
            y = clipped_conv1d(x, leaf, clip=torch.tensor(5.0), p=1)
            (y * slope).sum().backward()
            results.append(leaf.grad)
    finally:
        torch.set_num_threads(before)
    assert results[0].any()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def _embedding():
    torch.manual_seed(0)
    x, slope = torch.randint(9, (64, 40)), torch.randn(64, 40, 96)
    weight = torch.zeros(9, 96, requires_grad=True)
    (clipped_embedding(x, weight, clip=torch.tensor(50.0)) * slope).sum().backward()
    return weight.grad


def _layer_norm():
    torch.manual_seed(0)
    x, slope = torch.randn(64, 40, 96), torch.randn(64, 40, 96)
    weight = torch.ones(96, requires_grad=True)
    y = clipped_layer_norm(x, (96,), weight, clip=torch.tensor(20.0))
    # A gradient of y's own values could depend on the threads of torch's normalisation.
    (y * slope).sum().backward()
    return weight.grad


def _squares():
    torch.manual_seed(0)
    found = gram_squares(torch.randn(64, 9, 400), torch.randn(64, 9, 300), True, 1e-12)
    return torch.stack(found)


@pytest.mark.parametrize("result", [_embedding, _layer_norm, _squares])
@pytest.mark.parametrize("region", [True, False])
def test_neither_do_those_of_other_kernels(result, region, monkeypatch):
    """On torch's threads, or on others where those are not to be had."""
    if not region:
        monkeypatch.setattr("aadp_kernels._cpu._parallel._USABLE", False)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(result())
    finally:
        torch.set_num_threads(before)
    assert results[0].any()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_rows_of_equal_tokens_add_up_before_the_norm():
    """Of two rows that cancel nothing is left to clip; of two that are equal twice as much."""
    x = torch.tensor([[1, 2, 1, 0], [3, 3, 2, 0]])
    slope = torch.zeros(2, 4, 2, dtype=torch.float64)
    slope[0, 0], slope[0, 2] = torch.tensor([3.0, 4.0]), torch.tensor([-3.0, -4.0])
    slope[0, 1], slope[1, 0] = torch.tensor([0.0, 1.0]), torch.tensor([1.5, 2.0])
    slope[1, 1], slope[:, 3] = slope[1, 0], 100.0  # padding
    weight = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    probe = torch.zeros(3, requires_grad=True)
    y = clipped_embedding(
        x, weight, padding_idx=0, clip=torch.tensor(2.5), votes_at=torch.tensor(6.9), probe=probe
    )
    (y * slope).sum().backward()
    want = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.5, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(weight.grad, want)
    assert probe.grad.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("size", [1e-24, 1e-12, 1.0, 1e6])
def test_a_record_alone_never_passes_the_clip_norm_in_float32(p, size):
    """Also where the squares of the entries are below float32's range."""
    for seed in range(20):
        torch.manual_seed(seed)
        x, weight = torch.randn(1, 2, 9, 9), torch.randn(18, 2, 3, 3, requires_grad=True)
        bias = torch.randn(18, requires_grad=True)
        clip = 0.3 * size * torch.rand(())
        y = clipped_conv2d(x, weight, bias, clip=clip, p=p)
        (y * size * torch.randn_like(y)).sum().backward()
        joint = torch.cat([weight.grad.double().flatten(), bias.grad.double()])
        assert 0.99 * float(clip) <= float(joint.norm(p=p)) <= float(clip)


def test_what_is_not_finite_or_padding_does_not_spread():
    torch.manual_seed(0)
    x, slope = torch.randn(12, 3, 5), torch.randn(12, 3, 7)
    x[2, 1, 1], x[5, 0, 0], x[7], slope[9, 2, 2] = math.nan, math.inf, 1e30, math.nan
    mask = torch.ones(12)
    mask[5] = mask[0] = 0
    weight, probe = torch.randn(7, 5, requires_grad=True), torch.zeros(3, requires_grad=True)
    y = clipped_linear(
        x, weight, clip=torch.tensor(1.0), mask=mask, votes_at=torch.tensor(9.0), probe=probe
    )
    y.backward(slope)
    live = [1, 3, 4, 6, 8, 10, 11]
    rows = torch.einsum("bto,bti->boi", slope, x)[live].flatten(1).double()
    want, number = clipped(rows, 1.0, 2, torch.ones(len(live)).double())
    torch.testing.assert_close(weight.grad.double().flatten(), want, rtol=1e-5, atol=1e-5)
    votes = ((rows.norm(p=1, dim=1) <= 9).double() - 0.5).sum()
    assert probe.grad.tolist() == [float(votes), float(number), 3]


def test_records_that_are_too_large_take_another_way(monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, 6), torch.randn(4, 6)
    results = []
    calls, used = [], records.product_single

    def product_single(*arguments):
        calls.append(used(*arguments))
        return calls[-1]

    monkeypatch.setattr("aadp_kernels._cpu.records.product_single", product_single)
    for most in (kernel.MOST, 3):
        monkeypatch.setattr(kernel, "MOST", most)
        leaf = weight.clone().requires_grad_()
        clipped_linear(x, leaf, clip=torch.tensor(0.5)).square().sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert [found is None for found in calls] == [False, True]


def rule_of(clip, mask, p=2):
    """A rule without votes that asks for everything but the input's gradient."""
    needed = GradientsNeeded(p, x=False, weight=True, bias=True, counts=True)
    return ClipRule(needed, clip, mask, None)


def test_many_clients_have_the_sums_that_each_has_alone():
    """Clients of several units of records: no sum begins or ends in another's."""
    torch.manual_seed(0)
    clients, batch, n = 3, 20, 6
    x, g = torch.randn(clients, batch, 4, n), torch.randn(clients, batch, 4, n)
    clip, mask = torch.tensor([0.5, 5.0, 50.0]), torch.rand(clients, batch) > 0.2
    rule = rule_of(clip.double(), mask)
    geometry = Linear().geometry((4, n), (4, n), torch.empty(n, n))
    together = records.product_sums(x, g, geometry, n, rule), records.norm_layer_sums(x, g, n, rule)
    for k in range(clients):
        one = OneClient(clip[k], mask[k], None)
        products = torch.einsum("bto,bti->boi", g[k], x[k])
        alone = records.product_single(x[k], g[k], geometry, n, rule.needed, one)
        for got, want in zip(together[0], alone, strict=True):
            assert torch.equal(got[k], want)
        pieces = (products, g[k].sum(1)), ((x[k] * g[k]).sum(1), g[k].sum(1))
        for found, parts in zip(together, pieces, strict=True):
            rows = torch.cat([part.flatten(1) for part in parts], 1)
            want, number = clipped(rows, clip[k].double(), 2, mask[k].double())
            got = torch.cat([found[0][k].flatten(), found[1][k].flatten()]).double()
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
            assert found[2][k].tolist() == [0, float(number), 0]


def test_an_input_that_is_not_finite_spoils_no_other_record():
    x, g = torch.randn(12, 3, 5), torch.randn(12, 3, 5)
    x[4, 1, 2] = math.nan
    mean, scale = x.mean(-1, keepdim=True), torch.ones(12, 3, 1)
    needed = GradientsNeeded(2, x=False, weight=True, bias=True, counts=True)
    one = OneClient(torch.tensor(1e6), None, None)
    weight, bias, counts = records.norm_layer_single(x, g, mean, scale, 5, needed, one)
    rest = torch.arange(12) != 4
    torch.testing.assert_close(weight, ((x - mean) * g)[rest].sum((0, 1)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias, g[rest].sum((0, 1)), rtol=1e-5, atol=1e-5)
    assert counts.tolist() == [0, 0, 1]
