"""The best of a random number of runs: laws of the number, and the bound against exact truth."""

import math

import numpy as np
import pytest
from scipy import integrate, special

from fl_lightning.accounting.composition import compose_epsilon
from fl_lightning.accounting.repeat_and_select import (
    TrialNumber,
    candidate_budget,
    selection_cost,
    selection_loss,
)
from fl_lightning.values.event import NoiseEvent

LAWS = {
    "geometric": TrialNumber("negative_binomial", 20.0, 1.0),
    "logarithmic": TrialNumber("negative_binomial", 20.0, 0.0),
    "half": TrialNumber("negative_binomial", 5.0, -0.5),
    "two": TrialNumber("negative_binomial", 8.0, 2.0),
    "poisson": TrialNumber("poisson", 6.0),
}


def generating(number, x):
    """E[x^K] as in the papers, of the law's own parameters."""
    if number.law == "poisson":
        return np.exp(number.mean * (x - 1))
    eta, gamma = number.shape, number.gamma
    if eta == 0:
        return np.log1p(-(1 - gamma) * x) / math.log(gamma)
    return ((1 - (1 - gamma) * x) ** -eta - 1) / (gamma**-eta - 1)


@pytest.mark.parametrize("name", LAWS)
def test_a_law_has_its_mean_and_its_generating_function(name):
    number = LAWS[name]
    chance = number.probabilities()
    values = np.arange(len(chance))
    assert chance.min() >= 0
    assert chance.sum() == pytest.approx(1, abs=1e-9)
    assert (chance * values).sum() == pytest.approx(number.mean, rel=1e-6)
    for x in (0.1, 0.5, 0.9, 0.99):
        assert (chance * x**values).sum() == pytest.approx(float(generating(number, x)), rel=1e-6)
    assert (chance[0] > 0) == (number.law == "poisson")


@pytest.mark.parametrize("name", LAWS)
def test_a_number_is_drawn_by_inversion(name):
    number, below = LAWS[name], np.cumsum(LAWS[name].probabilities())
    for uniform in (0.0, 0.013, 0.3, 0.5, 0.77, 0.95, 0.9999):
        assert number.draw(uniform) == int(np.searchsorted(below, uniform, side="right"))
    assert number.draw(1 - 2**-52) < 10**5


# Exact truth -------------------------------------------------------------------------------------


def profile(p, q, epsilon):
    """Exact δ at ε of two discrete laws, the larger of both directions."""
    return max(np.maximum(a - math.exp(epsilon) * b, 0).sum() for a, b in ((p, q), (q, p)))


def power_of(p, q):
    """Exact largest power at each false positive rate, the larger of both directions."""

    def power(rates):
        found = []
        for null, other in ((p, q), (q, p)):
            order = np.argsort(-other / null)
            x = np.concatenate([[0.0], np.cumsum(null[order])])
            y = np.concatenate([[0.0], np.cumsum(other[order])])
            found.append(np.interp(rates, x, y))
        return np.minimum(np.max(found, 0) + 1e-12, 1.0)

    return power


def best_of(number, law):
    """Exact law of the best outcome: outcomes in ascending order of their score."""
    edges = np.concatenate([[0.0], np.cumsum(law)])
    edges[-1] = 1.0
    return np.diff(generating(number, edges))


def toys():
    generator = np.random.default_rng(5)
    for _ in range(40):
        p = generator.dirichlet(np.full(6, 0.7)) * 0.98 + 0.02 / 6
        tilt = np.exp(generator.normal(0, 0.7, 6))
        q = p * tilt / (p * tilt).sum()
        yield p, q
    # The worst kind: a rare best outcome, which one neighbour has more often.
    for rare in (0.005, 0.02, 0.1):
        p = np.array([1 - rare, rare])
        q = np.array([1 - 2 * rare, 2 * rare])
        yield p, q


@pytest.mark.parametrize("name", LAWS)
def test_the_bound_holds_for_exact_choices_and_a_single_charge_does_not(name):
    number, single, without_loss, closest = LAWS[name], 0, 0, math.inf
    for p, q in toys():
        loss = selection_loss(number, power_of(p, q), profile(p, q, 0.0))
        shown = best_of(number, p), best_of(number, q)
        for epsilon in (0.1, 0.3, 0.7, 1.0, 1.5, 2.5):
            exact = profile(*shown, epsilon + loss)
            assert exact <= number.mean * profile(p, q, epsilon) + 1e-12
            exact = profile(*shown, epsilon)
            single += exact > profile(p, q, epsilon) + 1e-9
            without_loss += exact > number.mean * profile(p, q, epsilon) + 1e-9
        worst = max(abs(np.log(shown[0] / shown[1])))
        closest = min(closest, (loss + max(abs(np.log(p / q)))) / worst)
        assert worst <= loss + max(abs(np.log(p / q))) + 1e-9  # pure, δ = 0
    assert single > 20
    assert without_loss > 0
    assert closest < 1.6


