"""The kernels' noise against the float64 specification, whatever the tile and the part."""

import math

import pytest
import torch

from aadp_kernels import NoiseKey, sample_noise
from aadp_kernels._torch import backend
from aadp_kernels._torch import grid as grid_spec
from aadp_kernels._torch import noise as spec
from aadp_kernels._torch.rng import random_words
from aadp_kernels.addresses import DOMAINS, key_words_needed, signed32
from aadp_kernels.contract import Noise

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from aadp_kernels._triton import grid, noise  # noqa: E402
from aadp_kernels._triton.rng import load_key  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEY = [(w * 0x9E3779B9) & 0xFFFFFFFF for w in range(11, 19)]
CLIENTS = torch.tensor([5, 2**32 - 3])
STEP, LAYER = 2**32 - 2, 2**24 - 1


def draw(rng, form, mechanism, *, low=5, count=1200, tile=2048, blocks=1, key=KEY):
    """Noise [2, count] of scale one in float64, from `noise_kernel`."""
    secure = rng.startswith("chacha")
    words = torch.tensor([signed32(w) for w in key], dtype=torch.int32, device=DEVICE)
    out = torch.full((2, count), math.nan, dtype=torch.float64, device=DEVICE)
    tiles = -(-(low + count) // tile) - low // tile
    noise.noise_kernel[(tiles, 2)](
        out, torch.ones((), dtype=torch.float64, device=DEVICE),
        torch.tensor(STEP, device=DEVICE), CLIENTS.to(DEVICE), words, LAYER, low, low + count,
        None, None, TILE=tile, GAUSSIAN=mechanism == "gaussian", FORM=form, CHACHA=secure,
        ROUNDS=int(rng[6:]), BLOCKS=blocks, PARTS=noise.parts(form, secure),
        enable_fp_fusion=form == "fast",
    )  # fmt: skip
    return out.cpu()


def fast_words(rng, low, count, domain):
    """Words of the elements low .. low + count - 1: int64 [2, count], unsigned."""
    e = torch.arange(low, low + count)
    if rng.startswith("chacha"):
        block, word = 32 * (e // 512) + e % 128 // 4, 4 * (e % 512 // 128) + e % 4
    else:
        block, word = e // 4, e % 4
    rows = []
    for client in CLIENTS.tolist():
        fields = [STEP, client, LAYER + domain * 2**24]
        counters = torch.stack(
            [block.int(), *(torch.full((count,), signed32(f), dtype=torch.int32) for f in fields)]
        )
        words = random_words(rng, KEY[: key_words_needed(rng)], counters)
        rows.append(words.gather(0, word[None])[0].long() & 0xFFFFFFFF)
    return torch.stack(rows)


def fast_reference(rng, mechanism, low, count):
    """The fast form by its definition, in float64; `low` and `count` even."""
    domain = 4 if mechanism == "gaussian" else 5
    w, t = (fast_words(rng, low, count, d).double() for d in (domain, domain + 2))
    if mechanism == "laplace":
        n = (w / 2).floor()
        u = torch.where(n >= 2**12, n + 0.5, n + (t + 0.5) * 2.0**-32) * 2.0**-31
        return u.log() * torch.where(w % 2 == 1, 1.0, -1.0)
    w0, w1, t = w[:, 0::2], w[:, 1::2], t[:, 0::2]
    u = torch.where(w0 >= 2**12, w0 + 0.5, w0 + (t + 0.5) * 2.0**-32) * 2.0**-32
    angle = math.pi * (torch.where(w1 >= 2**31, w1 - 2**32, w1) + 0.5) * 2.0**-31
    radius = (-2 * u.log()).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(1)


def fast_tolerance(mechanism, expected):
    """What float32 allows: near u = 1 the square root turns its error e of ln u into e / radius."""
    bound = 2.0**-18 * (1 + expected.abs())
    if mechanism == "gaussian":
        radius = expected.unflatten(1, (-1, 2)).norm(dim=2).repeat_interleave(2, 1)
        bound += (2.0**-21 / radius).clamp(max=2.0**-10)
    return bound


MECHANISMS = ["laplace", "gaussian"]
CASES = [("philox10", 1), ("philox10", 2), ("chacha8", 1)]


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize(("rng", "blocks"), [*CASES, ("philox10", 4)])
def test_wide_has_the_bits_of_the_specification(rng, blocks, mechanism):
    out = draw(rng, "wide", mechanism, blocks=blocks)
    source = Noise(rng, KEY[: key_words_needed(rng)], mechanism, "wide", STEP, CLIENTS)
    expected = spec.standard_noise(source, [(LAYER, 5, 1200)])[0]
    if mechanism == "gaussian":
        # torch's own square root may be off by one ulp on a CPU.
        assert torch.allclose(out, expected, rtol=5e-16, atol=0)
    else:
        assert torch.equal(out, expected)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize(("rng", "blocks"), CASES)
def test_fast_is_its_definition(rng, blocks, mechanism):
    out = draw(rng, "fast", mechanism, low=6, blocks=blocks)
    expected = fast_reference(rng, mechanism, 6, 1200)
    assert ((out - expected).abs() <= fast_tolerance(mechanism, expected)).all()


@pytest.mark.parametrize("form", ["fast", "wide"])
def test_element_does_not_depend_on_tile_or_start(form):
    whole = draw("philox10", form, "gaussian", low=0, count=2048, tile=1024)
    part = draw("philox10", form, "gaussian", low=1023, count=700, tile=512, blocks=2)
    assert torch.equal(whole[:, 1023:1723], part)


def test_streams_of_rows_and_forms_differ():
    wide, fast = draw("philox10", "wide", "laplace"), draw("philox10", "fast", "laplace")
    assert not (wide[0] == wide[1]).any()
    assert not torch.isclose(wide, fast, rtol=1e-3).all()


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("rng", ["philox10", "chacha8"])
def test_tail_words_are_used(rng, mechanism):
    """2^21 elements hold a few whose word alone cannot tell the magnitude."""
    count = 1 << 21
    out = draw(rng, "fast", mechanism, low=0, count=count, tile=1 << 16)
    expected = fast_reference(rng, mechanism, 0, count)
    cut = 19 * math.log(2) if mechanism == "laplace" else math.sqrt(40 * math.log(2))
    magnitude = expected.view(2, -1, 2).norm(dim=2) if mechanism == "gaussian" else expected.abs()
    assert 1 <= (magnitude > cut).sum() < 40
    assert ((out - expected).abs() <= fast_tolerance(mechanism, expected)).all()


def grid_case(rng, mechanism, count):
    words = KEY[: key_words_needed(rng)]
    source = Noise(rng, words, mechanism, "grid", STEP, CLIENTS.to(DEVICE))
    return source, (LAYER, 5, count), 0.5


GRID = [
    pytest.param("philox10", "laplace", 300),
    *(
        pytest.param(rng, mechanism, 300, marks=pytest.mark.slow)
        for rng in ("philox10", "chacha8")
        for mechanism in MECHANISMS
    ),
]


@pytest.mark.parametrize(("rng", "mechanism", "count"), GRID)
def test_grid_noise_is_that_of_the_specification(rng, mechanism, count):
    case = grid_case(rng, mechanism, count)
    for dtype in (torch.int64, torch.float64):
        out, expected = (f.scaled_noise(*case, dtype) for f in (grid, backend))
        assert torch.equal(out, expected)


@triton.jit
def octaves_kernel(out, key_pointer, CHACHA: tl.constexpr):
    key = load_key(key_pointer, CHACHA)
    first = tl.full([], 32, tl.int64)
    index = grid.grid_index(16, False, CHACHA)
    step, client, layer = first.to(tl.uint32), (first + 1).to(tl.uint32), (first + 2).to(tl.uint32)
    start = tl.where(index % 2 == 0, 63, 5).to(tl.int64)
    octaves = grid.more_octaves(start, first, step, client, layer, key, 16, CHACHA, 8)
    tl.store(out + index, octaves)


@pytest.mark.slow
@pytest.mark.parametrize("secure", [False, True])
def test_octaves_that_63_bits_cannot_tell_go_on_in_the_tail_words(secure):
    words = torch.tensor([signed32(w) for w in KEY], dtype=torch.int32, device=DEVICE)
    out = torch.zeros(16, dtype=torch.int64, device=DEVICE)
    octaves_kernel[(1,)](out, words, CHACHA=secure)
    rng = "chacha8" if secure else "philox8"
    for e in range(16):
        blocks = torch.tensor([(32 + e) // 2] if secure else [2 * (32 + e), 2 * (32 + e) + 1])
        fields = (32, 33, 34 + DOMAINS["grid_laplace"] * 2**24)
        address = torch.stack([blocks.int(), *(blocks.int() * 0 + v for v in fields)])
        tail = list(grid_spec._tail_words(rng, KEY if secure else KEY[:2], address))
        if secure:
            half = 8 * (e % 2)
            tail = [w for b in range(0, len(tail), 16) for w in tail[b + half : b + half + 8]]
        assert out[e] == (5 if e % 2 else grid_spec.more_octaves(tail))


@pytest.mark.parametrize("form", ["wide", "fast", "grid"])
def test_sample_noise_draws_here(form):
    address = {"mechanism": "laplace", "step": 9, "client": CLIENTS.to(DEVICE), "form": form}
    address |= {"offset": 100, "layer": 3}
    scale = torch.tensor([0.5, 2.0, 0.0], device=DEVICE)
    for size in (1.5, scale):
        draws = [
            sample_noise((2, 3), impl=impl, key=NoiseKey.from_seed(1, "philox10"), scale=size,
                         device=DEVICE, **address)
            for impl in ("triton", "torch")
        ]  # fmt: skip
        assert draws[0].dtype == torch.float32
        assert torch.allclose(*draws, rtol=0 if form != "fast" else 1e-5, atol=1e-5)
        if form != "fast":
            assert torch.equal(*draws)
