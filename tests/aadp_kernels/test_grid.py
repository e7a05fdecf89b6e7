"""The grid form: exact tables, its law, the certified integers and what an attacker can see."""

import itertools
import math
from bisect import bisect_right
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aadp_kernels import (
    MECHANISMS,
    Layout,
    NoiseKey,
    clip_sum_noise,
    grid,
    max_elements,
    privatize_,
    sample_noise,
    tail_cutoff,
)
from aadp_kernels._torch import grid as spec
from aadp_kernels._torch import noise as wide
from aadp_kernels._torch.rng import random_words
from aadp_kernels.addresses import RNGS, signed32
from aadp_kernels.contract import Noise
from aadp_kernels.grid import thresholds
from tests.late import stats

T = 1 << 30
KEY = NoiseKey.from_seed(41)
LAWS = {"gaussian": "norm", "laplace": "laplace"}
LN2 = Decimal(2).ln()


def draw(shape, mechanism, key=KEY, **kwargs):
    kwargs = {"scale": 1.0, "step": 3, "dtype": torch.int64, **kwargs}
    return sample_noise(shape, mechanism=mechanism, key=again(key), form="grid", **kwargs)


def again(key):
    """An equal key that remembers nothing."""
    return NoiseKey.from_bytes(key._secret, key.rng, key.simulated)


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
    eta = Decimal(grid.inexactness("laplace", 1)[0]) / 2
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
    monkeypatch.setattr(grid._validate, "nonnegative_tensor", lambda *args, **kwargs: None)
    for bad in (-1.0, math.inf, math.nan):
        assert math.isnan(grid.quantum(bad, "laplace").item())


def one_record(x, clip, scale, p, mechanism="laplace"):
    """The integers of one record and the quantum."""
    sums, stat = clip_sum_noise(
        [x[None]], layout=Layout.build([x]), clip=torch.tensor([clip], dtype=torch.float64),
        scale=torch.tensor([scale], dtype=torch.float64), p=p, mechanism=mechanism, key=again(KEY),
        form="grid", last=False,
    )  # fmt: skip
    assert sums[0].dtype == torch.int64
    return sums[0].tolist(), Fraction(grid.quantum(scale, mechanism).item()), stat


