"""What only a GPU can show. `compute-sanitizer` runs the same tests:

    compute-sanitizer --tool memcheck python -m pytest -m gpu tests/aadp_kernels/test_triton_gpu.py
    compute-sanitizer --tool racecheck python -m pytest -m gpu -k "contention or specification" \
        tests/aadp_kernels/test_triton_gpu.py
"""

import math

import pytest
import torch

from aadp_kernels import Correlation, Layout, NoiseKey, privatize_, sample_noise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = [(64, 3, 7, 7), (64,), (512, 513), (3,), (), (0,), (1_000_003,), (4096, 1024), (17,)]
GROUPS = [0, 0, 1, 1, 2, 3, 4, 5, 5]


def tensors(rows=None, dtype=torch.float32, seed=0, device="cuda"):
    generator = torch.Generator().manual_seed(seed)
    lead = () if rows is None else (rows,)
    return [torch.randn((*lead, *s), generator=generator).to(device, dtype) for s in SIZES]


def privatized(values, device="cuda", impl="triton", rows=None, rng="philox10", **options):
    layout = Layout.build([torch.empty(s, device="meta") for s in SIZES], GROUPS)
    layers = layout.num_layers
    out = [torch.full_like(v, math.nan) for v in values]
    arguments = {
        "clip": torch.tensor([30.0, 1e3, math.inf, 1.0, 1e7, 1e3], device=device)[:layers],
        "scale": torch.tensor([0.5, 1.0, 2.0, 1.0, 0.0, 0.25], device=device)[:layers],
        "key": NoiseKey.from_seed(1, rng), "step": 3, "form": "fast",
        "clients": None if rows is None else torch.arange(rows, device=device) + 7,
    }  # fmt: skip
    stats = privatize_(values, layout=layout, out=out, impl=impl, **(arguments | options))
    return out, stats


