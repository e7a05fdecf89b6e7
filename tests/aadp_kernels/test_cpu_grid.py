"""The integers of the grid form in numba are those of the torch specification."""

import numpy as np
import pytest
import torch

from aadp_kernels import MECHANISMS, Layout, NoiseKey, clip_sum_noise, privatize_, sample_noise
from aadp_kernels._torch import grid as spec
from aadp_kernels.addresses import RNGS
from aadp_kernels.grid_law import thresholds

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


def proposals(*numbers, at=0):
    """Magnitudes and signs of a ChaCha tile whose elements have these words, 64 bits each."""
    own, words = fast.Scratch.build(64), np.zeros(512, np.uint32)
    for e, number in enumerate(numbers):
        w = (8 * (e % 2) + at) * 32 + e // 2
        words[w], words[w + 32] = number >> 32, number & 0xFFFFFFFF
    fast._proposals(own.magnitudes, own.signs, own.numbers, words, 32, 8, *fast._tables())
    count = len(numbers)
    return own.magnitudes[:count].tolist(), own.signs[:count].tolist()


def test_digits_are_thresholds_that_are_at_most_the_number():
    """At the thresholds and beside them, where a guide that is off by one would show."""
    for j, table in enumerate(thresholds()):
        numbers = [0, (1 << 64) - 1, *(c + d for c in table[::7] for d in (-1, 0, 1))]
        for start in range(0, len(numbers), 64):
            part = numbers[start : start + 64]
            for got, number in zip(proposals(*part, at=2 * j + 2)[0], part, strict=True):
                assert got >> 10 * (2 - j) & 1023 == sum(c <= number for c in table)


def test_no_more_than_two_thresholds_lie_between_two_guides():
    for table in thresholds():
        _, count = np.unique([c >> 54 for c in table], return_counts=True)
        assert count.max() <= 2


def test_octaves_are_counted_to_the_end_of_the_first_words():
    for sign in (0, 1):
        zeros = [0, 1, 31, 32, 62, 63]
        numbers = [(sign << 63) | ((1 << 63) >> (z + 1) if z < 63 else 0) for z in zeros]
        magnitudes, signs = proposals(*numbers)
        assert [m >> 30 for m in magnitudes] == zeros
        assert signs == [sign] * len(zeros)


@pytest.mark.parametrize("rng", ["chacha8", "philox10"])
def test_what_its_own_words_do_not_decide_comes_from_further_ones(rng):
    address = fast.Generator.build(rng, key(rng).words, 4)
    word = 5 + (fast.DOMAINS["grid_laplace"] << fast.LAYER_BITS)
    state = address.state.copy()
    state[0], state[2], state[3] = 3 * address.blocks, 9, np.uint32(word + fast._TO_TAIL)
    for e in range(0, 64, 7):
        per_element = 1 if rng == "chacha8" else 2
        block = 3 * address.blocks + (e // 2 if rng == "chacha8" else 2 * e)
        first = [[block + i, 4, 9, word] for i in range(per_element)]
        place = torch.from_numpy(np.array(first).T.astype(np.uint32).view(np.int32).copy())
        tail = list(spec._tail_words(rng, key(rng).words, place))
        if rng == "chacha8":
            half = 8 * (e % 2)
            tail = [w for b in range(0, len(tail), 16) for w in tail[b + half : b + half + 8]]
        own = fast._more_octaves(np.empty(512, np.uint32), state.copy(), *address[1:], e)
        assert own == spec.more_octaves(tail)


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


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_without_noise_dead_rows_and_references(mechanism, dtype):
    layout = Layout.build({"a.weight": torch.zeros(30, 4), "a.bias": torch.zeros(3),
                           "empty": torch.zeros(0), "b": torch.zeros(70)})  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(5, *s, generator=generator).to(dtype) for s in layout.shapes]
    draws[0][2, 0, 0] = torch.nan
    reference = [torch.randn(s, generator=generator).to(dtype) for s in layout.shapes]
    scale = torch.tensor([[0.3, 0, 0.1], [0, 0, 0.1], [0.2, 0, 0], [0, 0, 0], [1e9, 0, 1e-9]])
    results = []
    for impl in BOTH:
        own = [t.clone() for t in draws]
        stats = privatize_(
            own, layout=layout, clip=torch.tensor([2.0, 1.0, 1e9]), scale=scale, p=1, step=1,
            mechanism=mechanism, key=key(), clients=torch.arange(5), form="grid", impl=impl,
            reference=reference, votes_at=torch.tensor([90.0, 1.0, 50.0]))  # fmt: skip
        results.append([*own, *stats[1:]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
