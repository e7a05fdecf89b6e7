"""Noise of earlier steps that is drawn again: its definition, its law, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from aadp_kernels import (
    Correlation,
    Layout,
    NoiseKey,
    ReusedNoiseError,
    clip_sum_noise,
    privatize_,
    sample_noise,
)
from tests.late import stats

D = (1.0, -0.9, -0.25, 0.3)
IMPLS = ["torch", "numba"]


def key(rng: str = "chacha20") -> NoiseKey:
    return NoiseKey.from_seed(3, rng)


def noise(count: int, *, step: int, correlation=None, secret=None, **options) -> torch.Tensor:
    address = {"mechanism": "gaussian", "scale": 1.0, "dtype": torch.float64, "impl": "torch"}
    return sample_noise(
        (count,), key=secret or key(), step=step, correlation=correlation, **(address | options)
    )


def by_definition(count: int, step: int, coefficients=D, **options) -> torch.Tensor:
    total = torch.zeros(count, dtype=torch.float64)
    for back, d in enumerate(coefficients):
        if back <= step:
            total += d * noise(count, step=step - back, **options)
    return total


@pytest.mark.parametrize("bands", [1, 2, 4])
@pytest.mark.parametrize("rng", ["chacha20", "philox10"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ["wide", "fast"])
def test_it_is_the_sum_of_the_noise_of_several_steps(form, impl, rng, bands):
    where = {"layer": 2, "client": 5, "offset": 77, "form": form}
    found = noise(
        3000, step=7, correlation=Correlation(D[:bands]), secret=key(rng), impl=impl, **where
    )
    wanted = by_definition(3000, 7, D[:bands], secret=None, **where) if rng == "chacha20" else sum(
        d * noise(3000, step=7 - j, secret=key(rng), **where) for j, d in enumerate(D[:bands])
    )  # fmt: skip
    if form == "wide":
        assert torch.equal(found, wanted)
    else:
        bound = 2.0**-18 * sum(map(abs, D[:bands])) * (1 + found.abs())
        assert ((found - wanted).abs() <= bound).all()


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_before_the_first_step_there_is_nothing(step):
    assert torch.equal(noise(500, step=step, correlation=Correlation(D)), by_definition(500, step))


def test_earlier_releases_may_have_keys_and_steps_of_their_own():
    others = [NoiseKey.from_seed(8), NoiseKey.from_seed(9)]
    earlier = ((others[0], 40), (others[1], 2))
    found = noise(600, step=5, correlation=Correlation(D, earlier))
    wanted = noise(600, step=5)
    for d, (secret, step) in zip(D[1:], earlier, strict=False):
        wanted = wanted + d * noise(600, step=step, secret=NoiseKey.from_bytes(secret._secret))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("coefficients", [D, D[:2], (1.0, 0.9, -0.25, 0.3)])
def test_the_covariance_of_the_steps_is_that_of_the_coefficients(impl, coefficients):
    """Fails for a missing band, a wrong sign, a step that is off by one."""
    count, steps, secret = 40_000, 6, key()
    rows = torch.stack(
        [
            noise(count, step=t, correlation=Correlation(coefficients), secret=secret, impl=impl)
            for t in range(steps)
        ]
    )
    bands = sum(np.eye(steps, k=-j) * d for j, d in enumerate(coefficients))
    wanted = torch.from_numpy(bands @ bands.T)
    found = rows @ rows.T / count
    assert (found - wanted).abs().max() < 6 * 2 / math.sqrt(count) < 0.07


@pytest.mark.parametrize("form", ["wide", "fast"])
def test_the_noise_of_a_step_has_its_own_scale_and_no_other(form):
    value = noise(20_000, step=9, correlation=Correlation(D), scale=0.5, form=form, impl="numba")
    spread = 0.5 * math.sqrt(sum(d * d for d in D))
    assert stats.kstest(value.numpy(), "norm", (0, spread)).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(value.numpy(), "norm", (0, spread * wrong)).pvalue < 1e-9


@pytest.mark.parametrize("impl", IMPLS)
def test_privatize_and_clip_sum_noise_add_it(impl):
    layout = Layout.build([torch.empty(30, 7), torch.empty(11)], [0, 1])
    scale = torch.tensor([0.3, 0.7], dtype=torch.float64)
    options = {"layout": layout, "clip": scale * math.inf, "scale": scale, "step": 4, "p": 2}
    options |= {"mechanism": "gaussian", "correlation": Correlation(D), "impl": impl}
    own = [scale[i] * by_definition(layout.dims[i], 4, layer=i) for i in range(2)]
    values = [torch.zeros(s, dtype=torch.float64) for s in layout.shapes]
    privatize_(values, key=key(), **options)
    cohort = [torch.zeros(2, *s, dtype=torch.float64) for s in layout.shapes]
    privatize_(cohort, key=key(), clients=torch.tensor([6, 0]), **options)
    records = [torch.zeros(3, *s, dtype=torch.float64) for s in layout.shapes]
    sums, _ = clip_sum_noise(records, key=key(), **options)
    for i in range(2):
        for found in (values[i], cohort[i][1], sums[i]):
            assert torch.equal(found.flatten(), own[i])


def test_only_the_release_itself_is_claimed():
    secret = key()
    for step in (3, 4):
        noise(10, step=step, correlation=Correlation(D), secret=secret)
    with pytest.raises(ReusedNoiseError):
        noise(10, step=4, correlation=Correlation(D), secret=secret)
    with pytest.raises(ReusedNoiseError):
        noise(10, step=3, secret=secret)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mechanism": "laplace"}, "laplace noise: only Gaussian has a proof"),
        ({"form": "grid"}, "multiples lie on no grid"),
    ],
)
def test_what_has_no_proof_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        noise(10, step=1, correlation=Correlation(D), **change)


def test_what_cannot_draw_again_is_refused_by_name_and_not_chosen(monkeypatch):
    from aadp_kernels import _cpu, _dispatch

    forms = {name: of for name, of in _cpu.FORMS.items() if name != "correlation"}
    monkeypatch.setattr(_cpu, "FORMS", forms)
    _dispatch._backend.cache_clear()
    try:
        with pytest.raises(ValueError, match="impl must not be 'numba' for correlation"):
            noise(100, step=1, correlation=Correlation(D), impl="numba")
        found = noise(100, step=1, correlation=Correlation(D), impl="auto")
    finally:
        _dispatch._backend.cache_clear()
    assert torch.equal(found, by_definition(100, 1))


def test_bad_coefficients_and_releases_are_refused():
    for wrong in ((), (0.5, 1.0), (1.0, math.nan), (1.0,) * 65):
        with pytest.raises(ValueError, match="coefficients must be"):
            Correlation(wrong)
    with pytest.raises(ValueError, match="earlier must be at most 1 releases"):
        Correlation((1.0, -0.5), ((key(), 1), (key(), 0)))
    with pytest.raises(ValueError, match="earlier must hold NoiseKeys, got int"):
        Correlation((1.0, -0.5), ((7, 1),))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="earlier step"):
        Correlation((1.0, -0.5), ((key(), -1),))
    with pytest.raises(ValueError, match="keys of chacha20, got one of philox10"):
        noise(4, step=2, correlation=Correlation(D, ((key("philox10"), 1),)))
    with pytest.raises(ValueError, match="this release itself"):
        noise(4, step=2, correlation=Correlation(D, ((key(), 2),)))


def test_a_correlation_does_not_show_its_keys():
    text = repr(Correlation(D, ((key(), 1),)))
    assert "<secret>" in text
    assert key()._secret.hex() not in text


def test_known_answer():
    """A change of address, order or arithmetic shows here."""
    value = noise(3, step=2, correlation=Correlation((1.0, -0.94)), layer=1, client=4)
    assert value.tolist() == [2.906867396384821, 0.8662367300236665, -0.7441487158725129]