@pytest.mark.parametrize("rng", ["philox10", "chacha8", "chacha20"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", ["wide", "fast", "grid"])
def test_the_specification_on_the_cpu(form, dtype, rng):
    """Poisoned outputs: an element that is not written is NaN."""
    options = {"form": form, "rng": rng}
    out, stats = privatized(tensors(dtype=dtype), **options)
    expected, wanted = privatized(tensors(dtype=dtype, device="cpu"), "cpu", "torch", **options)
    eps = torch.finfo(dtype).eps
    for value, reference in zip(out, expected, strict=True):
        value, reference = value.cpu().double(), reference.double()
        # Clipped layers carry a factor that may differ in its last bits.
        bound = 4 * eps * (1 + reference.abs()) + (2.0**-16 * 10 if form == "fast" else 0)
        if form == "grid":
            bound += 2 * 2.0**-30
        assert ((value - reference).abs() <= bound).all()
    assert torch.allclose(stats.l1_norm.cpu(), wanted.l1_norm, rtol=1e-6)
    assert torch.equal(stats.clipped.cpu(), wanted.clipped)
    assert torch.equal(stats.nonfinite.cpu(), wanted.nonfinite)


@pytest.mark.parametrize("rng", ["philox10", "chacha8", "chacha20"])
@pytest.mark.parametrize("mechanism", ["laplace", "gaussian"])
@pytest.mark.parametrize("form", ["wide", "grid"])
def test_noise_has_the_bits_of_the_cpu(form, mechanism, rng):
    address = {"mechanism": mechanism, "scale": 1.0, "step": 9, "client": 3, "form": form}
    address |= {"dtype": torch.float64, "offset": 12345}
    draws = [
        sample_noise((100_000,), key=NoiseKey.from_seed(1, rng), device=d, impl=i, **address).cpu()
        for d, i in (("cuda", "triton"), ("cpu", "torch"))
    ]
    assert torch.equal(*draws)


@pytest.mark.parametrize("rng", ["philox10", "chacha20"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_noise_drawn_again_has_the_bits_of_the_cpu(dtype, rng):
    """In the noise of a layer, and in a release of zeros."""
    among = Correlation((1.0, -0.9, -0.25, 0.3))
    address = {"mechanism": "gaussian", "step": 9, "correlation": among, "form": "wide"}
    drawn = [
        sample_noise((100_000,), key=NoiseKey.from_seed(1, rng), device=d, impl=i, scale=1.0,
                     dtype=dtype, offset=12345, **address).cpu()
        for d, i in (("cuda", "triton"), ("cpu", "torch"))
    ]  # fmt: skip
    assert torch.equal(*drawn)
    zeros = [t.zero_() for t in tensors(dtype=dtype)]
    out, _ = privatized(zeros, rng=rng, p=2, **address)
    expected, _ = privatized([t.cpu() for t in zeros], "cpu", "torch", rng=rng, p=2, **address)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(out, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("form", ["wide", "grid"])
def test_tensors_on_another_device_than_the_current_one(form):
    for device in ("cuda:1", "cuda:0"):
        with torch.cuda.device(0 if device == "cuda:1" else 1):
            out, _ = privatized(tensors(device=device), device, form=form)
        expected, _ = privatized(tensors(device="cpu"), "cpu", "torch", form=form)
        for value, wanted in zip(out, expected, strict=True):
            assert torch.allclose(value.cpu(), wanted, rtol=1e-6, atol=2.0**-28)


def test_repeated_runs_in_contention_give_the_same_bits():
    values = tensors(rows=6)
    first, stats = privatized(values, rows=6)
    for _ in range(20):
        again, same = privatized(values, rows=6)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(stats, same, strict=True))


def test_two_streams_in_contention():
    values = [tensors(rows=3, seed=s) for s in range(2)]
    expected = [privatized(v, rows=3)[0] for v in values]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(privatized(values[i], rows=3)[0])
    torch.cuda.synchronize()
    for result, wanted in zip(results, expected, strict=True):
        for out in result:
            assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))


@pytest.mark.parametrize("among", [None, Correlation((1.0, -0.9, 0.5))], ids=["one", "several"])
def test_graph_replay_follows_the_step_on_the_device(among):
    values, step = tensors(), torch.zeros((), dtype=torch.int64, device="cuda")
    options = {"mechanism": "gaussian", "p": 2, "correlation": among}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        privatized(values, step=step, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = privatized(values, step=step, **options)
        step += 1
    replays = []
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        replays.append([t.clone() for t in out])
    assert not torch.equal(replays[0][0], replays[1][0])
    for i, replay in enumerate(replays):
        eager, _ = privatized(values, step=i, **options)
        assert all(torch.equal(a, b) for a, b in zip(eager, replay, strict=True))


def test_no_synchronisation():
    values = tensors()
    privatized(values)
    layout = Layout.build([torch.empty(s, device="meta") for s in SIZES], GROUPS)
    clip, scale = torch.ones(2, 6, device="cuda").unbind()
    key = NoiseKey.from_seed(5, "philox10")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2):
            privatize_(values, layout=layout, clip=clip, scale=scale, key=key, step=step)
        privatize_(
            values, layout=layout, clip=clip, scale=scale, key=key, step=2, p=2,
            mechanism="gaussian", correlation=Correlation((1.0, -0.9)),
        )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bad_scales_and_clips_fail_loudly_without_a_look():
    values = tensors()
    ones = torch.ones(6, device="cuda")
    for bad in (math.nan, math.inf, -1.0):
        out, _ = privatized(values, scale=ones * bad, clip=ones)
        assert all(t.isnan().all() for t in out)
    out, _ = privatized(values, scale=ones, clip=ones, key=None)
    assert all(t.isnan().all() for t in out)
    for bad in (math.nan, -1.0):
        out, _ = privatized(values, scale=0 * ones, clip=ones * bad)
        assert not any(t.any() for t in out)


def test_more_than_two_to_the_31_elements():
    count = (1 << 31) + 4099
    x = torch.ones(count, dtype=torch.bfloat16, device="cuda")
    layout = Layout.build([x])
    place = torch.tensor([1.0], device="cuda")
    key = NoiseKey.from_seed(1, "philox10")
    privatize_([x], layout=layout, clip=place * math.inf, scale=place, key=key, step=0, form="fast")
    for start in (0, (1 << 31) - 2048, count - 4096):
        noise = sample_noise(
            (4096,), mechanism="laplace", scale=1.0, key=NoiseKey.from_seed(1, "philox10"), step=0,
            offset=start, form="fast", impl="torch",
        )  # fmt: skip
        part = x[start : start + 4096].float().cpu()
        assert ((part - 1 - noise).abs() <= 2.0**-7 * (1 + noise.abs())).all()


def test_a_cuda_graph_replays_with_the_step_it_is_given():
    """The step is a tensor that the graph itself advances: no two replays have one noise."""
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    x = tensors()
    out = [torch.empty_like(t) for t in x]
    layout = Layout.build([torch.empty(s, device="meta") for s in SIZES], GROUPS)
    bounds = torch.ones(layout.num_layers, device="cuda")
    arguments = {"layout": layout, "clip": bounds, "scale": bounds}

    def release():
        privatize_(x, out=out, key=secret, step=step, **arguments)

    secret, stream, graph = NoiseKey.from_seed(1), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        release()
    stream.synchronize()
    with torch.cuda.graph(graph):
        release()
        step.add_(1)
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append([t.clone() for t in out])
    for i, found in enumerate(seen):
        eager = tensors()
        privatize_(eager, key=NoiseKey.from_seed(1), step=i, **arguments)
        assert all(map(torch.equal, found, eager))
    assert not torch.equal(seen[0][0], seen[1][0])
