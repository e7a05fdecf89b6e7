"""The integers of the grid form in numba are those of the torch specification."""

import numpy as np
import pytest
import torch

from aadp_kernels import MECHANISMS, Layout, NoiseKey, clip_sum_noise, privatize_, sample_noise
from aadp_kernels._torch import grid as spec
from aadp_kernels._torch.rng import RNGS

pytest.importorskip("numba")
fast = pytest.importorskip("aadp_kernels._cpu.grid")

BOTH = ("torch", "numba")


def key(rng="chacha20"):
    return NoiseKey.from_seed(3, rng=rng)


def integers(impl, shape, mechanism, rng="chacha20", **kwargs):
    kwargs = {"dtype": torch.int64, "scale": 1.0, "step": (1 << 32) - 1, **kwargs}
    return sample_noise(shape, mechanism=mechanism, key=key(rng), form="grid", impl=impl, **kwargs)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("rng", RNGS)
def test_integers_equal_the_specification(rng, mechanism):
    for shape, change in (
        ((1,), {}),
        ((70,), {"offset": 61}),
        ((3, 501), {"client": torch.tensor([4, 0, (1 << 32) - 1]), "offset": 33}),
        ((300,), {"offset": (1 << 30) - 300, "layer": (1 << 24) - 1}),
    ):
        a, b = (integers(impl, shape, mechanism, rng, **change) for impl in BOTH)
        assert torch.equal(a, b), (shape, change)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_scaled_noise_has_the_bits_of_the_specification(mechanism):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for scale in (0.3, torch.linspace(0, 2, 300, dtype=torch.float64)):
            a, b = (
                integers(impl, (300,), mechanism, dtype=dtype, scale=scale, offset=1)
                for impl in BOTH
            )
            assert torch.equal(a, b)


def test_digits_are_thresholds_that_are_at_most_the_number():
    """At the thresholds and beside them, where a guide that is off by one would show."""
    tables, guides = fast._tables()
    for j, table in enumerate(spec.thresholds()):
        numbers = [0, (1 << 64) - 1, *(c + d for c in table[::31] for d in (-1, 0, 1))]
        for number in numbers:
            words = np.zeros(512, np.uint32)
            words[(2 * j + 2) * 32], words[(2 * j + 3) * 32] = number >> 32, number & 0xFFFFFFFF
            remainder = fast._proposal(words, 32, 8, 0, tables, guides)[2]
            assert remainder >> 10 * (2 - j) & 1023 == sum(c <= number for c in table)


def test_octaves_are_counted_to_the_end_of_the_first_words():
    tables, guides = fast._tables()
    for sign in (0, 1):
        for zeros in (0, 1, 31, 32, 62, 63):
            number = (sign << 63) | ((1 << 63) >> (zeros + 1) if zeros < 63 else 0)
            words = np.zeros(512, np.uint32)
            words[0], words[32] = number >> 32, number & 0xFFFFFFFF
            assert fast._proposal(words, 32, 8, 0, tables, guides)[:2] == (sign, zeros)


def test_what_its_own_words_do_not_decide_comes_from_the_specification():
    segment, clients = (5, 7, 40), torch.tensor([2, 9])
    address = ("chacha8", key("chacha8").words, [segment], clients)
    (expected,) = spec.integer_noise(*address, step=4, mechanism="laplace")
    marked = expected.clone()
    marked[1, 3] = marked[0, 39] = fast.UNKNOWN
    fast.draw_unknown(marked, *address[:2], segment, clients, 4, "laplace")
    assert torch.equal(marked, expected)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_threads_change_nothing(mechanism):
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(integers("numba", (40_001,), mechanism))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_releases_have_the_bits_of_the_specification(mechanism):
    shapes = {"a.weight": torch.zeros(30, 4), "a.bias": torch.zeros(3), "b": torch.zeros(70)}
    layout = Layout.build(shapes)
    clip, scale = torch.tensor([2.0, 1e9]), torch.tensor([0.3, 0.1])
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(5, *s, generator=generator) for s in layout.shapes]
    updates, sums = [], []
    for impl in BOTH:
        own = [t.clone() for t in draws]
        privatize_(own, layout=layout, clip=clip, scale=scale, mechanism=mechanism, key=key(),
                   step=1, clients=torch.arange(5), form="grid", impl=impl)  # fmt: skip
        updates.append(own)
        sums.append(clip_sum_noise(
            draws, layout=layout, clip=clip, scale=scale, p=1, mechanism=mechanism, key=key(),
            step=2, form="grid", impl=impl)[0])  # fmt: skip
    for results in (updates, sums):
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
