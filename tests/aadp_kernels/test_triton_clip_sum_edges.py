"""Clipped sums in Triton: edges of numbers and shapes, and calls on a device."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aadp_kernels import Layout, NoiseKey
from aadp_kernels._triton import clip_sum as kernels
from aadp_kernels.contract import Bounds, Noise
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
        "scale": torch.zeros(4, **wide), "noise": None, "sums": None, "weights": None,
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
