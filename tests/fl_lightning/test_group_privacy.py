"""Groups: closed forms, and an FFT and quadratures that share nothing with the code under test."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import special, stats

from fl_lightning.accounting.composition import calibrate, compose_epsilon
from fl_lightning.accounting.group_privacy import (
    ClientSteps,
    apart,
    group_figure,
    in_one_sum,
    records_of_one_client,
)
from fl_lightning.accounting.group_tails import Sampler, group_extra
from fl_lightning.accounting.shift_mixtures import ShiftMixture, mixture_delta, mixture_epsilon
from fl_lightning.values.event import NoiseEvent

DELTA = 1e-5


def client(event: NoiseEvent, steps: int, rounds: range | None = None) -> ClientSteps:
    return ClientSteps(
        {event: steps},
        DELTA,
        frozenset((r, 0) for r in (range(steps) if rounds is None else rounds)),
    )


def figure(steps, size: int, at: float = 0.0, sampler: Sampler | None = None):
    return group_figure(steps, sampler, size=size, delta=DELTA, at=at)


def gaussian_delta(shift: float, epsilon: float) -> float:
    """By quadrature of (p - e^eps q)+, on a grid of its own."""
    x = np.linspace(-12, 12 + shift, 100_001)
    p, q = stats.norm.pdf(x, shift), stats.norm.pdf(x)
    return float(np.trapezoid(np.maximum(p - np.exp(epsilon) * q, 0), x))


def fft_epsilon(
    mechanism: str, shifts, weights, steps: int, delta: float, *, forward: bool
) -> float:
    """Epsilon by an FFT of losses rounded to the nearest multiple of a width."""
    x = (
        np.linspace(-30, shifts[-1] + 30, 150_001)
        if mechanism == "laplace"
        else np.linspace(-13, shifts[-1] + 13, 150_001)
    )
    density = stats.laplace.pdf if mechanism == "laplace" else stats.norm.pdf
    q = density(x)
    p = sum(w * density(x, s) for w, s in zip(weights, shifts, strict=True))
    top, loss = (p, np.log(p / q)) if forward else (q, np.log(q / p))
    mass = top / top.sum()
    mean = steps * float(mass @ loss)
    spread = math.sqrt(steps * float(mass @ loss**2))
    width = max(mean + 5 * spread, 1e-3) / 40_000
    size = 1 << 19
    index = np.round(loss / width).astype(int)
    inside = np.abs(index) < size // 2
    pmf = np.bincount(index[inside] % size, mass[inside], size)
    composed = np.fft.irfft(np.fft.rfft(pmf) ** steps, size)
    losses = np.arange(size)
    losses = np.where(losses >= size // 2, losses - size, losses) * width
    order = np.argsort(losses)
    losses, composed = losses[order], composed[order]
    low, high = 0.0, float(losses[-1])
    for _ in range(60):
        middle = (low + high) / 2
        over = losses > middle
        there = float(composed[over] @ -np.expm1(middle - losses[over]))
        low, high = (middle, high) if there > delta else (low, middle)
    return high


def test_five_clients_in_one_sum_are_not_five_times_their_epsilon() -> None:
    """At (8, 1e-5) each, (40, 5e-5) is far from true: delta(40) is 0.226."""
    z = calibrate(mechanism="gaussian", sampling_rate=1.0, steps=1, epsilon=8.0, delta=DELTA)
    clients = [client(NoiseEvent("gaussian", z), 1)] * 5
    found = figure(in_one_sum(clients, 5), 5, at=40.0)
    assert found.exact
    assert found.delta_at == pytest.approx(0.2263, abs=5e-5)
    assert found.delta_at == pytest.approx(gaussian_delta(5 / z, 40.0), rel=1e-6)
    assert gaussian_delta(5 / z, found.epsilon) == pytest.approx(DELTA, rel=1e-5)
    alone = figure(apart(clients, 5), 5, at=40.0)
    assert alone.exact
    assert gaussian_delta(math.sqrt(5) / z, alone.epsilon) == pytest.approx(DELTA, rel=1e-5)
    assert alone.epsilon < 40


@pytest.mark.parametrize("adjacency", ["zero_out", "replace_one"])
@pytest.mark.parametrize("size", [1, 2, 5, 10])
def test_unsampled_gaussians_have_the_closed_form(size: int, adjacency: str) -> None:
    steps, z = 20, 5.0
    found = figure(
        records_of_one_client([client(NoiseEvent("gaussian", z, 1.0, adjacency), steps)], size),
        size,
        at=9.0,
    )
    shift = size * math.sqrt(steps) / z
    assert found.exact
    assert gaussian_delta(shift, found.epsilon) == pytest.approx(DELTA, rel=1e-4)
    assert found.delta_at == pytest.approx(gaussian_delta(shift, 9.0), rel=1e-6)


@pytest.mark.parametrize(
    ("mechanism", "multiplier", "rate", "steps"),
    [
        ("gaussian", 3.0, 0.1, 50),
        ("gaussian", 1.2, 0.2, 30),
        ("laplace", 20.0, 0.1, 50),
        ("laplace", 9.0, 1.0, 12),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_records_of_one_client_agree_with_an_fft(
    mechanism: str, multiplier: float, rate: float, steps: int, size: int
) -> None:
    event = NoiseEvent(mechanism, multiplier, rate)
    found = figure(records_of_one_client([client(event, steps)], size), size)
    shifts = [k / multiplier for k in range(size + 1)]
    weights = [
        float(math.comb(size, k) * rate**k * (1 - rate) ** (size - k)) for k in range(size + 1)
    ]
    both = [fft_epsilon(mechanism, shifts, weights, steps, DELTA, forward=f) for f in (True, False)]
    assert found.exact
    assert found.epsilon == pytest.approx(max(both), rel=2e-3)
    assert found.epsilon >= max(both) * (1 - 1e-3)
    if size == 1:
        assert found.epsilon == pytest.approx(compose_epsilon({event: steps}, DELTA), rel=1e-3)


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_delta_is_read_from_the_same_distribution(mechanism: str) -> None:
    steps = records_of_one_client([client(NoiseEvent(mechanism, 4.0, 0.1), 20)], 3)
    epsilon = figure(steps, 3).epsilon
    assert mixture_delta(steps.counts, epsilon, finest=DELTA) == pytest.approx(DELTA, rel=1e-2)
    assert mixture_delta(steps.counts, epsilon / 2, finest=DELTA) > DELTA


def test_pure_epsilon_of_a_group_of_laplace_records() -> None:
    """Coins of their own multiply the worst ratio: g times the epsilon of one, exactly."""
    event = NoiseEvent("laplace", 7.0, 0.3)
    steps = records_of_one_client([client(event, 11)], 4)
    found = group_figure(steps, None, size=4, delta=0.0, at=1.0)
    assert found.epsilon == pytest.approx(4 * 11 * event.pure_epsilon(), rel=1e-12)


def test_exchanged_records_are_a_bound_above_what_one_pair_does() -> None:
    """Groups that move to both sides by all of their members, drawn by the same coins."""
    rate, z, size, count = 0.2, 1.5, 3, 1
    event = NoiseEvent("gaussian", z, rate, "replace_one")
    steps = records_of_one_client([client(event, count)], size)
    bound = figure(steps, size)
    assert not bound.exact
    x = np.linspace(-20, 20, 100_001)
    weights = stats.binom.pmf(np.arange(size + 1), size, rate)
    p, q = (
        sum(w * stats.norm.pdf(x, sign * k / (2 * z)) for k, w in enumerate(weights))
        for sign in (1, -1)
    )
    for epsilon in (0.1, 0.5, 1.0, bound.epsilon):
        true = float(np.trapezoid(np.maximum(p - np.exp(epsilon) * q, 0), x))
        assert mixture_delta(steps.counts, epsilon, finest=DELTA) >= true
    one = records_of_one_client([client(event, 40)], 1)
    assert figure(one, 1).epsilon == pytest.approx(compose_epsilon({event: 40}, DELTA), rel=1e-3)


def test_more_is_never_less() -> None:
    def epsilon(size: int, z: float = 2.0, rate: float = 0.1, steps: int = 30) -> float:
        return figure(
            records_of_one_client([client(NoiseEvent("gaussian", z, rate), steps)], size), size
        ).epsilon

    assert all(a < b for a, b in pairwise(epsilon(size) for size in (1, 2, 3, 5, 10)))
    assert epsilon(3, z=1.9) > epsilon(3) < epsilon(3, rate=0.11)
    assert epsilon(3, steps=31) > epsilon(3)


def test_unequal_clients_of_one_sum() -> None:
    clients = [client(NoiseEvent("gaussian", z), 10) for z in (4.0, 8.0, 16.0)]
    for size, shift in ((2, 1 / 4 + 1 / 8), (3, 1 / 4 + 1 / 8 + 1 / 16)):
        found = figure(in_one_sum(clients, size), size)
        assert found.exact
        assert gaussian_delta(math.sqrt(10) * shift, found.epsilon) == pytest.approx(
            DELTA, rel=1e-4
        )
        lonely = figure(apart(clients, size), size)
        squares = sum((1 / c_z) ** 2 for c_z in (4.0, 8.0, 16.0)[:size])
        assert gaussian_delta(math.sqrt(10 * squares), lonely.epsilon) == pytest.approx(
            DELTA, rel=1e-4
        )


def test_clients_of_different_rounds_are_bounded() -> None:
    """Their norms over rounds add up, which is reached only where the rounds are the same."""
    event = NoiseEvent("gaussian", 6.0)
    alike = [client(event, 5, range(5))] * 2
    other = [client(event, 5, range(5)), client(event, 5, range(5, 10))]
    first, second = (figure(in_one_sum(c, 2), 2) for c in (alike, other))
    assert first.exact
    assert not second.exact
    assert second.epsilon == first.epsilon
    assert second.epsilon > compose_epsilon({event: 10}, DELTA)


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_unequal_clients_with_coins_move_by_sums_of_coins(mechanism: str) -> None:
    rate, multipliers, steps = 0.2, (6.0, 9.0), 15
    clients = [client(NoiseEvent(mechanism, z, rate), steps) for z in multipliers]
    found = figure(in_one_sum(clients, 2), 2)
    a, b = (1 / z for z in multipliers)
    shifts = [0.0, b, a, a + b]
    weights = [(1 - rate) ** 2, rate * (1 - rate), rate * (1 - rate), rate**2]
    both = [fft_epsilon(mechanism, shifts, weights, steps, DELTA, forward=f) for f in (True, False)]
    assert found.exact
    assert found.epsilon == pytest.approx(max(both), rel=2e-3)


def test_many_sums_of_coins_are_rounded_up() -> None:
    rates = [client(NoiseEvent("gaussian", 6.0 + k / 10, 0.2), 15) for k in range(8)]
    found = figure(in_one_sum(rates, 8), 8)
    worst = figure(in_one_sum([client(NoiseEvent("gaussian", 6.0, 0.2), 15)] * 8, 8), 8)
    best = figure(in_one_sum([client(NoiseEvent("gaussian", 6.7, 0.2), 15)] * 8, 8), 8)
    assert not found.exact
    assert worst.exact
    assert best.epsilon < found.epsilon < worst.epsilon * 1.02


def test_rounded_sums_of_coins_are_no_less_than_the_true_ones() -> None:
    rate, multipliers, steps = 0.2, [6.0 + k / 10 for k in range(7)], 15
    clients = [client(NoiseEvent("gaussian", z, rate), steps) for z in multipliers]
    law = {0.0: 1.0}
    for z in multipliers:
        taken = {total + 1 / z: weight * rate for total, weight in law.items()}
        law = {total: weight * (1 - rate) for total, weight in law.items()} | taken
    shifts = sorted(law)
    weights = [law[shift] for shift in shifts]
    true = max(
        fft_epsilon("gaussian", shifts, weights, steps, DELTA, forward=f) for f in (True, False)
    )
    found = figure(in_one_sum(clients, 7), 7)
    assert len(shifts) == 2**7
    assert not found.exact
    assert true < found.epsilon < 1.1 * true


def test_a_record_at_each_of_several_clients_is_in_the_steps_of_all() -> None:
    event = NoiseEvent("gaussian", 6.0, 0.2)
    for size in (2, 3):
        found = figure(apart([client(event, 15)] * 3, size), size)
        alone = figure(records_of_one_client([client(event, 15 * size)], 1), 1)
        assert found.exact
        assert found.epsilon == alone.epsilon


def test_clients_that_differ_are_bounded_by_the_worst_of_each() -> None:
    few, loud = NoiseEvent("gaussian", 2.0, 0.1), NoiseEvent("gaussian", 4.0, 0.1)
    mixed = figure(records_of_one_client([client(few, 10), client(loud, 90)], 2), 2)
    assert not mixed.exact
    assert mixed.epsilon == figure(records_of_one_client([client(few, 90)], 2), 2).epsilon
    clear = figure(records_of_one_client([client(few, 90), client(loud, 90)], 2), 2)
    assert clear.exact
    pair = [client(few, 90), client(loud, 90)]
    assert not figure(apart(pair, 2), 2).exact
    assert figure(apart([*pair, client(few, 90)], 2), 2).exact


def test_what_cannot_be_composed_finely_is_a_bound_and_never_a_crash() -> None:
    event = NoiseEvent("gaussian", 1.0, 0.01)
    steps = records_of_one_client([client(event, 100)], 2)
    tiny = group_figure(steps, None, size=2, delta=1e-12, at=3.0)
    assert not tiny.exact
    assert tiny.epsilon > figure(steps, 2).epsilon
    loud = records_of_one_client([client(NoiseEvent("gaussian", 0.01), 3)], 10)
    assert figure(loud, 10).epsilon > 1e4
    many = records_of_one_client([client(NoiseEvent("laplace", 300.0), 2_000_000)], 2)
    assert not figure(many, 2).exact


@pytest.mark.parametrize("form", ["wide", "fast", "grid"])
@pytest.mark.parametrize(
    "event",
    [NoiseEvent("gaussian", 2.0), NoiseEvent("laplace", 5.0), NoiseEvent("gaussian", 1.0, 0.1)],
)
def test_a_group_pays_for_the_samplers_reach_with_its_own_shift(
    event: NoiseEvent, form: str
) -> None:
    sampler = Sampler(event.mechanism, form, (1000, 10))
    extras = []
    for size in (1, 2, 4):
        steps = records_of_one_client([client(event, 10)], size)
        extras.append(group_extra(sampler, steps.counts, 1.0, DELTA).delta)
    if (event.mechanism, form) == ("laplace", "grid"):
        assert max(extras) < 1e-12
    else:
        assert extras[0] < extras[1] < extras[2] < 1e-3


def test_every_sum_of_a_groups_moves_pays_by_its_probability() -> None:
    """Where outputs without the group's data cost less, those with it are what is paid for."""
    rate, size, sampler = 0.1, 4, Sampler("gaussian", "wide", (10,))
    steps = records_of_one_client([client(NoiseEvent("gaussian", 1.0, rate), 1)], size)
    paid = sum(
        math.comb(size, k) * rate**k * (1 - rate) ** (size - k) * sampler.leaves(float(k))
        for k in range(1, size + 1)
    )
    extra = group_extra(sampler, steps.counts, 5.0, DELTA)
    assert extra.delta == pytest.approx(paid, rel=1e-3, abs=0)
    assert 0 < extra.epsilon < 1e-3


