"""What right guesses prove: closed forms, and how often a true curve is excluded."""

import math

import numpy as np
import pytest
from scipy import stats

from fl_lightning.accounting.risk import Risk, risk_of
from fl_lightning.audit.bounds import accuracy_limits, can_be, pair_p_value, shown_by_pair
from fl_lightning.audit.choice import best_threshold, simulated
from fl_lightning.audit.family import Family
from fl_lightning.audit.findings import (
    _by_guesses,
    best_line,
    independent,
    last_model,
    one_run,
    surest,
)
from fl_lightning.values.event import NoiseEvent


def gaussian_scores(mu, count, seed, noise=1.0):
    """Log-likelihood ratios of canaries that move a Gaussian by mu, and their coins."""
    generator = np.random.default_rng(seed)
    coins = generator.random(count) < 0.5
    seen = np.where(coins, mu, 0.0) + noise * generator.standard_normal(count)
    return mu * seen - mu**2 / 2, coins


def family_of(multiplier, delta=1e-5, steps=1, mechanism="gaussian"):
    return Family({NoiseEvent(mechanism, multiplier): steps}, delta, 0.0, 0.0)


@pytest.mark.parametrize("counts", [{"gaussian": 1.0}, {"laplace": 0.7}])
def test_the_least_false_alarms_are_the_largest_power_inverted(counts):
    ((mechanism, z),) = counts.items()
    risk = risk_of({NoiseEvent(mechanism, z): 2}, 1e-5)
    rates = np.geomspace(1e-5, 0.99, 50)
    np.testing.assert_allclose(risk.false_positives(risk.power(rates)), rates, rtol=1e-8)
    assert float(risk.false_positives(0.0)) == 0.0


def test_limits_of_an_accuracy_are_those_of_clopper_and_pearson():
    for right, guesses in ((0, 7), (3, 7), (7, 7), (450, 500)):
        interval = stats.binomtest(right, guesses).proportion_ci(0.9, method="exact")
        assert accuracy_limits(right, guesses, 0.95) == pytest.approx(tuple(interval))


def test_one_canary_is_told_as_well_as_the_curve_allows_and_no_better():
    """A right guess of a single coin has probability (1 + advantage) / 2 at most."""
    risk = risk_of({NoiseEvent("gaussian", 1.0): 1}, 1e-5)
    most = (1 + risk.advantage()) / 2
    assert can_be(risk, 1, 1, 1, 1 - 0.999 * most)
    assert not can_be(risk, 1, 1, 1, 1 - 1.001 * most)


def test_a_curve_excludes_less_than_independence_would():
    """Randomized response keeps (ε, 0), and its right guesses are binomial."""
    risk = Risk.of_pairs([(1.0, 0.0)])
    chance = 1 / (1 + math.exp(-1.0))
    excluded = [v for v in range(101) if not can_be(risk, v, 100, 100, 0.95)]
    assert excluded
    assert max(stats.binom.sf(v - 1, 100, chance) for v in excluded) < 0.05


def test_the_pair_bound_is_binomial_without_delta_and_pays_for_delta():
    chance = 1 / (1 + math.exp(-1.5))
    tail = stats.binom.sf(89, 100, chance)
    assert pair_p_value(1.5, 0.0, 90, 100, 1000) == pytest.approx(tail)
    assert tail < pair_p_value(1.5, 1e-6, 90, 100, 1000) < pair_p_value(1.5, 1e-4, 90, 100, 1000)
    # Whatever is right with probability δ for all canaries at once: at least m·δ/v of mass.
    assert pair_p_value(0.0, 1e-3, 100, 100, 100) >= 1e-3


def test_the_epsilon_of_a_pair_is_where_its_p_value_passes():
    found = shown_by_pair(1e-5, 96, 100, 1000, 0.95)
    assert pair_p_value(found, 1e-5, 96, 100, 1000) == pytest.approx(0.05, rel=1e-2)
    assert shown_by_pair(1e-5, 50, 100, 1000, 0.95) == 0.0


def test_the_epsilon_of_an_accuracy_is_that_of_the_gaussian_with_it():
    family = family_of(1.0)
    for mu in (0.5, 1.0, 2.0):
        accuracy = stats.norm.cdf(mu / 2)
        shown = family.shown(lambda risk, a=accuracy: (1 + risk.advantage()) / 2 >= a)
        needed = family.needed(lambda risk, a=accuracy: (1 + risk.advantage()) / 2 >= a)
        exact = family.epsilon(1 / mu)
        assert 0.98 * exact < shown <= exact <= needed < 1.02 * exact


def test_members_of_a_family_pay_for_what_comes_on_top():
    bare, charged = family_of(1.0), Family({NoiseEvent("gaussian", 1.0): 1}, 1e-5, 0.25, 4e-6)
    assert charged.epsilon(1.0) > bare.epsilon(1.0) + 0.25
    assert Family({NoiseEvent("gaussian", 1.0): 1}, 1e-6, 0.0, 1e-5).epsilon(1.0) == math.inf
    assert charged.shown(lambda risk: True) == 0.0
    assert bare.needed(lambda risk: False) == math.inf
    assert bare.shown(lambda risk: False) == bare.epsilon(2.0**-5)


