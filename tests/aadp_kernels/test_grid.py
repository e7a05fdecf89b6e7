"""The grid form of noise: exact tables, its law, its addresses and its quantum."""

import itertools
import math
from bisect import bisect_right
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aadp_kernels import MECHANISMS, NoiseKey, grid, grid_law, max_elements, tail_cutoff
from aadp_kernels._torch import grid as spec
from aadp_kernels._torch import noise as wide
from aadp_kernels._torch.rng import random_words
from aadp_kernels.addresses import RNGS, signed32
from aadp_kernels.contract import Noise
from aadp_kernels.grid_law import thresholds
from tests.aadp_kernels.grid_draws import LN2, T, draw
from tests.late import stats

LAWS = {"gaussian": "norm", "laplace": "laplace"}


@pytest.fixture(autouse=True)
def _sixty_digits():
    with localcontext() as context:
        context.prec = 60
        yield


def test_tables_are_the_rounded_distribution_functions():
    for j, table in enumerate(thresholds()):
        assert len(table) == 1023
        width, whole = Decimal(1 << 10 * (j + 1)), 1 - (-LN2 / (1 << 10 * j)).exp()
        edges = [0, *table, 1 << 64]
        assert all(a < b for a, b in itertools.pairwise(edges))
        for v, threshold in enumerate(table, 1):
            exact = (1 - (-v * LN2 / width).exp()) / whole * 2**64
            assert abs(threshold - exact) <= Decimal("0.5000001")


def probability(k):
    """Of the integer k, exactly as drawn: octaves times three digits times the sign."""
    g = k if k >= 0 else -1 - k
    octaves, rest = divmod(g, T)
    value = Fraction(1, 2 ** (octaves + 2))
    for j, table in enumerate(thresholds()):
        edges, digit = [0, *table, 1 << 64], rest >> (20 - 10 * j) & 1023
        value *= Fraction(edges[digit + 1] - edges[digit], 1 << 64)
    return value


def test_probabilities_are_those_of_the_floor_of_a_laplace_variable():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 60 * T, (300,), generator=generator).tolist()
    edges = [0, 1, 1023, 1024, 2**20 - 1, 2**20, T - 1, T, T + 1, 31 * T, 62 * T + 5]
    eta = Decimal(grid_law.inexactness("laplace", 1)[0]) / 2
    for g in edges + drawn:
        cell = ((-LN2 * g / T).exp() - (-LN2 * (g + 1) / T).exp()) / 2
        for k in (g, -1 - g):
            p = probability(k)
            assert abs((Decimal(p.numerator) / Decimal(p.denominator) / cell).ln()) <= eta
    assert 1e-17 < eta < 3e-16