def test_what_only_the_others_can_produce_is_paid_for_whatever_the_coins() -> None:
    rate, size, sampler = 0.1, 2, Sampler("gaussian", "wide", (10,))
    steps = records_of_one_client([client(NoiseEvent("gaussian", 2.0, rate), 10)], size)
    extra = group_extra(sampler, steps.counts, 1.0, DELTA)
    paid = 10 * (sampler.leaves(size / 2.0) + sampler.missing())
    assert extra.delta == pytest.approx(paid, rel=1e-6, abs=0)
    assert extra.epsilon == 0


@pytest.mark.parametrize(("form", "cutoff"), [("wide", 9.419280180123797), ("grid", 10.0)])
@pytest.mark.parametrize("shift", [0.5, 1.5, 4.0, 7.0])
@pytest.mark.parametrize("spread", [1, 4, 200])
def test_the_bound_of_what_leaves_the_range_holds(
    form: str, cutoff: float, shift: float, spread: int
) -> None:
    """However the shift is spread over pairs (elements), what leaves by quadrature is less."""
    each = shift / math.sqrt(spread)
    if form == "wide":
        leaves = math.exp(-((cutoff - each) ** 2) / 2) - math.exp(-(cutoff**2) / 2)
        # A pair that moves along one axis leaves the disc: outside after, inside before.
        x = np.linspace(-cutoff, cutoff, 20_001)
        inner = np.sqrt(np.maximum(cutoff**2 - x**2, 0))
        lost = stats.norm.pdf(x) * (special.erf(inner / math.sqrt(2)))
        moved = np.where(
            np.abs(x + each) < cutoff,
            special.erf(np.sqrt(np.maximum(cutoff**2 - (x + each) ** 2, 0)) / math.sqrt(2)),
            0.0,
        )
        true = float(np.trapezoid(np.maximum(lost - stats.norm.pdf(x) * moved, 0), x))
        assert true <= leaves * (1 + 1e-3) + 1e-18
    else:
        true = special.ndtr(-(cutoff - each)) - special.ndtr(-cutoff)
    sampler = Sampler("gaussian", form, (2000,))
    assert sampler.leaves(shift) >= spread * true * (1 - 1e-9)


