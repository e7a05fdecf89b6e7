"""Ghost norms in Triton against per-record gradients that are written, in float64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from aadp_kernels import _dispatch, clipped_linear
from aadp_kernels._triton.ghost import conv_ghost_norms, ghost_norms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONVS = [
    ((3, 3), (1, 1), (0, 0), (1, 1), 1),
    ((3, 2), (2, 1), (1, 2), (1, 1), 1),
    ((2, 3), (1, 2), (2, 1), (2, 3), 1),
    ((3, 3), (1, 1), (1, 1), (1, 1), 2),
    ((1, 5), (1, 2), (0, 2), (1, 1), 6),
]


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
    assert_norms(ghost_norms(a, g), expected(a, g))


def test_strided_views_need_no_copy():
    a, g = sequences(3, 20, 18, 10)
    a = a[:, ::2, 1::2]
    g = g.transpose(1, 2).contiguous()[:, :, ::2].transpose(1, 2)
    assert not a.is_contiguous()
    assert not g.is_contiguous()
    assert_norms(ghost_norms(a, g), expected(a, g))


def test_a_record_has_the_same_bits_in_any_batch():
    a, g = sequences(5, 33, 70, 20)
    whole = ghost_norms(a, g)
    for i in (0, 4):
        alone = ghost_norms(a[i : i + 1], g[i : i + 1])
        assert all(torch.equal(w[i : i + 1], s) for w, s in zip(whole, alone, strict=True))
    assert all(torch.equal(w, s) for w, s in zip(whole, ghost_norms(a, g), strict=True))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_record_that_is_not_finite_spoils_only_itself(bad):
    a, g = sequences(3, 5, 70, 20)
    want = expected(a, g)
    a[1, 2, 66] = bad
    for got, clean in zip(ghost_norms(a, g), want, strict=True):
        assert not torch.isfinite(got[1])
        torch.testing.assert_close(got[::2], clean[::2], rtol=1e-5, atol=0)


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_nothing_has_norm_zero(sizes):
    for norm in ghost_norms(*sequences(*sizes)):
        assert torch.equal(norm, torch.zeros(sizes[0], dtype=torch.float64, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conv", CONVS)
def test_convolutions_equal_those_of_written_gradients(conv, dtype):
    kernel, stride, padding, dilation, groups = conv
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, 9, 11, generator=generator).to(DEVICE, dtype)
    weight = torch.zeros(12, 6 // groups, *kernel, device=DEVICE, dtype=torch.float64)
    settings = (stride, padding, dilation, groups)
    like = F.conv2d(x.double(), weight, None, *settings)
    g = torch.randn(like.shape, generator=generator).to(DEVICE, dtype)

    def gradient(record, upstream):
        def output(w):
            out = F.conv2d(record[None], w, None, *settings)
            return (out * upstream).sum()

        return torch.func.grad(output)(weight)

    grads = torch.vmap(gradient)(x.double(), g.double()).flatten(1)
    want = grads.abs().sum(1), grads.square().sum(1)
    assert_norms(conv_ghost_norms(x, g, kernel, *settings), want)
    assert_norms(
        conv_ghost_norms(x.to(memory_format=torch.channels_last), g, kernel, *settings), want
    )


@pytest.mark.parametrize("in_dims", [(0, 0), (1, 2), (None, 0), (0, None)])
def test_vmap_folds_the_mapped_dimension_into_the_batch(in_dims):
    clients, batch = 3, 2
    a, g = sequences(clients * batch, 6, 5, 4)
    a, g = a.view(clients, batch, 6, 5), g.view(clients, batch, 6, 4)
    loop_a, loop_g = list(a), list(g)
    if in_dims[0] is None:
        a, loop_a = a[0], [a[0]] * clients
    else:
        a = a.movedim(0, in_dims[0])
    if in_dims[1] is None:
        g, loop_g = g[0], [g[0]] * clients
    else:
        g = g.movedim(0, in_dims[1])
    got = torch.vmap(ghost_norms, in_dims=in_dims)(a, g)
    want = [expected(x, y) for x, y in zip(loop_a, loop_g, strict=True)]
    assert_norms(got, [torch.stack(norms) for norms in zip(*want, strict=True)])


def test_convolutions_under_vmap():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 2, 4, 6, 6, generator=generator).to(DEVICE)
    g = torch.randn(3, 2, 2, 4, 4, generator=generator).to(DEVICE)
    settings = ((3, 3), (1, 1), (0, 0), (1, 1), 1)
    got = torch.vmap(lambda a, b: conv_ghost_norms(a, b, *settings))(x, g)
    want = [conv_ghost_norms(a, b, *settings) for a, b in zip(x, g, strict=True)]
    for value, loop in zip(got, zip(*want, strict=True), strict=True):
        assert torch.equal(value, torch.stack(loop))


def test_the_operators_pass_opcheck():
    torch.library.opcheck(ghost_norms, sequences(2, 3, 4, 5))
    x, g = torch.randn(2, 4, 5, 5, device=DEVICE), torch.randn(2, 2, 3, 3, device=DEVICE)
    settings = ([3, 3], [1, 1], [0, 0], [1, 1], 1)
    torch.library.opcheck(conv_ghost_norms, (x, g, *settings))


def test_clip_in_backward_takes_its_norms_here(monkeypatch):
    assert _dispatch.choose("triton", "ghost", device=torch.device(DEVICE), elements=1) == "triton"
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 2, 9, 7, generator=generator).to(DEVICE)
    weight = torch.randn(3, 5, 7, generator=generator).to(DEVICE)
    bias = torch.randn(3, 5, generator=generator).to(DEVICE)
    calls = []
    # On a CPU numba would sum the records at once and need no norms.
    monkeypatch.setattr("aadp_kernels._torch.ghost_matrix.fast", lambda _: False)

    def gradients(fused):
        def norms(a, g):
            calls.append(fused)
            return ghost_norms(a, g)

        monkeypatch.setattr("aadp_kernels._triton.ghost.ghost_norms", norms)
        for module in ("ghost_clip", "ghost_matrix"):
            monkeypatch.setattr(f"aadp_kernels._torch.{module}.fused_norms", lambda _: fused)

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
            ghost_norms(x, y)
    x, g = torch.zeros(2, 4, 5, 5), torch.zeros(2, 2, 3, 3)
    with pytest.raises(ValueError, match="groups"):
        conv_ghost_norms(x, g, (3, 3), (1, 1), (0, 0), (1, 1), 4)
    with pytest.raises(ValueError, match="must be"):
        conv_ghost_norms(x, g[:1], (3, 3), (1, 1), (0, 0), (1, 1), 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_products_on_a_device(dtype):
    a, g = sequences(8, 200, 512, 384, dtype)
    got = ghost_norms(a, g)
    assert_norms(got, expected(a, g), 1e-4)
    assert all(torch.equal(x, y) for x, y in zip(got, ghost_norms(a, g), strict=True))
