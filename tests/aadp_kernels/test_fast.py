"""The fast form: its words, its transforms against the math library, its tails and its law."""

import math

import pytest
import torch

from aadp_kernels import (
    FORMS,
    MECHANISMS,
    Layout,
    NoiseKey,
    clip_sum_noise,
    max_elements,
    privatize_,
    sample_noise,
    tail_cutoff,
)
from aadp_kernels._torch import noise as spec
from aadp_kernels._torch.rng import random_words
from aadp_kernels.addresses import RNGS, signed32
from tests.late import stats

KEY = NoiseKey.from_seed(31)
LAWS = {"gaussian": "norm", "laplace": "laplace"}


def again(key):
    """An equal key that remembers nothing."""
    return NoiseKey.from_bytes(key._secret, key.rng, key.simulated)


def draw(shape, mechanism="gaussian", key=KEY, **kwargs):
    kwargs = {"scale": 1.0, "step": 3, "dtype": torch.float64, "impl": "torch", **kwargs}
    return sample_noise(shape, mechanism=mechanism, key=again(key), form="fast", **kwargs)


def word(key, domain, element, *, step=3, client=0, layer=0):
    """The word of an element, by the addresses in the docstring of the specification."""
    if key.rng.startswith("chacha"):
        tile, r, t, c = element // 512, element % 512 // 128, element % 128 // 4, element % 4
        block, index = 32 * tile + t, 4 * r + c
    else:
        block, index = element // 4, element % 4
    counter = (block, step, client, layer + (domain << 24))
    counters = torch.tensor([[signed32(w)] for w in counter], dtype=torch.int32)
    return random_words(key.rng, key.words, counters)[index, 0].item() & 0xFFFFFFFF


def laplace(w, tail):
    n = w >> 1
    u = n + 0.5 if n >= 4096 else n + (tail + 0.5) * 2.0**-32
    return -math.log(u * 2.0**-31) * (-1 if w & 1 else 1)


def gaussian(w0, w1, tail):
    u = w0 + 0.5 if w0 >= 4096 else w0 + (tail + 0.5) * 2.0**-32
    radius = math.sqrt(-2 * math.log(u * 2.0**-32))
    angle = math.pi * ((signed32(w1) + 0.5) * 2.0**-31)
    return radius * math.cos(angle), radius * math.sin(angle)


