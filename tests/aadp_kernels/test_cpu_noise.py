"""Words and noise of the numba implementation have the bits of the torch specification."""

import math

import numpy as np
import pytest
import torch

from aadp_kernels import MECHANISMS, addresses, poisson_mask
from aadp_kernels._torch.rng import random_words
from tests.aadp_kernels.cpu_inputs import BOTH, close, key, noise, same_bits
from tests.late import stats

numba = pytest.importorskip("numba")
fast_rng = pytest.importorskip("aadp_kernels._cpu.rng")


def tile(rng, key_words, counter):
    """Blocks counter, counter + 1, ... of a tile, uint32 [words of a block, blocks]."""
    generator = fast_rng.Generator.build(rng, key_words)
    generator.state[:4] = counter
    words = np.empty(fast_rng.WORDS, np.uint32)
    fast_rng.fill_words(words, *generator)
    words = words.reshape(4, 4, fast_rng.LANES)
    if generator.blocks == fast_rng.LANES:
        return words.reshape(16, -1)
    return words.transpose(1, 0, 2).reshape(4, -1)


def hexadecimal(words):
    return " ".join(f"{w:08x}" for w in words[:, 0].tolist())


def test_chacha20_rfc8439_block():
    words = [int.from_bytes(bytes(range(4 * i, 4 * i + 4)), "little") for i in range(8)]
    assert hexadecimal(tile("chacha20", words, (1, 0x09000000, 0x4A000000, 0))) == (
        "e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3 "
        "466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2"
    )


