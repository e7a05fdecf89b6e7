"""Norms of products in Triton against per-record gradients that are written, in float64."""

import pytest
import torch

pytest.importorskip("triton")
from aadp_kernels import _dispatch, clipped_linear
from aadp_kernels._triton.product_norms import product_norms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sequences(batch, length, columns, rows, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(batch, length, columns, generator=generator)
    g = torch.randn(batch, length, rows, generator=generator)
    return a.to(DEVICE, dtype), g.to(DEVICE, dtype)


def expected(a, g):
    grads = torch.bmm(g.double().transpose(1, 2), a.double())
    return grads.abs().sum((1, 2)), grads.square().sum((1, 2))


def assert_norms(got, want, tolerance=1e-5):
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float64
        torch.testing.assert_close(g, w, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(3, 5, 7, 4), (2, 16, 64, 64), (2, 33, 65, 130), (1, 1, 1, 1), (4, 40, 17, 2)]
)
def test_norms_equal_those_of_written_gradients(sizes, dtype):
    a, g = sequences(*sizes, dtype)
    assert_norms(product_norms(a, g), expected(a, g))


def test_strided_views_need_no_copy():
    a, g = sequences(3, 20, 18, 10)
    a = a[:, ::2, 1::2]
    g = g.transpose(1, 2).contiguous()[:, :, ::2].transpose(1, 2)
    assert not a.is_contiguous()
    assert not g.is_contiguous()
    assert_norms(product_norms(a, g), expected(a, g))


def test_a_record_has_the_same_bits_in_any_batch():
    a, g = sequences(5, 33, 70, 20)
    whole = product_norms(a, g)
    for i in (0, 4):
        alone = product_norms(a[i : i + 1], g[i : i + 1])
        assert all(torch.equal(w[i : i + 1], s) for w, s in zip(whole, alone, strict=True))
    assert all(torch.equal(w, s) for w, s in zip(whole, product_norms(a, g), strict=True))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_record_that_is_not_finite_spoils_only_itself(bad):
    a, g = sequences(3, 5, 70, 20)
    want = expected(a, g)
    a[1, 2, 66] = bad
    for got, clean in zip(product_norms(a, g), want, strict=True):
        assert not torch.isfinite(got[1])
        torch.testing.assert_close(got[::2], clean[::2], rtol=1e-5, atol=0)


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_nothing_has_norm_zero(sizes):
    for norm in product_norms(*sequences(*sizes)):
        assert torch.equal(norm, torch.zeros(sizes[0], dtype=torch.float64, device=DEVICE))


def test_clip_in_backward_takes_its_norms_here(monkeypatch):
    assert (
        _dispatch.choose("triton", "backward", device=torch.device(DEVICE), elements=1) == "triton"
    )
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 2, 9, 7, generator=generator).to(DEVICE)
    weight = torch.randn(3, 5, 7, generator=generator).to(DEVICE)
    bias = torch.randn(3, 5, generator=generator).to(DEVICE)
    calls = []
    # On a CPU numba would sum the records at once and need no norms.
    monkeypatch.setattr("aadp_kernels._cpu.records.product_sums", lambda *_: None)

    def gradients(fused):
        def norms(a, g):
            calls.append(fused)
            return product_norms(a, g)

        for module in ("clip", "matrix_rules"):
            name = f"aadp_kernels.clip_in_backward.{module}.product_norms"
            monkeypatch.setattr(name, lambda _: norms if fused else None)

        def loss(w, b, x):
            clip = torch.tensor(3.0, device=DEVICE)
            return clipped_linear(x, w, b, clip=clip, p=2).square().sum()

        return torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(weight, bias, x)

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert calls == [True]


def test_bad_arguments():
    a, g = sequences(2, 3, 4, 5)
    for x, y in ((a, g[:, :2]), (a[0], g[0]), (a, g.to(torch.bfloat16)), (a.double(), g.double())):
        with pytest.raises(ValueError, match="must be"):
            product_norms(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_products_on_a_device(dtype):
    a, g = sequences(8, 200, 512, 384, dtype)
    got = product_norms(a, g)
    assert_norms(got, expected(a, g), 1e-4)
    assert all(torch.equal(x, y) for x, y in zip(got, product_norms(a, g), strict=True))