def test_a_sampler_that_reaches_no_further_tells_a_large_group() -> None:
    """Ten records of shift 1 each, moved at once: the cut noise has no delta of 1e-5 to offer."""
    event = NoiseEvent("gaussian", 1.0)
    steps = records_of_one_client([client(event, 1)], 10)
    assert group_extra(Sampler("gaussian", "wide", (10,)), steps.counts, 90.0, DELTA).delta > 0.1
    rare = records_of_one_client([client(NoiseEvent("gaussian", 1.0, 0.01), 1)], 10)
    extra = group_extra(Sampler("gaussian", "wide", (10,)), rare.counts, 20.0, DELTA)
    assert 0 < extra.delta < 1e-9
    assert 0 < extra.epsilon < 0.01


def test_grid_inflation_does_not_grow_with_the_group() -> None:
    sampler = Sampler("gaussian", "grid", (1000,))
    inflation = [
        group_extra(
            sampler,
            records_of_one_client([client(NoiseEvent("gaussian", 20.0), 10)], g).counts,
            1.0,
            DELTA,
        ).epsilon
        for g in (1, 10)
    ]
    assert inflation[0] == inflation[1] == pytest.approx(10 * sampler.inflation, rel=1e-6, abs=0)
    assert sampler.inflation > 0


def test_shares_of_many_hands_cost_more() -> None:
    one, many = (Sampler("laplace", "wide", (100,), shares) for shares in (None, 5))
    assert many.leaves(0.5) > one.leaves(0.5) > 0
    assert Sampler("gaussian", "wide", (100,), 5).leaves(0.5) > Sampler(
        "gaussian", "wide", (100,)
    ).leaves(0.5)


def test_mixtures_that_do_not_move_cost_nothing() -> None:
    assert mixture_epsilon({ShiftMixture("gaussian", (0.0,), (1.0,)): 5}, DELTA) == 0
