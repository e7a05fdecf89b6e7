"""Clipped sums in Triton against the plain-torch specification."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from aadp_kernels import Layout, NoiseKey, clip_sum_noise, sample_noise
from aadp_kernels._triton import clip_sum as kernels
from aadp_kernels.contract import Bounds, Noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# The bias begins in the middle of a tile and of a 128-bit word; "b" has more than one tile.
LAYOUT = Layout.build(
    {
        "a.weight": torch.zeros(23, 3),
        "a.bias": torch.zeros(5),
        "b.weight": torch.zeros(1061),
        "b.bias": torch.zeros(1),
        "c": torch.zeros(()),
        "empty": torch.zeros(0),
    }
)
CLIP = torch.tensor([20.0, 30.0, 0.5, 1.0])
CLIP2 = torch.tensor([4.0, 20.0, 0.5, 1.0])
VOTES = torch.tensor([55.0, 850.0, 0.8, 1.0])
SCALE = torch.tensor([0.5, 2.0, 0.0, 1.0])


def gradients(batch=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *s, generator=generator).to(DEVICE, dtype) for s in LAYOUT.shapes]


def dirty(dtype):
    grads = gradients(7, dtype)
    grads[0][2, 1, 1] = math.nan
    grads[1][2, 0] = math.inf
    grads[2][4, 1060] = -math.inf
    grads[3][5] = math.nan
    return grads, torch.tensor([1, 0, 1, 1, 1, 0, 1], device=DEVICE)


def run(impl, grads, **arguments):
    arguments = {
        "layout": LAYOUT, "clip": CLIP, "scale": None, "p": 1, "key": None, "step": 3, "client": 8,
        **arguments,
    }  # fmt: skip
    key = arguments.pop("key") or NoiseKey.from_seed(5, rng=arguments.pop("rng", "philox10"))
    arguments = {
        k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
    }
    return clip_sum_noise(grads, key=key, impl=impl, **arguments)


def assert_stats(got, want):
    for name in ("votes", "clipped", "nonfinite"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
        assert getattr(got, name).dtype == getattr(want, name).dtype
    if want.l1_norm is None:
        assert got.l1_norm is None
    else:
        torch.testing.assert_close(got.l1_norm, want.l1_norm, rtol=1e-14, atol=0, equal_nan=True)


def assert_sums(got, want, dtype, form, scale):
    """Wide: up to the order of the float64 sum; fast: as far as float32 noise may differ."""
    units = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-14
    loose = scale * 2.0**-18 * 16 if form == "fast" else 0.0
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g.double(), w.double(), rtol=units, atol=loose + 1e-13)


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


def test_more_pieces_than_one_and_more_slots_than_a_block(monkeypatch):
    layout = Layout.build([torch.zeros(273)])  # of no other test: plans are cached
    grads = [torch.randn(1, 273, device=DEVICE)]
    clip = torch.tensor([50.0])
    want = run("torch", grads, layout=layout, clip=clip)
    monkeypatch.setattr(kernels, "PIECE", 2)
    got = run("triton", grads, layout=layout, clip=clip)
    assert_sums(got[0], want[0], torch.float32, "wide", 0.0)
    assert_stats(got[1], want[1])


def test_empty_batch_and_all_padding():
    scale = torch.tensor([0.5, 2.0, 0.0, 1.0])
    for grads, mask in ((gradients(0), None), (gradients(3), torch.zeros(3))):
        got, stat = run("triton", grads, mask=mask, scale=scale, votes_at=VOTES)
        want, expected = run("torch", grads, mask=mask, scale=scale, votes_at=VOTES)
        assert_sums(got, want, torch.float32, "wide", 2.0)
        assert_stats(stat, expected)


def call(grads, **changes):
    """The launcher without the checks of values that a device does not make."""
    wide = {"dtype": torch.float64, "device": DEVICE}
    bounds = Bounds(changes.pop("clip", CLIP.to(**wide)), 1, None)
    arguments = {
        "scale": torch.zeros(4, **wide), "noise": None, "sums": None,
        "mask": torch.ones(len(grads[0]), dtype=torch.bool, device=DEVICE), **changes,
    }  # fmt: skip
    return kernels.clip_sum_noise(grads, LAYOUT, bounds=bounds, **arguments)


def test_values_that_only_a_device_can_see():
    grads = gradients(3)
    clip = torch.tensor([math.nan, -1.0, 0.5, 1.0], dtype=torch.float64, device=DEVICE)
    sums = call(grads, clip=clip)[0]
    for i in (0, 1, 2, 3):
        assert torch.equal(sums[i], torch.zeros_like(sums[i]))
    assert sums[4] != 0
    noise = run_noise("gaussian")
    scale = torch.tensor([-1.0, math.nan, math.inf, 1.0], dtype=torch.float64, device=DEVICE)
    assert all(s.isnan().all() for s in call(grads, scale=scale, noise=noise)[0])
    scale = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64, device=DEVICE)
    missing = call(grads, scale=scale)[0]
    assert [bool(s.isnan().any()) for s in missing] == [True, True, False, False, False, False]


def run_noise(mechanism, form="wide", step=3):
    key = NoiseKey.from_seed(5, rng="philox10")
    return Noise(key.rng, key.words, mechanism, form, step, torch.tensor([8], device=DEVICE))


def test_a_step_on_the_device_is_the_same_step():
    grads = gradients(2)
    scale = SCALE.double().to(DEVICE)
    number = call(grads, scale=scale, noise=run_noise("gaussian"))[0]
    tensor = torch.tensor(3, device=DEVICE)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            number, call(grads, scale=scale, noise=run_noise("gaussian", step=tensor))[0],
            strict=True,
        )
    )  # fmt: skip


def test_more_than_two_to_the_31_elements():
    layout = Layout.build([torch.zeros(8)])
    stride = 2**31 + 8
    try:
        storage = torch.empty(stride + 8, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("no memory for 4 GiB that are never touched")
    far = storage.as_strided((2, 8), (stride, 1))
    far.copy_(torch.arange(16).view(2, 8))
    sums = run("triton", [far], layout=layout, clip=torch.tensor([math.inf]))[0]
    assert sums[0].tolist() == [8 + 2 * i for i in range(8)]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_factor_too_small_to_be_exact_is_zero(impl):
    grads = [torch.tensor([[6.55172607892521e16, 37583350398976.0]], device=DEVICE)]
    clip = torch.tensor([2.53686876683007e-301], dtype=torch.float64)
    sums, stat = run(impl, grads, layout=Layout.build([grads[0][0]]), clip=clip, last=False)
    assert sum(map(Fraction, sums[0].tolist())) <= Fraction(clip.item())
    assert stat.clipped.item() == 1


@settings(max_examples=20, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=5, max_size=9),
    clip=st.floats(0, 1e30) | st.floats(0, 1e-300),
    p=st.sampled_from([1, 2]),
    dtype=st.sampled_from(DTYPES),
)
def test_a_record_never_contributes_more_than_the_clip_norm(values, clip, p, dtype):
    record = torch.tensor(values).to(DEVICE, dtype)[None]
    layout = Layout.build([record[0, :4], record[0, 4:]], groups=[0, 0])
    limit = torch.tensor([clip], dtype=torch.float64)
    sums, stat = run(
        "triton", [record[:, :4], record[:, 4:]], layout=layout, clip=limit, p=p, last=False
    )
    contribution = torch.cat(sums).tolist()
    power = sum(Fraction(abs(v)) ** p for v in contribution)
    assert power <= Fraction(clip) ** p
    if not stat.nonfinite and not stat.clipped:
        assert torch.equal(torch.cat(sums), record[0].double())


@settings(max_examples=10, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=9),
    clip=st.floats(1e-3, 100),
    p=st.sampled_from([1, 2]),
)
def test_a_quantised_record_never_counts_more_quanta_than_the_clip_norm(values, clip, p):
    record = torch.tensor([values], device=DEVICE)
    layout = Layout.build([record[0]])
    arguments = {"layout": layout, "clip": torch.tensor([clip], dtype=torch.float64), "p": p,
                 "form": "grid", "scale": torch.tensor([3 * clip]), "last": False}  # fmt: skip
    counts = run("triton", [record], **arguments)[0][0].tolist()
    quantum = Fraction(float(torch.tensor(3 * clip).double())) / 2**30
    assert sum(Fraction(abs(n)) ** p for n in counts) <= (Fraction(clip) / quantum) ** p
    assert any(counts) == any(abs(v) * 2**29 > clip for v in values)


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["wide", "fast", "grid"])
def test_a_device_gives_the_same_bits_every_time(form):
    grads, mask = dirty(torch.float32)
    scale = torch.tensor([0.5, 2.0, 1.0, 1.0])
    arguments = {"scale": scale, "form": form, "mask": mask, "votes_at": VOTES}
    first, stat = run("triton", grads, **arguments)
    for _ in range(20):
        again, repeated = run("triton", grads, **arguments)
        assert_same(first, again)
        assert torch.equal(stat.l1_norm.nan_to_num(), repeated.l1_norm.nan_to_num())


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["wide", "fast"])
def test_the_host_never_waits_for_the_device(form):
    grads = gradients(5)
    scale = SCALE.double().to(DEVICE)
    noise = run_noise("gaussian", form)
    call(grads, scale=scale, noise=noise)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(grads, scale=scale, noise=noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_replays_of_a_graph_differ_with_the_step():
    grads = gradients(5)
    scale = torch.ones(4, dtype=torch.float64, device=DEVICE)
    step = torch.zeros((), dtype=torch.int64, device=DEVICE)
    noise = run_noise("gaussian", step=step)
    call(grads, scale=scale, noise=noise)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(grads, scale=scale, noise=noise)[0]
        step.add_(1)
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([s.clone() for s in captured])
    assert not torch.equal(replays[0][0], replays[1][0])
    for i, replay in enumerate(replays):
        assert_same(replay, call(grads, scale=scale, noise=run_noise("gaussian", step=i))[0])


@pytest.mark.gpu
def test_two_streams_in_contention_agree_with_one():
    grads = [torch.randn(64, 50_000, device=DEVICE) for _ in range(2)]
    layout = Layout.build([torch.zeros(50_000)])
    clip = torch.tensor([100.0])
    want = [run("triton", [g], layout=layout, clip=clip)[0][0] for g in grads]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in grads]
    got = []
    for _ in range(5):
        for stream, g in zip(streams, grads, strict=True):
            with torch.cuda.stream(stream):
                got.append(run("triton", [g], layout=layout, clip=clip)[0][0])
    torch.cuda.synchronize()
    for i, value in enumerate(got):
        assert torch.equal(value, want[i % 2])
