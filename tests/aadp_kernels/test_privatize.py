"""privatize_ and layer_norms against plain float64 arithmetic."""

import math
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aadp_kernels import Layout, NoiseKey, layer_norms, privatize_, sample_noise
from aadp_kernels._torch.privatize import norms
from aadp_kernels.certified import clip_factors
from tests.late import stats

LAYOUT = Layout.build(
    {
        "a.weight": torch.zeros(5, 3),
        "a.bias": torch.zeros(5),
        "b.weight": torch.zeros(7),
        "c": torch.zeros(()),
    }
)


def key():
    """The same key, which remembers nothing."""
    return NoiseKey.from_seed(11)


def updates(*lead, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((*lead, *s), generator=generator).to(dtype) for s in LAYOUT.shapes]


def run(tensors, clip=math.inf, scale=0.0, **kwargs):
    kwargs = {"key": key(), "step": 2, "p": 1, **kwargs}
    clip, scale = (torch.as_tensor(v, dtype=torch.float64).expand(3) for v in (clip, scale))
    return privatize_(tensors, layout=LAYOUT, clip=clip, scale=scale, **kwargs)


def rows(tensors, members, lead):
    return torch.cat([tensors[i].double().reshape(*lead, -1) for i in members], -1)


@pytest.mark.parametrize("p", [1, 2])
def test_equals_the_formula_with_reference_noise_and_cohort(p):
    mechanism = "laplace" if p == 1 else "gaussian"
    before, reference = updates(4), updates(seed=1)
    clients = torch.tensor([3, 1, 4, 9])
    out = [torch.full_like(t, math.nan) for t in before]
    kept = [t.clone() for t in before]
    clip, scale = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([0.3, 0.0, 0.2])
    votes_at = torch.tensor([15.0, 6.0, 1.0])
    stat = privatize_(
        before, layout=LAYOUT, clip=clip, scale=scale, p=p, mechanism=mechanism, key=key(), step=5,
        clients=clients, reference=reference, out=out, votes_at=votes_at,
    )  # fmt: skip
    for layer, members in enumerate(LAYOUT.members):
        update = rows(kept, members, (4,)) - rows(reference, members, ())
        norm = update.norm(p=p, dim=1)
        expected = update * (clip[layer] / norm).clamp(max=1)[:, None]
        for k, client in enumerate(clients.tolist()):
            expected[k] += sample_noise(
                (LAYOUT.dims[layer],), mechanism=mechanism, scale=scale[layer].item(), key=key(),
                step=5, client=client, layer=layer, dtype=torch.float64,
            )  # fmt: skip
        torch.testing.assert_close(rows(out, members, (4,)), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(stat.clipped[:, layer], (norm > clip[layer]).long())
        norm1 = update.abs().sum(1)
        torch.testing.assert_close(stat.l1_norm[:, layer], norm1)
        assert torch.equal(stat.votes[:, layer], (norm1 <= votes_at[layer]).double() - 0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))


def test_cohort_equals_clients_one_by_one():
    together = updates(3)
    single = [[t[k].clone() for t in together] for k in range(3)]
    clip = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.1, 0.2], [math.inf, 0.0, 1.0]])
    scale = torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.0, 0.1], [1.0, 1.0, 1.0]])
    arguments = {"layout": LAYOUT, "step": 1}
    privatize_(together, clip=clip, scale=scale, clients=torch.tensor([7, 8, 9]), key=key(),
               **arguments)  # fmt: skip
    alone = key()
    for k in range(3):
        own = [t[None] for t in single[k]]
        ids = torch.tensor([7 + k])
        privatize_(own, clip=clip[k], scale=scale[k], clients=ids, key=alone, **arguments)
        assert all(torch.equal(a[k], b[0]) for a, b in zip(together, own, strict=True))


