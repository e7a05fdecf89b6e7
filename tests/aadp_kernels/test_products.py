"""Gradients that are products over positions: norms by Gram matrices, one product for the sum."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap

from aadp_kernels import clipped_linear
from aadp_kernels.clip_in_backward import clip as clip_in_backward_clip
from aadp_kernels.clip_in_backward import matrix_rules, products

P, IN, OUT = 3, 40, 48  # Gram matrices are cheaper


@pytest.fixture(autouse=True, params=["torch", "numba"])
def no_record_stays_in_the_cache(request, monkeypatch):
    """Such records have a kernel that is faster still."""
    monkeypatch.setattr("aadp_kernels._cpu.backward_products.MOST", 3)
    if request.param == "torch":
        monkeypatch.setattr(products, "record_kernels", lambda _: None)


def records(n: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    a, g = (torch.randn(n, P, width, generator=generator) for width in (IN, OUT))
    a[0] *= 1e-3
    g[1] *= 1e3
    return a.to(dtype), g.to(dtype)


def gradients(a, g):
    """Weight [R, out, in] and bias [R, out] of each record, float64."""
    a, g = a.double(), g.double()
    return torch.einsum("rpo,rpi->roi", g, a), g.sum(1)


def test_what_is_cheaper_is_a_matter_of_operations():
    like = torch.zeros(1)
    assert products.gram_is_cheaper(64, 384, 384, like)
    assert products.gram_is_cheaper(64, 384, 1536, like)
    assert products.gram_is_cheaper(P, IN, OUT, like)
    assert not products.gram_is_cheaper(512, 384, 384, like)
    assert not products.gram_is_cheaper(4, 4, 1000, like)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squares_of_norms_are_never_too_small(bias, dtype, monkeypatch):
    monkeypatch.setattr(products, "slice_elements", lambda device: 500)  # several slices
    a, g = records(9, dtype=dtype)
    w, b = gradients(a, g)
    true = w.square().sum((1, 2)) + bias * b.square().sum(1)
    found, *both = products.gram_squares(a, g, bias=bias)
    assert bool((found >= true).all())
    torch.testing.assert_close(found, true, rtol=1e-10, atol=0)
    for own, of in zip(both, (a, g), strict=True):
        torch.testing.assert_close(own, of.double().square().sum((1, 2)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("positions", [1, 4, 7, 33])
@pytest.mark.parametrize("columns", [5, 512, 1100])
def test_squares_of_records_of_any_shape(positions, columns):
    torch.manual_seed(positions)
    a, g = torch.randn(3, positions, columns), torch.randn(3, positions, 9)
    w, b = gradients(a, g)
    true = w.square().sum((1, 2)) + b.square().sum(1)
    torch.testing.assert_close(products.gram_squares(a, g, bias=True)[0], true, rtol=1e-10, atol=0)


@pytest.mark.parametrize("tile", ["_wide_tile", "_narrow_tile"])
@pytest.mark.parametrize("columns", [3, 64, 513])
def test_tiles_for_many_and_for_few_registers_agree(tile, columns):
    gram = pytest.importorskip("aadp_kernels._cpu.gram")
    x = torch.randn(8, columns, dtype=torch.float64)
    out = torch.ones(8, 8, dtype=torch.float64)
    getattr(gram, tile)(x.numpy(), 0, 4, columns, out.numpy())
    want = torch.ones(8, 8, dtype=torch.float64)
    want[:4, 4:] += x[:4] @ x[4:].t()
    torch.testing.assert_close(out, want)


def test_what_cancels_is_not_taken_for_small():
    """Two positions that cancel up to float32: the bound covers what the sum has lost."""
    a, g = records(200)
    a[:, 1], g[:, 1], g[:, 2] = a[:, 0], -g[:, 0] * (1 + 2.0**-22), 0
    true = gradients(a, g)[0].square().sum((1, 2))
    found = products.gram_squares(a, g, bias=False)[0]
    assert bool((found >= true).all())
    lengths = (a.double().norm(dim=2) * g.double().norm(dim=2)).sum(1)
    assert bool((found <= true + 1e-12 * lengths.square()).all())


def clipped(a, g, clip, mask=None, *, bias=True, weight=True):
    """Sums of weight and bias and counts, from a backward pass."""
    w = torch.zeros(OUT, IN, dtype=a.dtype, requires_grad=weight)
    b = torch.zeros(OUT, dtype=a.dtype, requires_grad=True) if bias else None
    probe = torch.zeros(3, requires_grad=True)
    out = clipped_linear(a, w, b, clip=torch.tensor(clip), mask=mask, probe=probe)
    wanted = [t for t in (w, b, probe) if t is not None and t.requires_grad]
    return torch.autograd.grad((out * g).sum(), wanted)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_are_those_of_records_clipped_one_by_one(bias, dtype, monkeypatch):
    monkeypatch.setattr(products, "sums_of_products", None)  # not called
    a, g = records(12, dtype=dtype)
    a[3] = torch.inf
    a[4], g[4] = torch.nan, 0
    mask = torch.ones(12)
    mask[5] = 0
    w, b = gradients(a, g)
    norm = (w.square().sum((1, 2)) + bias * b.square().sum(1)).sqrt()
    clip = float(norm[[0, 2, 6, 7, 8, 9, 10, 11]].median())
    factor = (clip / norm).clamp(max=1.0)
    factor[[3, 4, 5]] = 0
    sums = clipped(a, g, clip, mask, bias=bias)
    rtol, atol = (2e-2, 5e-2 * clip) if dtype == torch.bfloat16 else (1e-5, 2e-5 * clip)
    want_w = torch.einsum("r,roi->oi", factor, w.nan_to_num(0, 0, 0))
    torch.testing.assert_close(sums[0].double(), want_w, rtol=rtol, atol=atol)
    if bias:
        want_b = torch.einsum("r,ro->o", factor, b)
        torch.testing.assert_close(sums[1].double(), want_b, rtol=rtol, atol=atol)
    over = int(((norm > clip) & (factor > 0)).sum())
    assert sums[-1].tolist() == [0.0, float(over), 2.0]


def test_one_record_never_passes_the_clip_norm():
    a, g = records(60, seed=1, dtype=torch.float64)
    for i in range(60):
        w, b = clipped(a[[i]], g[[i]], 0.7)[:2]
        assert float((w.square().sum() + b.square().sum()).sqrt()) <= 0.7


def test_clients_are_clipped_each_by_its_own_rule():
    a, g = records(6)
    clips = torch.tensor([0.5, 50.0])

    def loss(w, b, a, g, clip):
        return (clipped_linear(a, w, b, clip=clip) * g).sum()

    both = a.view(2, 3, P, IN), g.view(2, 3, P, OUT)
    start = torch.zeros(OUT, IN), torch.zeros(OUT)
    found = vmap(grad(loss, argnums=(0, 1)), (None, None, 0, 0, 0))(*start, *both, clips)
    for k in range(2):
        want = clipped(both[0][k], both[1][k], float(clips[k]))
        torch.testing.assert_close(found[0][k], want[0])
        torch.testing.assert_close(found[1][k], want[1])


@pytest.mark.parametrize("elements", [10, 1 << 20])  # a gradient is held, or its norms are taken
def test_votes_are_counted_by_l1_norms(elements, monkeypatch):
    for module in (matrix_rules, clip_in_backward_clip):
        monkeypatch.setattr(module, "slice_elements", lambda device: elements)
    a, g = records(6)
    w, b = gradients(a, g)
    norm1 = w.abs().sum((1, 2)) + b.abs().sum(1)
    weight, bias = torch.zeros(OUT, IN, requires_grad=True), torch.zeros(OUT, requires_grad=True)
    probe = torch.zeros(3, requires_grad=True)
    out = clipped_linear(
        a, weight, bias, clip=torch.tensor(1.0), votes_at=norm1.median().float() + 1e-3, probe=probe
    )
    (out * g).sum().backward()
    assert probe.grad is not None
    assert float(probe.grad[0]) == 0.0  # three of six at most so long