@pytest.mark.parametrize("name", ["geometric", "logarithmic", "poisson"])
@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_the_best_of_gaussians_by_their_own_value(name, sigma):
    """The score is the release itself: its exact density by numbers, against the bound."""
    number, move = LAWS[name], 1 / sigma
    y = np.linspace(-12, 12, 200_001)

    def density(shift):
        return np.gradient(generating(number, special.ndtr(y - shift)), y)

    p, q = density(move), density(0.0)
    counts = {NoiseEvent("gaussian", sigma): 1}
    for delta in (1e-2, 1e-4):
        bound = sum(selection_cost(number, counts, delta))
        exact = [
            integrate.trapezoid(np.maximum(a - math.exp(bound) * b, 0), y)
            for a, b in ((p, q), (q, p))
        ]
        assert max(exact) <= delta
    single = compose_epsilon(counts, 1e-2)
    exact = integrate.trapezoid(np.maximum(p - math.exp(single) * q, 0), y)
    assert exact > 1e-2  # charged as one run it would be wrong


def test_the_loss_is_that_of_closed_forms():
    """Pure ε: the power is min(e^ε·u, 1 - e^-ε·(1 - u)), at which the odds have a maximum."""
    epsilon, number = 0.5, TrialNumber("negative_binomial", 20.0, 1.0)
    gamma = number.gamma
    u = 1 / (1 + math.exp(epsilon))
    odds = (gamma + (1 - gamma) * math.exp(epsilon) * u) / (gamma + (1 - gamma) * u)

    def power(rates):
        return np.minimum(math.exp(epsilon) * rates, 1 - math.exp(-epsilon) * (1 - rates))

    found = selection_loss(number, power, math.tanh(epsilon / 2))
    assert 2 * math.log(odds) <= found <= 2 * math.log(odds) + 0.01
    assert gamma == pytest.approx(1 / 20)
    poisson = TrialNumber("poisson", 3.0)
    assert selection_loss(poisson, power, math.tanh(epsilon / 2)) == 3 * math.tanh(epsilon / 2)


@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sigma", [0.8, 2.0, 8.0])
def test_it_is_within_another_proof(shape, sigma):
    """By Renyi divergences, as dp-accounting computes them (Papernot and Steinke 2022)."""
    from dp_accounting import dp_event
    from dp_accounting.rdp import rdp_privacy_accountant as rdp

    number, delta = TrialNumber("negative_binomial", 20.0, shape), 1e-5
    accountant = rdp.RdpAccountant([1 + i / 10 for i in range(1, 100)] + list(range(12, 200)))
    accountant.compose(
        dp_event.RepeatAndSelectDpEvent(dp_event.GaussianDpEvent(sigma), 20.0, shape)
    )
    counts = {NoiseEvent("gaussian", sigma): 1}
    loss, part = selection_cost(number, counts, delta)
    assert compose_epsilon(counts, delta) < loss + part <= accountant.get_epsilon(delta)


def test_sampled_noise_has_the_bound_of_its_own_curve():
    number, delta = LAWS["geometric"], 1e-5
    sampled, whole = ({NoiseEvent("gaussian", 2.0, q): 10} for q in (0.5, 1.0))
    less, more = (selection_cost(number, c, delta) for c in (sampled, whole))
    assert less[0] < more[0]
    tails = selection_cost(number, sampled, delta, 0.01, 1e-8)
    assert tails[0] > less[0]
    assert tails[1] > less[1] + 0.01
    assert selection_cost(number, sampled, delta, tails=1e-5) == (math.inf, math.inf)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("epsilon", [0.5, 8.0])
def test_a_budget_is_divided_without_rest(name, epsilon):
    number, budget = LAWS[name], candidate_budget(LAWS[name], epsilon, 1e-5)
    assert budget.epsilon + budget.loss == pytest.approx(epsilon)
    assert budget.delta == 1e-5 / number.mean
    assert 0 < budget.epsilon < epsilon
    from fl_lightning.accounting.composition import calibrate

    z = calibrate(mechanism="gaussian", sampling_rate=1.0, steps=7, epsilon=budget.epsilon,
                  delta=budget.delta)  # fmt: skip
    loss, part = selection_cost(number, {NoiseEvent("gaussian", z): 7}, 1e-5)
    assert loss <= budget.loss
    assert loss + part == pytest.approx(epsilon, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"law": "geometric"}, "law='geometric'"),
        ({"mean": 1.0}, "mean=1.0"),
        ({"mean": math.inf}, "mean=inf"),
        ({"law": "poisson", "mean": 0.0}, "mean=0.0"),
        ({"shape": -1.0}, "shape=-1.0"),
        ({"mean": math.nan}, "mean=nan"),
    ],
)
def test_a_law_that_cannot_be_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        TrialNumber(**arguments)


def test_a_budget_that_cannot_be_is_refused():
    for epsilon, delta in ((0.0, 1e-5), (math.inf, 1e-5), (1.0, 0.0)):
        with pytest.raises(ValueError, match="must be above 0"):
            candidate_budget(LAWS["geometric"], epsilon, delta)