@settings(max_examples=150, deadline=None)
@given(
    n=st.sampled_from([1, 2, 3, 17, 400]), seed=st.integers(0, 1 << 30),
    clip=st.floats(1e-20, 1e20), ratio=st.floats(1e-3, 1e11), p=st.sampled_from([1, 2]),
    kind=st.sampled_from(["normal", "equal", "edge", "inside"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_the_integers_have_at_most_the_norm_of_the_clip(n, seed, clip, ratio, p, kind, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    x = torch.ones_like(x) if kind == "equal" else x
    if kind in ("edge", "equal"):
        x = x / x.norm(p) * clip * (1 + (seed % 9 - 4) * 2.0**-53)
    elif kind == "inside":
        x = x / x.norm(p) * clip * 0.99
    else:
        x = x * clip * 10
    mechanism = "laplace" if p == 1 else "gaussian"
    counts, q, _ = one_record(x.to(dtype), clip, clip / ratio, p, mechanism)
    bound = Fraction(clip) / q
    assert sum(abs(k) ** p for k in counts) <= bound**p


def test_small_contributions_survive_and_are_cut_towards_zero():
    q = grid.quantum(1.0, "laplace").item()
    x = torch.tensor([0.25, -0.25, 0.999 * q, -0.999 * q, 7.5 * q, -7.5 * q], dtype=torch.float64)
    counts, _, stat = one_record(x, 1.0, 1.0, 1)
    assert counts == [int(v / q) for v in x.tolist()]
    assert counts[2:] == [0, 0, 7, -7]
    assert stat.clipped.tolist() == [0]


def test_huge_ratios_and_long_sums_stay_in_range():
    counts, _, _ = one_record(torch.tensor([3.0, -4.0]), math.inf, 1e-300, 1)
    assert counts == [grid.LIMIT, -grid.LIMIT]
    layout = Layout.build([torch.zeros(1)])
    start = torch.tensor([(1 << 63) - 5])
    sums, _ = clip_sum_noise(
        [torch.ones(2, 1)], layout=layout, clip=torch.tensor([math.inf]),
        scale=torch.tensor([1e-30]), p=1, mechanism="laplace", key=again(KEY), form="grid",
        accumulate=[start], last=False,
    )  # fmt: skip
    assert sums[0].item() == grid.SUM_LIMIT + 2 * grid.LIMIT
    assert grid.SUM_LIMIT + grid.RECORDS_AT_ONCE * grid.LIMIT < 1 << 63
    total = torch.tensor([1 << 60, -(1 << 60)])
    step = torch.tensor(1.0, dtype=torch.float64)
    out = grid.release(total, torch.zeros_like(total), step, "gaussian")
    assert out.tolist() == [grid.LIMIT, -grid.LIMIT]


LAYOUT = Layout.build(
    {"a.weight": torch.zeros(5, 3), "a.bias": torch.zeros(5), "b": torch.zeros(7)}
)


def tensors(*lead, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((*lead, *s), generator=generator) for s in LAYOUT.shapes]


@pytest.mark.parametrize(("p", "mechanism"), [(1, "laplace"), (2, "gaussian"), (1, "gaussian")])
def test_clip_sum_adds_the_integers_of_the_records(p, mechanism):
    grads, clip, scale = tensors(9), torch.tensor([4.0, 2.0]), torch.tensor([0.5, 3.0])
    grads[0][2, 0, 0], grads[2][3, 1] = math.nan, math.inf
    arguments = {"layout": LAYOUT, "clip": clip, "scale": scale, "p": p, "mechanism": mechanism,
                 "step": 3, "form": "grid"}  # fmt: skip
    singles = [
        clip_sum_noise([g[i : i + 1] for g in grads], last=False, key=again(KEY), **arguments)[0]
        for i in range(9)
    ]
    expected = [sum(parts) for parts in zip(*singles, strict=True)]
    running = None
    for start in (0, 4, 8):
        part = [g[start : start + 4] for g in grads]
        running, _ = clip_sum_noise(
            part, accumulate=running, last=False, key=again(KEY), **arguments
        )
    assert all(torch.equal(a, b) for a, b in zip(running, expected, strict=True))
    sums, stat = clip_sum_noise(grads, key=again(KEY), **arguments)
    assert stat.nonfinite.tolist() == [1, 1]
    q, offset = grid.quantum(scale, mechanism), 0.5 if mechanism == "laplace" else 0.0
    for i, (total, exact) in enumerate(zip(sums, expected, strict=True)):
        layer = LAYOUT.layer_of[i]
        k = draw((exact.numel(),), mechanism, layer=layer, offset=LAYOUT.offsets[i])
        value = (exact + k.view(exact.shape)).double() + offset
        assert torch.equal(total, (value * q[layer]).float())
    clean, _ = clip_sum_noise(grads, **{**arguments, "scale": None, "form": "wide"})
    none, _ = clip_sum_noise(grads, **{**arguments, "scale": None})
    assert all(torch.equal(a, b) for a, b in zip(none, clean, strict=True))
    for exact, real, layer in zip(expected, clean, LAYOUT.layer_of, strict=True):
        torch.testing.assert_close(exact * q[layer], real.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("p", "mechanism"), [(1, "laplace"), (2, "gaussian")])
def test_privatize_equals_the_formula_and_clients_one_by_one(p, mechanism):
    cohort, reference = tensors(3), tensors(seed=1)
    single = [[t[k : k + 1].clone() for t in cohort] for k in range(3)]
    clean = [t.clone() for t in cohort]
    clip = torch.tensor([[4.0, 2.0], [100.0, math.inf], [1.0, 0.0]])
    scale = torch.tensor([[0.5, 0.0], [1.0, 2.0], [0.0, 1.0]])
    clients = torch.tensor([7, 1, 3])
    arguments = {"layout": LAYOUT, "p": p, "mechanism": mechanism, "step": 3,
                 "reference": reference}  # fmt: skip
    privatize_(cohort, clip=clip, scale=scale, clients=clients, form="grid", key=again(KEY),
               **arguments)  # fmt: skip
    privatize_(clean, clip=clip, scale=torch.zeros(2), clients=clients, key=None, **arguments)
    q, offset = grid.quantum(scale, mechanism), 0.5 if mechanism == "laplace" else 0.0
    for i, layer in enumerate(LAYOUT.layer_of):
        k = draw((3, LAYOUT.sizes[i]), mechanism, client=clients, layer=layer,
                 offset=LAYOUT.offsets[i])  # fmt: skip
        noise = (k.double() + offset) * q[:, layer, None]
        expected = clean[i].double().view(3, -1) + noise
        expected = torch.where(scale[:, layer, None] > 0, expected, clean[i].view(3, -1))
        got = cohort[i].double().view(3, -1)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        silent = scale[:, layer] == 0
        assert torch.equal(got[silent], clean[i].double().view(3, -1)[silent])
    alone = again(KEY)
    for k in range(3):
        own = {"clip": clip[k], "scale": scale[k], "clients": clients[k : k + 1]}
        privatize_(single[k], form="grid", key=alone, **own, **arguments)
        assert all(torch.equal(a[k], b[0]) for a, b in zip(cohort, single[k], strict=True))


def test_what_is_not_finite_gives_noise_only():
    x = tensors()
    x[1][2] = math.nan
    stat = privatize_(x, layout=LAYOUT, clip=torch.ones(2), scale=torch.ones(2), key=again(KEY),
                      step=3, form="grid")  # fmt: skip
    assert stat.nonfinite.tolist() == [1, 0]
    noise = draw((20,), "laplace", dtype=torch.float32)
    assert torch.equal(torch.cat([x[0].flatten(), x[1]]), noise)


def laplace_of_torch(n, centre, seed):
    """torch.distributions.Laplace in float32."""
    torch.manual_seed(seed)
    return centre + torch.distributions.Laplace(torch.tensor(0.0), 1.0).sample((n,))


def odd_multiple(v):
    """Whether v is an odd number, up to the rounding of y."""
    return ((v - 1) / 2 - ((v - 1) / 2).round()).abs() < 0.05


def support_of_torch(y):
    """Near 0, 1 - exp(-|y|) is an odd multiple of 2^-24 wherever torch's sampler has its centre."""
    return odd_multiple(-torch.expm1(-y.abs().double()) * 2.0**24)


def support_of_fast(y):
    """Near 0, 1 - exp(-|y|) is an odd multiple of 2^-32 wherever the fast form has its centre."""
    return odd_multiple(-torch.expm1(-y.abs()) * 2.0**32)


def support_of_grid(y):
    """Whether y is a point of the grid."""
    q = grid.quantum(1.0, "laplace")
    return ((y / q - 0.5).round() + 0.5) * q == y


def released(form, n, centre, seed):
    x = torch.full((n,), centre, dtype=torch.float64)
    arguments = {"layout": Layout.build([x]), "clip": torch.tensor([math.inf]), "step": 0}
    key = NoiseKey.from_seed(seed, "philox10")
    privatize_([x], scale=torch.ones(1), key=key, form=form, impl="torch", **arguments)
    return x


NEAR = 2.0**-8


@pytest.mark.parametrize("name", ["torch", "fast", "grid"])
def test_attack_by_impossible_outputs(name):
    """Outputs near 0 that no input 0 can give away that the input was 1; none in the grid form."""
    support = {"torch": support_of_torch, "fast": support_of_fast, "grid": support_of_grid}[name]
    seen = []
    for centre in (0.0, 1.0):
        if name == "torch":
            y = laplace_of_torch(1 << 18, centre, 8)
        else:
            y = released(name, 1 << 17, centre, 8)
        y = y[y.abs() < NEAR]
        assert len(y) > 100
        seen.append(support(y).double().mean().item())
    assert seen[0] == 1
    assert (seen[1] == 1) == (name == "grid"), seen


def test_inexactness_of_the_gaussian_covers_its_acceptance_test():
    """-ln U - x as computed, against sixty digits."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(0, 1 << 32, (16, 3000), generator=generator).to(torch.int32)
    shift = torch.arange(3000) % 64
    high = torch.randint(1 << 62, (1 << 63) - 1, (3000,), generator=generator) >> shift
    words[8], words[9] = (high >> 32).to(torch.int32), (high & 0xFFFFFFFF).to(torch.int32)
    magnitude = torch.randint(0, 10 * T, (3000,), generator=generator)
    wrong = 0
    for i in range(0, 3000, 7):
        low, top = words[9, i].item() & 0xFFFFFFFF, words[8, i].item() & 0xFFFFFFFF
        zeros = 64 - (top << 32 | low).bit_length()
        number = (words[10, i].item() & 0xFFFFFFFF) << 32 | words[11, i].item() & 0xFFFFFFFF
        u = (Decimal(1) / 2 + (Decimal(number >> 11) + Decimal(1) / 2) / 2**54) / 2**zeros
        x = (Decimal(magnitude[i].item()) / T - LN2) ** 2 / 2
        # As computed: with x moved by 2^-45 the exact test must agree.
        accepted = bool(spec._accepts(words[:, i : i + 1], magnitude[i : i + 1]))
        slack = Decimal(2) ** -45
        assert accepted or -u.ln() - x <= slack
        assert not accepted or -u.ln() - x >= -slack
        wrong += accepted != bool(-u.ln() > x)
    assert wrong == 0
    numbers = torch.rand(500, generator=generator, dtype=torch.float64) / 2 + 0.5
    for value, log in zip(numbers.tolist(), wide.log_(numbers.clone()).tolist(), strict=True):
        assert abs(Decimal(log) - Decimal(value).ln()) < 4 * Decimal(2) ** -53
    epsilon, delta = grid.inexactness("gaussian", 10)
    assert epsilon == pytest.approx(20 * 2.0**-45, rel=0.02)
    assert delta == pytest.approx(20 * stats.norm.sf(10), rel=1e-4)


def test_the_discrete_law_is_within_its_bound_of_the_continuous_one():
    """The mass of a cell over the density at its centre, by Taylor's series with sixty digits."""
    for g in (0, 1, 2, 5, 10):
        x, h = Decimal(g), Decimal(1) / T
        steps = [h * (Decimal(i) / 50 - Decimal("0.5")) for i in range(51)]
        mass = [(-((x + s) ** 2) / 2 + x * x / 2).exp() for s in steps]
        simpson = sum(m * (1 if i in (0, 50) else 4 if i % 2 else 2) for i, m in enumerate(mass))
        assert abs((simpson / 150).ln()) <= (x * x + 1) / (24 * Decimal(T) ** 2)


def test_inexactness_grows_with_the_elements():
    for mechanism in MECHANISMS:
        assert grid.inexactness(mechanism, 0) == (0, 0)
        one, many = grid.inexactness(mechanism, 1), grid.inexactness(mechanism, 1000)
        assert many == pytest.approx([1000 * v for v in one])
    assert grid.inexactness("laplace", 1000)[1] == 0
    with pytest.raises(ValueError, match="elements"):
        grid.inexactness("laplace", -1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.tensor([1.0, 0.0])}, "scale must be positive with form='grid'"),
        ({"accumulate": [torch.zeros(s) for s in LAYOUT.shapes]}, "accumulate: a.weight must be"),
        ({"accumulate": [torch.zeros(3, dtype=torch.int64)] * 3}, "accumulate: a.weight must have"),
        ({"accumulate": []}, "accumulate must be 3 tensors"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"layout": LAYOUT, "clip": torch.ones(2), "scale": torch.ones(2), "p": 1,
                 "mechanism": "laplace", "key": again(KEY), "form": "grid", **change}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        clip_sum_noise(tensors(4), **arguments)


def test_a_layer_of_clip_norm_zero_needs_no_noise():
    sums, _ = clip_sum_noise(
        tensors(4), layout=LAYOUT, clip=torch.tensor([1.0, 0.0]), scale=torch.tensor([1.0, 0.0]),
        p=1, mechanism="laplace", key=again(KEY), form="grid",
    )  # fmt: skip
    assert not sums[2].any()
    assert sums[0].any()


def test_sums_are_clamped_before_the_noise_and_after():
    """Before: sums beyond the limit give what the limit gives. After: no output is beyond it."""
    total = torch.tensor([[grid.LIMIT + 5 * T, grid.LIMIT, -grid.LIMIT - 5 * T, -grid.LIMIT, 7]])
    noise = torch.tensor([[-2 * T, 3 * T, 2 * T, -3 * T, -9]])
    step = torch.tensor([[2.0**-30]], dtype=torch.float64)
    want = [grid.LIMIT - 2 * T, grid.LIMIT, 2 * T - grid.LIMIT, -grid.LIMIT, -2]
    for mechanism, offset in (("gaussian", 0.0), ("laplace", 0.5)):
        got = grid.release(total, noise, step, mechanism) * 2.0**30 - offset
        assert got[0].tolist() == want


def test_inexactness_in_numbers():
    """Both directions of the tables, of 2^-45 for the acceptance, of the discrete law up to 10."""
    inflation, tail = grid.inexactness("gaussian", 1000)
    tables, _ = grid.inexactness("laplace", 1000)
    want = tables + 2000 * (2.0**-45 + 101 / (24 * 2.0**60))
    assert inflation == pytest.approx(want, rel=1e-9, abs=0)
    assert tail == pytest.approx(2000 * stats.norm.sf(10.0), rel=1e-5, abs=0)
    assert 1e-17 < tables / 2000 < 1e-15