def element_words(key, mechanism, element, attempt=0, *, step=3, client=0, layer=0):
    """The 8 or 16 words of an element, by the addresses in the docstring of the specification."""
    domain, need = (8, 8) if mechanism == "laplace" else (16 + attempt, 16)
    width = 16 if key.rng.startswith("chacha") else 4
    first = element * need // width
    words = []
    for block in range(first, first + max(1, need // width)):
        counter = (block, step, client, layer + (domain << 24))
        counters = torch.tensor([[signed32(w)] for w in counter], dtype=torch.int32)
        words += random_words(key.rng, key.words, counters)[:, 0].tolist()
    start = element * need % width
    return [w & 0xFFFFFFFF for w in words[start : start + need]]


def scalar(key, mechanism, element, **address):
    """The sampler once more, on Python's integers and math library."""
    for attempt in range(128):
        words = element_words(key, mechanism, element, attempt, **address)
        first, *digits = (words[i] << 32 | words[i + 1] for i in (0, 2, 4, 6))
        negative, octaves = first >> 63, 63 - (first & (1 << 63) - 1).bit_length()
        g = octaves
        for table, number in zip(thresholds(), digits, strict=True):
            g = g << 10 | bisect_right(table, number)
        if mechanism == "laplace":
            return -1 - g if negative else g
        zeros = 64 - (words[8] << 32 | words[9]).bit_length()
        mantissa = 0.5 + ((words[10] << 32 | words[11]) // 2048 + 0.5) * 2.0**-54
        x = (g / T - math.log(2)) ** 2 / 2
        if zeros * math.log(2) - math.log(mantissa) > x and not (negative and g == 0):
            return -g if negative else g
    raise AssertionError


@pytest.mark.parametrize("rng", RNGS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_equals_scalar_code_at_the_address(rng, mechanism):
    key = NoiseKey.from_seed(2, rng=rng)
    address = {"step": (1 << 32) - 1, "client": 9, "layer": (1 << 24) - 1}
    got = draw((40,), mechanism, key, offset=1001, **address).tolist()
    assert got == [scalar(key, mechanism, 1001 + i, **address) for i in range(40)]


def test_zeros_are_counted_exactly():
    numbers = [
        0,
        1,
        2,
        3,
        2**31,
        2**32 - 1,
        2**32,
        2**53 + 1,
        2**62 - 1,
        2**63 - 1,
        2**63,
        2**64 - 1,
    ]
    numbers += [(1 << i) - 1 for i in range(1, 64)] + [1 << i for i in range(64)]
    signed = torch.tensor([n - (1 << 64) if n >> 63 else n for n in numbers])
    assert spec._leading_zeros(signed).tolist() == [64 - n.bit_length() for n in numbers]


@pytest.mark.parametrize("rng", ["chacha8", "philox10"])
@pytest.mark.parametrize("negative", [0, 1])
def test_octaves_go_on_in_the_tail_domains(rng, negative):
    """63 zeros in a row come once in 2^63 draws, so they are put there by hand."""
    key = NoiseKey.from_seed(6, rng=rng)
    width = 16 if rng == "chacha8" else 4
    noise = Noise(rng, key.words, "laplace", "grid", 3, torch.tensor([5]))
    counters = wide._counters(noise, [(7, 4, 2)], 8, (2, 1) if width == 16 else (1, 2))
    words = random_words(rng, key.words, counters)
    own = words.t().reshape(2, 8).clone()
    own[:, 0] = signed32(negative << 31)
    own[:, 1] = 0
    words = own.view(-1, width).t().contiguous()
    got = spec._laplace(rng, key.words)(words, counters).tolist()
    for element, value in zip((4, 5), got, strict=True):
        counter = [element // 2, 3, 5, 7 + (144 << 24)]
        if width == 4:
            counter[0] = 2 * element
        column = torch.tensor([[signed32(w)] for w in counter], dtype=torch.int32)
        block = random_words(rng, key.words, column)[:, 0].tolist()
        tail = [w & 0xFFFFFFFF for w in block][8 * (element % 2) if width == 16 else 0 :]
        octaves = 63 + 64 - (tail[0] << 32 | tail[1]).bit_length()
        g = value if not negative else -1 - value
        assert g >> 30 == octaves
        assert g & (T - 1) == scalar_remainder(own[element - 4].tolist())
    assert spec.more_octaves([0, 0, 1, 5]) == 63 + 64 + 31
    assert spec.more_octaves([0] * 8 * 32) == grid.MAX_OCTAVES
    # Noise that is cut there moves every clamped sum past the clamp.
    assert grid.MAX_OCTAVES * T - grid.LIMIT > grid.LIMIT


def scalar_remainder(words):
    words = [w & 0xFFFFFFFF for w in words]
    g = 0
    for table, i in zip(thresholds(), (2, 4, 6), strict=True):
        g = g << 10 | bisect_right(table, words[i] << 32 | words[i + 1])
    return g


@pytest.mark.parametrize("rng", RNGS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_distribution_accepts_the_scale_and_rejects_others(rng, mechanism):
    key = NoiseKey.from_seed(5, rng=rng)
    noise = draw((20_000,), mechanism, key, scale=0.3, dtype=torch.float64).numpy()
    law = getattr(stats, LAWS[mechanism])
    assert stats.kstest(noise, law(scale=0.3).cdf).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(noise, law(scale=0.3 * wrong).cdf).pvalue < 1e-12


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_digit_has_its_law(mechanism):
    k = draw((100_000,), mechanism)
    g = torch.where(k < 0, -1 - k if mechanism == "laplace" else -k, k)
    assert stats.binomtest(int((k < 0).sum()), len(k)).pvalue > 1e-3
    for shift in (0, 10):
        assert stats.chisquare(torch.bincount(g >> shift & 1023, minlength=1024)).pvalue > 1e-3
    if mechanism == "laplace":
        edges = [0, *thresholds()[0], 1 << 64]
        expected = [(b - a) / 2**64 * len(k) for a, b in itertools.pairwise(edges)]
        counts = torch.bincount(g >> 20 & 1023, minlength=1024)
        assert stats.chisquare(counts, expected).pvalue > 1e-3
        assert stats.chisquare(counts).pvalue < 1e-12
        octaves = torch.bincount((g >> 30).clamp(max=8), minlength=9)
        law = [len(k) / 2 ** min(h + 1, 8) for h in range(9)]
        assert stats.chisquare(octaves, law).pvalue > 1e-3


@pytest.mark.parametrize("rng", RNGS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_noise_is_a_function_of_its_address(rng, mechanism, monkeypatch):
    key = NoiseKey.from_seed(2, rng=rng)
    whole = draw((600,), mechanism, key)
    for start, stop in ((0, 1), (1, 2), (3, 117), (599, 600)):
        assert torch.equal(draw((stop - start,), mechanism, key, offset=start), whole[start:stop])
    rows = draw((3, 50), mechanism, key, client=torch.tensor([4, 0, 9]), offset=301)
    assert torch.equal(rows[1], whole[301:351])
    assert torch.equal(rows[2], draw((50,), mechanism, key, client=9, offset=301))
    for other in (dict(step=4), dict(client=1), dict(layer=1), dict(offset=1)):
        assert (draw((600,), mechanism, key, **other) == whole).sum() == 0
    monkeypatch.setattr(wide, "_chunk_columns", lambda device, words: 13)
    assert torch.equal(draw((600,), mechanism, key), whole)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_numbers_are_the_integers_times_the_quantum(mechanism):
    scale = torch.tensor([0.0, 0.5, 3.0], dtype=torch.float64)
    k, q = draw((4, 3), mechanism), grid.quantum(scale, mechanism)
    offset = 0.5 if mechanism == "laplace" else 0.0
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        noise = draw((4, 3), mechanism, scale=scale, dtype=dtype)
        assert torch.equal(noise, ((k.double() + offset) * q).to(dtype))
        assert not noise[:, 0].any()
    assert draw((0,), mechanism).shape == (0,)
    assert max_elements("chacha20", "grid") == 1 << 32
    assert max_elements("philox10", "grid") == 1 << 30
    assert tail_cutoff(mechanism, "grid") == (10 if mechanism == "gaussian" else math.inf)
    assert draw((2,), mechanism, offset=(1 << 32) - 2).shape == (2,)
    with pytest.raises(ValueError, match="dtype"):
        draw((2,), mechanism, dtype=torch.int32)


@given(st.floats(1e-290, 1e300))
def test_the_quantum_is_never_too_small(scale):
    with localcontext() as context:
        context.prec = 60
        exact = Decimal(scale) * Decimal(2).ln() / T
        q = Decimal(grid.quantum(scale, "laplace").item())
        assert exact <= q <= exact * (1 + Decimal(2) ** -51)
    assert grid.quantum(scale, "gaussian").item() == scale / T


def test_edges_of_the_quantum(monkeypatch):
    assert grid.quantum(0.0, "laplace").item() == 0
    for mechanism in MECHANISMS:
        assert grid.quantum(5e-324, mechanism).item() == 2.0**-1022
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scale"):
            grid.quantum(bad, "laplace")
    # On an accelerator no value is read.
    monkeypatch.setattr(grid._validate_tensors, "nonnegative_tensor", lambda *args, **kwargs: None)
    for bad in (-1.0, math.inf, math.nan):
        assert math.isnan(grid.quantum(bad, "laplace").item())