@pytest.mark.parametrize("rng", RNGS)
def test_equals_the_math_library_at_the_address(rng):
    key = NoiseKey.from_seed(2, rng=rng)
    start, count = 16 * 512 + 300, 600
    address = {"step": (1 << 32) - 1, "client": 9, "layer": (1 << 24) - 1}
    got = draw((count,), "laplace", key, offset=start, **address).tolist()
    for i in (0, 1, 127, 128, 211, 212, 599):
        expected = laplace(word(key, 5, start + i, **address), 0)
        assert got[i] == pytest.approx(expected, rel=1e-14, abs=1e-300)
    got = draw((count,), "gaussian", key, offset=start, **address).tolist()
    for i in (0, 126, 128, 212, 598):
        words = (word(key, 4, start + i + j, **address) for j in range(2))
        assert got[i : i + 2] == pytest.approx(gaussian(*words, 0), rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("rng", RNGS)
def test_small_words_are_refined_by_the_tail_word_of_their_address(rng, monkeypatch):
    monkeypatch.setattr(spec, "FAST_REFINED_BELOW", 1 << 29)
    key = NoiseKey.from_seed(4, rng=rng)
    noise = draw((700,), "laplace", key).tolist()
    refined = 0
    for i in range(500, 700):
        w = word(key, 5, i)
        if w >> 1 < 1 << 29:
            refined += 1
            u = (w >> 1) + (word(key, 7, i) + 0.5) * 2.0**-32
            assert abs(noise[i]) == pytest.approx(-math.log(u * 2.0**-31), rel=1e-14)
    assert refined > 20
    noise = draw((700,), "gaussian", key).view(-1, 2).norm(dim=1).tolist()
    refined = 0
    for i in range(250, 350):
        w = word(key, 4, 2 * i)
        if w < 1 << 29:
            refined += 1
            u = w + (word(key, 6, 2 * i) + 0.5) * 2.0**-32
            assert noise[i] == pytest.approx(math.sqrt(-2 * math.log(u * 2.0**-32)), rel=1e-13)
    assert refined > 5


def test_tails_of_the_transforms_reach_the_cutoff():
    counters = torch.zeros((4, 1), dtype=torch.int32)
    words = torch.tensor([[0], [1], [8191], [8192]], dtype=torch.int32)
    key = KEY.derive("x")
    tails = [word(NoiseKey(key._secret, "philox10"), 7, i, step=0) for i in range(4)]
    philox = NoiseKey(key._secret, "philox10").words
    address = counters.clone()
    address[3] = 5 << 24
    got = spec._fast_laplace("philox10", philox)(words, address).tolist()
    expected = [laplace(w, t) for w, t in zip([0, 1, 8191, 8192], tails, strict=True)]
    assert got == pytest.approx(expected, rel=1e-14)
    assert tail_cutoff("laplace", "fast") == pytest.approx(-math.log(2.0**-33 * 2.0**-31))
    assert tail_cutoff("gaussian", "fast") == pytest.approx(math.sqrt(-2 * math.log(2.0**-65)))
    assert 20 < got[0] <= tail_cutoff("laplace", "fast")


@pytest.mark.parametrize("rng", RNGS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_noise_is_a_function_of_its_address(rng, mechanism, monkeypatch):
    key = NoiseKey.from_seed(2, rng=rng)
    whole = draw((2000,), mechanism, key)
    for start, stop in ((0, 1), (1, 2), (3, 517), (511, 513), (513, 999), (1999, 2000)):
        assert torch.equal(draw((stop - start,), mechanism, key, offset=start), whole[start:stop])
    rows = draw((3, 50), mechanism, key, client=torch.tensor([4, 0, 9]), offset=1000)
    assert torch.equal(rows[1], whole[1000:1050])
    assert torch.equal(rows[2], draw((50,), mechanism, key, client=9, offset=1000))
    for other in (dict(step=4), dict(client=1), dict(layer=1), dict(offset=512)):
        assert (draw((2000,), mechanism, key, **other) == whole).sum() == 0
    assert (draw((2000,), mechanism, key) == draw_wide(2000, mechanism, key)).sum() == 0
    monkeypatch.setattr(spec, "_chunk_columns", lambda device, words: 13)
    assert torch.equal(draw((2000,), mechanism, key), whole)


def draw_wide(count, mechanism, key):
    return sample_noise((count,), mechanism=mechanism, key=key, scale=1.0, step=3,
                        dtype=torch.float64)  # fmt: skip


@pytest.mark.parametrize("rng", RNGS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_distribution_accepts_the_scale_and_rejects_others(rng, mechanism, impl):
    key = NoiseKey.from_seed(5, rng=rng)
    noise = draw((20_000,), mechanism, key, scale=0.3, dtype=torch.float32, impl=impl).numpy()
    law = getattr(stats, LAWS[mechanism])
    assert stats.kstest(noise, law(scale=0.3).cdf).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(noise, law(scale=0.3 * wrong).cdf).pvalue < 1e-12


def test_neighbours_are_uncorrelated():
    noise = draw((1 << 18,))
    for lag in (1, 2, 3, 4, 8, 128, 512):
        for value in (noise, noise.square(), noise.abs()):
            pair = torch.corrcoef(torch.stack((value[:-lag], value[lag:])))[0, 1].item()
            assert abs(pair) < 5 / 2**9


def test_last_address_of_the_stream():
    assert [max_elements("chacha8", form) for form in ("wide", "fast")] == [1 << 35, 1 << 36]
    assert [max_elements("philox10", form) for form in ("wide", "fast")] == [1 << 33, 1 << 34]
    end = 1 << 36
    assert draw((3,), offset=end - 3).shape == (3,)
    with pytest.raises(ValueError, match="offset"):
        draw((4,), offset=end - 3)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_privatize_and_clip_sum_add_it(mechanism):
    x = torch.zeros(70)
    layout = Layout.build([x])
    arguments = {"layout": layout, "clip": torch.ones(1), "scale": torch.tensor([0.5]), "p": 1,
                 "mechanism": mechanism, "step": 3, "form": "fast"}  # fmt: skip
    expected = draw((70,), mechanism, scale=0.5, dtype=torch.float32)
    privatize_([x], impl="torch", key=again(KEY), **arguments)
    assert torch.equal(x, expected)
    (total,), _ = clip_sum_noise([torch.zeros(2, 70)], impl="torch", key=again(KEY), **arguments)
    assert torch.equal(total, expected)


def test_unknown_forms_and_implementations_that_lack_one(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert FORMS == ("wide", "fast", "grid")
    with pytest.raises(ValueError, match="form must be one of wide, fast, grid, got 'slow'"):
        sample_noise((3,), mechanism="laplace", scale=1.0, key=KEY, step=0, form="slow")
    with pytest.raises(ValueError, match="impl must not be 'triton'"):
        draw((3,), impl="triton")