def test_a_mechanism_as_it_is_proven_fails_as_seldom_as_was_said():
    """The attack is as good as any: more than is proven is shown in a tenth of audits at most."""
    family, audits = family_of(0.8), 600
    risk = family.risk(1.0)
    possible = [_by_guesses(*gaussian_scores(1.25, 120, seed), 0.0, 0.9) for seed in range(audits)]
    failed = sum(not low(risk) for low, *_ in possible)
    assert failed <= stats.binom.ppf(0.999, audits, 0.1)
    assert failed >= 20  # the bound is no idle one: it is nearly reached


def test_guesses_that_all_hang_together_do_not_pass_a_curve():
    """A mechanism that is Gaussian for each canary, with one noise for all of them together."""
    family, count, audits = family_of(0.8), 100, 200
    generator = np.random.default_rng(0)
    risk, failed = family.risk(1.0), 0
    for _ in range(audits):
        coins = generator.random(count) < 0.5
        seen = np.where(coins, 1.25, 0.0) + generator.standard_normal()
        right, guesses = surest(1.25 * seen - 1.25**2 / 2, coins)
        failed += not can_be(risk, right, guesses, count, 0.9)
    assert failed <= stats.binom.ppf(0.999, audits, 0.1)


def test_an_attack_on_less_noise_shows_more_than_is_proven():
    family = family_of(0.8)
    proven = family.epsilon(1.0)
    good = independent(family, *gaussian_scores(1.25, 1000, 1), 0.99)
    assert 0.6 * proven < good.shown <= proven < good.at_most
    assert independent(family, *gaussian_scores(1.25, 1000, 1, noise=2 / 3), 0.99).shown > proven
    curve, pair = one_run(family, *gaussian_scores(1.25, 2000, 0), 0.95)
    assert 0.5 * proven < curve.shown <= proven
    assert 0 < pair.shown < curve.shown


def test_the_number_of_guesses_is_fixed_by_the_number_of_canaries():
    for count, guesses in ((100, 20), (1000, 200), (2000, 200)):
        assert surest(*gaussian_scores(1.0, count, 0))[1] == guesses


def test_the_simulated_statistic_is_as_good_as_the_curve_allows():
    """Its total variation is the advantage, with and without coins."""
    for event, times in (
        (NoiseEvent("gaussian", 1.0), 2),
        (NoiseEvent("laplace", 0.8), 1),
        (NoiseEvent("gaussian", 0.5, 0.3), 2),
        (NoiseEvent("gaussian", 0.5, 0.3, "replace_one"), 2),
    ):
        there, away = (simulated({event: times}, world) for world in (True, False))
        advantage = risk_of({event: times}, 1e-5).advantage()
        assert (there > 0).mean() - (away > 0).mean() == pytest.approx(advantage, abs=0.02)


def test_coins_are_guessed_without_sampling_and_alarms_raised_with_rare_units():
    often, rare = NoiseEvent("gaussian", 0.6), NoiseEvent("gaussian", 0.4, 0.1)
    assert best_threshold({often: 1}, risk_of({often: 1}, 1e-5), 1000, 0.99) is None
    threshold = best_threshold({rare: 1}, risk_of({rare: 1}, 1e-5), 1000, 0.99)
    assert threshold is not None
    assert threshold > 0


def test_alarms_are_counted_apart_for_canaries_that_are_there_and_others():
    family = Family({NoiseEvent("gaussian", 0.4, 0.1): 1}, 1e-5, 0.0, 0.0)
    generator = np.random.default_rng(0)
    coins = generator.random(2000) < 0.5
    moved = coins & (generator.random(2000) < 0.1)
    seen = moved / 0.4 + generator.standard_normal(2000)
    scores = np.logaddexp(np.log(0.9), np.log(0.1) + seen / 0.4 - 0.5 / 0.4**2)
    bound = independent(family, scores, coins, 0.99)
    assert 0.3 * family.epsilon(1.0) < bound.shown < family.epsilon(1.0) < bound.at_most
    assert bound.guesses < 500


@pytest.mark.parametrize("above", [True, False])
def test_the_line_that_most_scores_keep_to(above):
    coins = np.array([False, False, True, False, True, True])
    coins = coins if above else ~coins
    line, found = best_line(np.array([3.0, 1.0, 5.0, 6.0, 8.0, 9.0]), coins)
    assert (line, found) == (4.0, above)
    scores = np.array([1.0, 2.0])
    assert best_line(scores, np.array([True, True]))[0] in (-np.inf, np.inf)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_last_model_is_counted_by_canaries_that_drew_no_line(sign):
    """Scores of any scale, place and sign; less is shown than is true, and not much less."""
    family = family_of(1.0)
    scores, coins = gaussian_scores(1.0, 8000, 4)
    bound = last_model(family, sign * 1e6 * (scores - 3.0), coins, 0.99)
    assert (bound.guesses, bound.canaries) == (6000, 8000)
    assert 0.85 * family.epsilon(1.0) < bound.shown < family.epsilon(1.0) < bound.at_most
    random = last_model(family, scores, np.random.default_rng(1).random(8000) < 0.5, 0.99)
    assert random.shown == 0.0


def test_canaries_that_are_guessed_do_not_move_the_line():
    scores = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    coins = np.array([False, True, False, False, False, True, True, True])
    assert last_model(family_of(1.0), scores, coins, 0.99).right == 3