def test_without_clients_it_is_client_zero():
    alone, cohort = updates(), [t[None] for t in updates()]
    run(alone, clip=1.0, scale=0.5)
    run(cohort, clip=1.0, scale=0.5, clients=torch.tensor([0]))
    assert all(torch.equal(a, b[0]) for a, b in zip(alone, cohort, strict=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1, 2, 7, 1000, 30_000]),
    p=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    clip=st.floats(1e-3, 1e3),
    magnitude=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_clipped_norm_never_passes_the_clip_norm(seed, size, p, dtype, clip, magnitude):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(size, generator=generator) * magnitude).to(dtype)
    y = x.clone()
    layout = Layout.build([x])
    stat = privatize_([y], layout=layout, clip=torch.tensor([clip]), scale=torch.zeros(1), p=p,
                      key=None, step=0)  # fmt: skip
    wide = y.double()
    norm = math.fsum(wide.abs().tolist()) if p == 1 else math.sqrt(math.fsum((wide**2).tolist()))
    limit = torch.tensor([clip]).double().item()
    assert norm <= limit
    if not stat.clipped.item():
        assert torch.equal(x, y)
    elif size < 1000 and dtype is torch.float32 and limit > 1e-2:
        assert norm >= limit * (1 - 1e-5)


@pytest.mark.parametrize("p", [1, 2])
def test_clip_just_above_the_norm_changes_no_bit_just_below_does(p):
    x = torch.tensor([3.0, -4.0])
    norm = 7.0 if p == 1 else 5.0
    for clip, clipped in ((norm * (1 + 1e-12), 0), (norm * (1 - 1e-12), 1)):
        y = x.clone()
        bound = torch.tensor([clip], dtype=torch.float64)
        stat = privatize_(
            [y], layout=Layout.build([x]), clip=bound, scale=torch.zeros(1), p=p, key=None, step=0
        )
        assert stat.clipped.item() == clipped
        assert torch.equal(x, y) == (not clipped)


def test_no_noise_keeps_negative_zero_and_subnormals():
    x = torch.tensor([-0.0, 1e-45, 3.0])
    y = x.clone()
    privatize_([y], layout=Layout.build([x]), clip=torch.tensor([math.inf]),
               scale=torch.zeros(1), key=None, step=0)  # fmt: skip
    assert torch.equal(x.view(torch.int32), y.view(torch.int32))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_layer_gives_zeros_and_spreads_nowhere(bad):
    tensors = updates(3)
    kept = [t.clone() for t in tensors]
    tensors[1][1, 2] = bad
    stat = run(tensors, clients=torch.arange(3), votes_at=torch.full((3,), 1e9))
    expected = torch.zeros(3, 3, dtype=torch.int64)
    expected[1, 0] = 1
    assert torch.equal(stat.nonfinite, expected)
    assert torch.equal(stat.votes, 0.5 * (1 - expected.double()))
    for i, (tensor, original) in enumerate(zip(tensors, kept, strict=True)):
        if LAYOUT.layer_of[i] == 0:
            original[1] = 0
        assert torch.equal(tensor, original)
    noised = updates(1)
    noised[0][0, 0, 0] = bad
    run(noised, clip=1.0, scale=0.5, clients=torch.tensor([6]))
    noise = sample_noise((15,), mechanism="laplace", scale=0.5, key=key(), step=2, client=6)
    assert torch.equal(noised[0].flatten(), noise)


def test_strided_and_empty_tensors():
    base = torch.randn(6, 4)
    view, copy = base.t()[::2], base.t()[::2].clone()
    layout = Layout.build([view, torch.zeros(0, 3)])
    arguments = {"layout": layout, "clip": torch.ones(2), "scale": torch.ones(2)}
    privatize_([view, torch.zeros(0, 3)], step=0, key=key(), **arguments)
    privatize_([copy, torch.zeros(0, 3)], step=0, key=key(), **arguments)
    assert torch.equal(view, copy)


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_noise_has_the_scale_and_no_other(mechanism):
    x = torch.zeros(20_000)
    privatize_([x], layout=Layout.build([x]), clip=torch.ones(1), scale=torch.tensor([0.7]),
               mechanism=mechanism, key=key(), step=0)  # fmt: skip
    law = stats.norm if mechanism == "gaussian" else stats.laplace
    assert stats.kstest(x.numpy(), law(scale=0.7).cdf).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(x.numpy(), law(scale=0.7 * wrong).cdf).pvalue < 1e-12


