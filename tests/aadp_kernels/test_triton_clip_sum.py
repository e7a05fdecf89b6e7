"""Clipped sums in Triton against the plain-torch specification."""

import math

import pytest
import torch

from aadp_kernels import Layout, NoiseKey, sample_noise
from tests.aadp_kernels.triton_sums import (
    CLIP,
    DTYPES,
    LAYOUT,
    SCALE,
    VOTES,
    assert_stats,
    assert_sums,
    dirty,
    gradients,
    run,
)

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLIP2 = torch.tensor([4.0, 20.0, 0.5, 1.0])


@pytest.mark.parametrize(
    ("form", "mechanism", "rng", "p"),
    [
        ("wide", "gaussian", "philox10", 2),
        ("wide", "laplace", "philox10", 1),
        ("fast", "gaussian", "philox10", 1),
        ("fast", "laplace", "philox10", 1),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_specification(dtype, form, mechanism, rng, p):
    assert_equals_the_specification(dtype, form, mechanism, rng, p)


@pytest.mark.parametrize("form", ["wide", "fast"])
def test_chacha_noise_equals_the_specification(form):
    assert_equals_the_specification(torch.bfloat16, form, "laplace", "chacha8", 1)


@pytest.mark.slow
@pytest.mark.parametrize("rng", ["chacha8", "chacha20"])
@pytest.mark.parametrize("form", ["wide", "fast"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_chacha_equals_the_specification(dtype, form, rng):
    assert_equals_the_specification(dtype, form, "gaussian", rng, 2)


def assert_equals_the_specification(dtype, form, mechanism, rng, p):
    grads, mask = dirty(dtype)
    arguments = {
        "clip": CLIP if p == 1 else CLIP2, "scale": SCALE, "p": p, "form": form,
        "mechanism": mechanism, "rng": rng, "mask": mask, "votes_at": VOTES,
    }  # fmt: skip
    got, stat = run("triton", grads, **arguments)
    want, expected = run("torch", grads, **arguments)
    assert_sums(got, want, dtype, form, 2.0)
    assert_stats(stat, expected)
    assert expected.nonfinite.tolist() == [1, 1, 0, 0]
    assert expected.clipped[:3].min() > 0


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize(
    "dtype", [DTYPES[0], *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES[1:])]
)
def test_grid_sums_are_those_of_the_specification(dtype, mechanism):
    grads, mask = dirty(dtype)
    scale = torch.tensor([0.5, 2.0, 0.1, 1.0])
    arguments = {"scale": scale, "mechanism": mechanism, "form": "grid", "mask": mask,
                 "votes_at": VOTES}  # fmt: skip
    got, stat = run("triton", grads, last=False, **arguments)
    want, expected = run("torch", grads, last=False, **arguments)
    assert_stats(stat, expected)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.int64
        # Factors of clipped records differ in their last bits, so a record by one quantum.
        assert (g - w).abs().le(len(mask)).all()
    arguments["clip"] = torch.full((4,), 1e6)
    exact = run("triton", grads, last=False, **arguments)[0]
    for g, w in zip(exact, run("torch", grads, last=False, **arguments)[0], strict=True):
        assert torch.equal(g, w)
    if dtype != torch.float32:
        return
    noisy = run("triton", grads, **arguments)[0]
    for g, w in zip(noisy, run("torch", grads, **arguments)[0], strict=True):
        assert torch.equal(g, w)


def test_votes_are_optional_and_l2_needs_no_l1():
    grads, mask = dirty(torch.float32)
    for p in (1, 2):
        got, stat = run("triton", grads, p=p, mask=mask)
        want, expected = run("torch", grads, p=p, mask=mask)
        assert_sums(got, want, torch.float32, "wide", 0.0)
        assert_stats(stat, expected)
    votes_at = torch.tensor([math.nan, math.inf, 0.0, math.nan])
    stat = run("triton", grads, mask=mask, votes_at=votes_at)[1]
    assert_stats(stat, run("torch", grads, mask=mask, votes_at=votes_at)[1])
    assert stat.votes.tolist() == [0.0, 2.0, -2.5, 0.0]


def test_weights_equal_the_specification():
    grads, mask = dirty(torch.float32)
    weights = torch.tensor([1.0, 0.25, 0.3, 0.0, 1.0, 1.0, 0.7])
    for last in (True, False):
        given = {"mask": mask, "weights": weights, "votes_at": VOTES, "last": last}
        got, stat = run("triton", grads, **given)
        want, expected = run("torch", grads, **given)
        assert_sums(got, want, want[0].dtype, "wide", 0.0)
        assert_stats(stat, expected)


@pytest.mark.parametrize("form", ["wide", "fast", "grid"])
def test_micro_batches_have_the_bits_of_one_batch(form):
    grads = gradients(7)
    scale = torch.tensor([0.5, 2.0, 1.0, 1.0])
    arguments = {"scale": scale, "form": form, "mechanism": "laplace"}
    whole = run("triton", grads, **arguments)[0]
    running = None
    for start, end in ((0, 1), (1, 6), (6, 7)):
        part = [g[start:end] for g in grads]
        running = run("triton", part, accumulate=running, last=end == 7, **arguments)[0]
        kind = torch.float32 if end == 7 else torch.int64 if form == "grid" else torch.float64
        assert all(r.dtype == kind for r in running)
    assert all(torch.equal(a, b) for a, b in zip(whole, running, strict=True))


def test_noise_is_sample_noise_and_zero_scale_keeps_every_bit():
    grads = gradients(3)
    scale = torch.tensor([0.5, 2.0, 0.0, 1.0])
    clean = run("triton", grads)[0]
    noisy = run("triton", grads, scale=scale)[0]
    assert torch.equal(clean[4], noisy[4])
    key = NoiseKey.from_seed(5, rng="philox10")
    for layer, members in enumerate(LAYOUT.members[:2]):
        noise = sample_noise(
            (LAYOUT.dims[layer],), mechanism="gaussian", scale=scale[layer].item(), key=key, step=3,
            client=8, layer=layer, device=DEVICE, dtype=torch.float64, impl="torch",
        )  # fmt: skip
        for i in members:
            piece = noise[LAYOUT.offsets[i] :][: LAYOUT.sizes[i]].view(LAYOUT.shapes[i])
            torch.testing.assert_close((noisy[i] - clean[i]).double(), piece, rtol=1e-5, atol=1e-5)


def test_bits_depend_on_neither_memory_layout_nor_neighbours():
    grads = gradients(4)
    want = run("triton", grads, p=2, clip=CLIP2, votes_at=VOTES)
    # Addresses that are no multiple of 16 bytes, strides between records, and strides within.
    offset = [torch.cat([g[:1].reshape(-1)[:1], g.reshape(-1)])[-g.numel() :] for g in grads]
    offset = [g.view(4, *s) for g, s in zip(offset, LAYOUT.shapes, strict=True)]
    strided = [torch.stack([g, g], -1)[..., 0] for g in grads]
    assert offset[2].data_ptr() % 16
    assert not strided[2].is_contiguous()
    for moved in (offset, strided):
        got = run("triton", moved, p=2, clip=CLIP2, votes_at=VOTES)
        assert all(torch.equal(a, b) for a, b in zip(got[0], want[0], strict=True))
        assert torch.equal(got[1].l1_norm, want[1].l1_norm)
    alone = run("triton", [g[2:3] for g in grads], p=2, clip=CLIP2, votes_at=VOTES)
    assert torch.equal(alone[1].l1_norm, want[1].l1_norm[2:3])


@pytest.mark.parametrize("form", ["wide", "grid"])
def test_nothing_is_read_before_it_is_written(form, monkeypatch):
    grads, mask = dirty(torch.float32)
    arguments = {"scale": torch.tensor([0.5, 2.0, 1.0, 1.0]), "form": form, "mask": mask,
                 "mechanism": "laplace", "votes_at": VOTES}  # fmt: skip
    want, expected = run("triton", grads, **arguments)
    empty = torch.empty

    def poisoned(*shape, **options):
        value = empty(*shape, **options)
        return value.fill_(math.nan if value.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
    got, stat = run("triton", grads, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert_stats(stat, expected)


def test_mixed_dtypes():
    layout = Layout.build({"a.weight": torch.zeros(30), "a.bias": torch.zeros(7)})
    grads = [torch.randn(3, 30, dtype=torch.bfloat16), torch.randn(3, 7)]
    grads = [g.to(DEVICE) for g in grads]
    clip = torch.tensor([5.0])
    got, stat = run("triton", grads, layout=layout, clip=clip)
    want, expected = run("torch", grads, layout=layout, clip=clip)
    assert stat.clipped.item() == 3
    assert_stats(stat, expected)
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w.double(), rtol=1e-2, atol=1e-6)