@pytest.mark.parametrize(
    ("rng", "counter", "words", "expected"),
    [
        ("philox10", (0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("philox10", (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("philox10", (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_random123(rng, counter, words, expected):
    assert hexadecimal(tile(rng, words, counter)) == expected


@pytest.mark.parametrize("rng", addresses.RNGS)
def test_words_equal_the_specification(rng):
    generator = np.random.default_rng(0)
    words = generator.integers(0, 1 << 32, addresses.key_words_needed(rng)).tolist()
    counter = generator.integers(0, 1 << 32, 4)
    counter[0] = (1 << 32) - 17
    got = tile(rng, words, counter)
    counters = np.repeat(counter[:, None], got.shape[1], 1)
    counters[0] += np.arange(got.shape[1])
    counters = torch.from_numpy(counters.astype(np.uint32).view(np.int32))
    expected = random_words(rng, words, counters)
    assert np.array_equal(got.view(np.int32), expected.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("rng", addresses.RNGS)
def test_noise_has_the_bits_of_the_specification(rng, mechanism, dtype):
    clients = torch.tensor([4, 9, 0, (1 << 32) - 1, 7, 5])[::2]
    for shape, change in (
        ((1,), {}),
        ((7,), {"offset": 3}),
        ((9, 113), {"offset": 5, "layer": (1 << 24) - 1}),
        ((20_001,), {"offset": (1 << 33) - 20_001, "client": 8}),
        ((3, 33, 71), {"client": clients, "offset": 1}),
        ((3, 2), {"client": clients, "scale": torch.tensor([0.0, 2.5])}),
        ((3, 5), {"client": clients, "scale": torch.tensor(0.3)}),
    ):
        a, b = (noise(impl, shape, mechanism, rng, dtype=dtype, **change) for impl in BOTH)
        assert same_bits(a, b), (shape, change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("rng", addresses.RNGS)
def test_fast_noise_is_close_to_the_specification(rng, mechanism, dtype):
    clients = torch.tensor([4, 9, 0, (1 << 32) - 1, 7, 5])[::2]
    for shape, change in (
        ((1,), {}),
        ((7,), {"offset": 3}),
        ((9, 113), {"offset": 509, "layer": (1 << 24) - 1}),
        ((40_001,), {"offset": (1 << 34) - 40_001, "client": 8}),
        ((3, 33, 71), {"client": clients, "offset": 1}),
        ((3, 5), {"client": clients, "scale": torch.tensor(0.3)}),
    ):
        a, b = (noise(i, shape, mechanism, rng, dtype=dtype, form="fast", **change) for i in BOTH)
        assert close(b, a, 0.7), (shape, change)


@pytest.mark.parametrize("rng", ["philox10", "chacha8"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_fast_noise_is_refined_where_the_word_is_small(rng, mechanism):
    generator = fast_rng.Generator.build(rng, key(rng).words, (1 << 32) - 1)
    generator.state[3] = addresses.DOMAINS[f"fast_{mechanism}"] << 24
    words, stride = np.empty(fast_rng.WORDS, np.uint32), 2 if mechanism == "gaussian" else 1
    for tile in range(1 << 15):
        generator.state[0] = tile * generator.blocks
        fast_rng.fill_words(words, *generator)
        word = words.reshape(4, 4, 32).transpose(0, 2, 1).reshape(-1)[::stride].astype(np.int64)
        number = word if mechanism == "gaussian" else word >> 1
        if (number < 1 << 12).any():
            break
    kwargs = {"dtype": torch.float64, "form": "fast", "scale": 1.0, "offset": 512 * tile}
    a, b = (noise(i, (512,), mechanism, rng, **kwargs) for i in BOTH)
    assert close(b, a, 1.0)
    e = stride * int((number < 1 << 12).argmax())
    torch.testing.assert_close(b[e : e + stride], a[e : e + stride], rtol=2.0**-23, atol=0)
    u = (number.min() + 0.5) * 2.0 ** (-31 if stride == 1 else -32)
    coarse = -math.log(u) if stride == 1 else math.sqrt(-2 * math.log(u))
    assert abs(float(b[e : e + stride].norm()) / coarse - 1) > 2.0**-22


def test_the_smallest_words_reach_the_cutoff():
    from aadp_kernels._cpu import transform

    words, tails = np.zeros((2, 4, 4, 32), np.uint32)
    words[0, 1] = 1
    words[0, 2, 1] = 1 << 13
    laplace, gaussian = np.full((2, 512), 99, np.float32)
    transform.refine(laplace, words.ravel(), tails.ravel(), False)
    transform.refine(gaussian, words.ravel(), tails.ravel(), True)
    cutoffs = addresses.CUTOFFS
    assert laplace[0] == np.float32(cutoffs["laplace", "fast"])
    assert laplace[1] == -laplace[0]
    assert laplace[6] == 99  # large enough to be left alone
    assert gaussian[2] == np.float32(cutoffs["gaussian", "fast"])
    assert gaussian[6] == 99


@pytest.mark.parametrize("form", ["wide", "fast"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_an_element_does_not_depend_on_the_size_of_the_call(mechanism, form):
    kwargs = {"dtype": torch.float64, "form": form}
    whole = noise("auto", (2000,), mechanism, **kwargs)
    parts = [noise("auto", (20,), mechanism, offset=i, **kwargs) for i in range(0, 2000, 20)]
    assert same_bits(torch.cat(parts), whole)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_million_elements_are_equal_on_one_and_on_three_threads(mechanism):
    threads = torch.get_num_threads()
    expected = noise("torch", (2, 300_001), mechanism, client=torch.tensor([1, 2]))
    fast = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            clients = torch.tensor([1, 2])
            assert same_bits(noise("numba", (2, 300_001), mechanism, client=clients), expected)
            fast.append(noise("numba", (2, 300_001), mechanism, client=clients, form="fast"))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(*fast)


@pytest.mark.parametrize("rng", addresses.RNGS)
def test_coins_equal_the_specification(rng):
    for n in (1, 7, 64, 5003):
        clients = torch.tensor([3, 0, 77, 5])
        for rates, client in ((0.3, 6), ([0.0, 1.0, 1e-3, 0.5], clients)):
            a, b = (
                poisson_mask(n, rates, key=key(rng), step=4, client=client, impl=impl)
                for impl in BOTH
            )
            assert torch.equal(a, b)
    assert poisson_mask(0, 0.5, key=key(rng), step=0, impl="numba").shape == (0,)


@pytest.mark.parametrize("form", ["wide", "fast"])
@pytest.mark.parametrize("rng", addresses.RNGS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_distribution_accepts_the_scale_and_rejects_others(rng, mechanism, form):
    law = {"gaussian": stats.norm, "laplace": stats.laplace}[mechanism]
    values = noise("numba", (20_000,), mechanism, rng, dtype=torch.float64, form=form).numpy()
    assert stats.kstest(values, law(scale=0.7).cdf).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(values, law(scale=0.7 * wrong).cdf).pvalue < 1e-12


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_coins_accept_the_rate_and_reject_others(rate):
    heads = int(poisson_mask(40_000, rate, key=key("philox10"), step=0, impl="numba").sum())
    assert stats.binomtest(heads, 40_000, rate).pvalue > 1e-3
    for wrong in (2 / 3 * rate, min(1.0, 3 / 2 * rate)):
        assert stats.binomtest(heads, 40_000, wrong).pvalue < 1e-6