def test_layer_norms():
    tensors, reference = updates(4), updates(seed=1)
    for p in (1, 2):
        norms = layer_norms(tensors, layout=LAYOUT, p=p, reference=reference, cohort=True)
        for layer, members in enumerate(LAYOUT.members):
            update = rows(tensors, members, (4,)) - rows(reference, members, ())
            torch.testing.assert_close(norms[:, layer], update.norm(p=p, dim=1))
    assert layer_norms(updates(), layout=LAYOUT).shape == (3,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": -1.0}, "clip"),
        ({"clip": math.nan}, "clip"),
        ({"scale": math.inf}, "scale"),
        ({"scale": math.nan}, "scale"),
        ({"p": 3}, "p must"),
        ({"p": 2, "scale": 1.0}, "p must be 1 with laplace"),
        ({"scale": 1.0, "key": None}, "key"),
        ({"scale": 1.0, "step": -1}, "step"),
        ({"mechanism": "none"}, "mechanism"),
        ({"clients": torch.tensor([0, 1])}, "tensors"),
        ({"reference": [torch.zeros(1)]}, "reference"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        run(updates(), **change)
    with pytest.raises(ValueError, match="floating"):
        run([t.long() for t in updates()])


def test_the_factor_covers_the_error_of_the_norm():
    """A norm that is too small by its whole error bound still leads to at most the clip norm."""
    count = 4096
    norm = torch.linspace(1.001, 3, 500, dtype=torch.float64)
    every = torch.ones(500, dtype=torch.bool)
    factor, clipped = clip_factors(norm, torch.ones(500), every, count, torch.float64)
    assert bool(clipped.all())
    worst = 1 + Fraction(count, 2**52)
    for f, n in zip(factor.tolist(), norm.tolist(), strict=True):
        assert Fraction(f) * Fraction(n) * worst <= 1
        assert f * n > 1 - 1e-11


@pytest.mark.parametrize("impl", ["torch", "numba"])
def test_a_norm_at_the_threshold_votes_for_it(impl):
    if impl == "numba":
        pytest.importorskip("numba")
    layout = Layout.build([torch.zeros(128)])
    update = torch.full((128,), 0.5)
    options = {"clip": torch.tensor([1.0]), "scale": torch.tensor([0.0]), "key": None, "step": 0}
    for threshold, vote in ((64.0, 0.5), (math.nextafter(64.0, 0.0), -0.5)):
        seen = privatize_(
            [update.clone()], layout=layout, impl=impl,
            votes_at=torch.tensor([threshold], dtype=torch.float64), **options,
        )  # fmt: skip
        assert seen.votes.item() == vote


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000, 40_001])
def test_a_norm_depends_on_neither_the_cohort_nor_the_threads(p, size):
    x = torch.randn(7, size, generator=torch.Generator().manual_seed(size)).double()
    threads = torch.get_num_threads()
    together = norms([x], p)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for k in range(7):
                assert torch.equal(norms([x[k : k + 1].clone()], p)[0], together[k])
                exact = math.fsum(abs(v) ** p for v in x[k].tolist()) ** (1 / p)
                assert together[k].item() == pytest.approx(exact, rel=2.0**-48, abs=0)
        strided = torch.stack([x, x], -1)[..., 0]
        assert torch.equal(norms([strided], p), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": [torch.zeros(2, device="meta")]}, "reference must be on cpu, got meta"),
        ({"out": [torch.zeros(2, device="meta")]}, "out must be on cpu, got meta"),
        ({"impl": ["torch"]}, "impl must be one of"),
        ({"clip": torch.tensor([-1.0])}, "clip must be not negative and not NaN, got -1.0"),
        ({"scale": torch.full((1,), torch.nan)}, "scale must be finite and not negative, got nan"),
    ],
)
def test_what_cannot_be_read_is_refused_before_noise_is_claimed(change, message):
    key, value = NoiseKey.from_seed(0), [torch.zeros(2)]
    given = {"layout": Layout.build(value), "clip": torch.ones(1), "scale": torch.ones(1),
             "key": key, "step": 0}  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(message)):
        privatize_(value, **{**given, **change})
    privatize_(value, **given)
