"""Sensitivities and noise of whole runs, against matrices written out and published figures."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aadp_kernels.factorization import (
    best_coefficients,
    cyclic_schedules,
    encoder,
    last_of_sgd,
    model_noise,
    power_coefficients,
    sensitivities,
    separated_sensitivity,
    sgd_workload,
)

# Squares of `minsep_sensitivity_squared` of jax_privacy 2.0's matrix_factorization, T = 200, 20
# rounds apart, 10 participations: (power, bands, value).
PUBLISHED = [(0.94, 2, 144.8016), (0.82, 4, 92.7562), (0.5, 8, 21.1738)]


def matrix(coefficients, size: int) -> np.ndarray:
    """D, written out."""
    return sum(np.eye(size, k=-j) * d for j, d in enumerate(coefficients[:size]))


@pytest.mark.parametrize(("power", "bands", "value"), PUBLISHED)
def test_published_sensitivities(power, bands, value):
    d = power_coefficients(power, bands)
    assert separated_sensitivity(d, 200, 20) ** 2 == pytest.approx(value, abs=6e-5)
    assert sensitivities(d, 200, cyclic_schedules(200, 20)).max() ** 2 == pytest.approx(
        value, abs=6e-5
    )


def test_power_coefficients_are_those_of_the_binomial_series():
    assert power_coefficients(0.5, 4) == (1.0, -0.5, -0.125, -0.0625)
    assert power_coefficients(0.9, 2) == (1.0, -0.9)


@pytest.mark.parametrize("coefficients", [(1.0,), (1.0, -0.9), (1.0, 0.5, -0.3), (1.0, -1.2, 0.4)])
def test_the_encoder_is_the_inverse(coefficients):
    inverse = np.linalg.inv(matrix(coefficients, 30))
    assert np.allclose(encoder(coefficients, 30), inverse[:, 0], rtol=1e-12)


@pytest.mark.parametrize("coefficients", [(1.0,), (1.0, -0.9), (1.0, 0.7, -0.3)])
def test_sensitivities_are_those_of_the_columns(coefficients):
    size, schedules = 24, [(0,), (23,), (3, 9, 10), (0, 5, 10, 15, 20), ()]
    columns = np.linalg.inv(matrix(coefficients, size))
    wanted = [
        math.sqrt(np.abs(columns[:, list(s)].T @ columns[:, list(s)]).sum()) for s in schedules
    ]
    found = sensitivities(coefficients, size, schedules)
    assert np.allclose(found, wanted, rtol=1e-8)
    assert (found >= wanted).all()


def test_no_contribution_moves_a_run_further():
    """Vectors of norm 1 in the rounds of a unit, chosen to move C x as far as they can."""
    coefficients, size, rounds = (1.0, 0.7, -0.3), 24, [1, 4, 9, 10, 20]
    columns = np.linalg.inv(matrix(coefficients, size))[:, rounds]
    generator = np.random.default_rng(0)
    signs = np.sign(np.linalg.eigh(columns.T @ columns)[1][:, -1])
    x = generator.normal(size=(2000, len(rounds), 3))
    x /= np.linalg.norm(x, axis=2, keepdims=True)
    moved = [np.linalg.norm(columns @ signs)]
    moved += [np.linalg.norm(columns @ each) for each in x]
    assert max(moved) <= sensitivities(coefficients, size, [rounds])[0]


def test_rounds_far_enough_apart_are_never_worse_than_a_cycle():
    d, size, apart = power_coefficients(0.8, 3), 40, 7
    generator = np.random.default_rng(1)
    bound = separated_sensitivity(d, size, apart)
    for _ in range(300):
        gaps = apart + generator.integers(0, 5, size=6)
        rounds = np.cumsum([generator.integers(0, 9), *gaps])
        assert sensitivities(d, size, [rounds[rounds < size]])[0] <= bound


def test_an_inverse_that_rises_is_refused():
    with pytest.raises(ValueError, match="positive and falling"):
        separated_sensitivity((1.0, 0.5), 20, 4)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_workload_is_what_the_optimizer_does(momentum, nesterov):
    torch = pytest.importorskip("torch")
    if nesterov and not momentum:
        pytest.skip("torch has no nesterov without momentum")
    rates = [0.5, 0.4, 0.3, 0.2, 0.1]
    rows = np.zeros((5, 5))
    for release in range(5):
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        sgd = torch.optim.SGD([x], lr=1.0, momentum=momentum, nesterov=nesterov)
        for t, rate in enumerate(rates):
            sgd.param_groups[0]["lr"] = rate
            x.grad = torch.tensor([float(t == release)], dtype=torch.float64)
            sgd.step()
            rows[t, release] = -x.item()
    workload = sgd_workload(rates, momentum=momentum, nesterov=nesterov)
    assert np.allclose(workload, rows, atol=1e-12)
    last = last_of_sgd(rates, momentum=momentum, nesterov=nesterov)
    assert np.allclose(last, rows[-1:], atol=1e-12)


def test_model_noise_is_that_of_the_product():
    d, workload = (1.0, -0.7, -0.1), sgd_workload([1.0] * 30, momentum=0.5)
    product = workload @ matrix(d, 30)
    assert model_noise(d, workload[-1:]) == pytest.approx(np.linalg.norm(product[-1]))
    assert model_noise(d, workload) == pytest.approx(np.sqrt((product**2).sum(1).mean()))


@pytest.mark.parametrize(("momentum", "most"), [(0.0, 0.3135), (0.9, 0.27)])
def test_two_bands_leave_about_a_quarter_of_the_noise(momentum, most):
    """1000 clients, 50 a round, 200 rounds: the noise of the last model over independent noise."""
    last = last_of_sgd([1.0] * 200, momentum=momentum)

    def cost(d):
        return separated_sensitivity(d, 200, 20) * model_noise(d, last)

    d = best_coefficients(2, last, lambda d: separated_sensitivity(d, 200, 20))
    assert cost(d) / cost((1.0,)) <= most
    for other in (0.6, 0.8, 0.99):
        assert cost(d) <= cost(power_coefficients(other, 2)) * (1 + 1e-9)


def test_where_everybody_takes_part_in_every_round_independent_noise_is_best():
    last = last_of_sgd([1.0] * 40)
    assert best_coefficients(4, last, lambda d: separated_sensitivity(d, 40, 1)) == (1.0,)


def test_simulated_noise_of_the_last_model_is_the_computed_one():
    rounds, elements = 30, 20_000
    d, workload = power_coefficients(0.9, 3), sgd_workload([1.0] * rounds, momentum=0.9)
    z = np.random.default_rng(2).normal(size=(rounds, elements))
    model = workload[-1] @ (matrix(d, rounds) @ z)
    assert model.std() == pytest.approx(model_noise(d, workload[-1:]), rel=0.03)


def test_bad_arguments_are_refused():
    cases = [
        (lambda: power_coefficients(1.0, 2), "power must be in"),
        (lambda: power_coefficients(0.5, 0), "bands must be at least 1, got 0"),
        (lambda: encoder((0.5,), 3), "coefficients must be finite and begin with 1"),
        (lambda: encoder((1.0,), 0), "horizon must be at least 1, got 0"),
        (lambda: sensitivities((1.0,), 3, [(3,)]), r"schedule must name rounds in \[0, 3\)"),
        (lambda: sensitivities((1.0,), 3, [(1, 1)]), "schedule must name a round once"),
        (lambda: cyclic_schedules(3, 0), "period and horizon must be at least 1"),
        (lambda: sgd_workload([], momentum=0.1), "learning_rates must be finite numbers"),
        (lambda: sgd_workload([1.0], momentum=1.0), "momentum must be in"),
        (lambda: best_coefficients(65, np.eye(2), lambda d: 1.0), r"bands must be in \[1, 64\]"),
    ]  # fmt: skip
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
