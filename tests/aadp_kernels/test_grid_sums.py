"""Sums on the grid: the certified integers, attacks, and the cost of what is inexact."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aadp_kernels import MECHANISMS, Layout, NoiseKey, clip_sum_noise, grid, grid_law, privatize_
from aadp_kernels._torch import grid as spec
from aadp_kernels._torch import noise as wide
from tests.aadp_kernels.grid_draws import KEY, LN2, T, again, draw
from tests.late import stats


@pytest.fixture(autouse=True)
def _sixty_digits():
    with localcontext() as context:
        context.prec = 60
        yield


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
    epsilon, delta = grid_law.inexactness("gaussian", 10)
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
        assert grid_law.inexactness(mechanism, 0) == (0, 0)
        one, many = grid_law.inexactness(mechanism, 1), grid_law.inexactness(mechanism, 1000)
        assert many == pytest.approx([1000 * v for v in one])
    assert grid_law.inexactness("laplace", 1000)[1] == 0
    with pytest.raises(ValueError, match="elements"):
        grid_law.inexactness("laplace", -1)


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
    inflation, tail = grid_law.inexactness("gaussian", 1000)
    tables, _ = grid_law.inexactness("laplace", 1000)
    want = tables + 2000 * (2.0**-45 + 101 / (24 * 2.0**60))
    assert inflation == pytest.approx(want, rel=1e-9, abs=0)
    assert tail == pytest.approx(2000 * stats.norm.sf(10.0), rel=1e-5, abs=0)
    assert 1e-17 < tables / 2000 < 1e-15
