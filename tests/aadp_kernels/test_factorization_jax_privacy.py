"""Coefficients, sensitivities and errors against jax_privacy, where it is installed.

    python -m pip install jax-privacy    # in an environment of its own, with torch and pytest

Its values for three cases are stored as known answers in test_factorization.py.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from aadp_kernels.factorization import (
    encoder,
    model_noise,
    power_coefficients,
    separated_sensitivity,
    sgd_workload,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    jax = pytest.importorskip("jax")
    toeplitz = pytest.importorskip("jax_privacy.matrix_factorization.toeplitz")

jax.config.update("jax_enable_x64", True)
CASES = [(0.94, 2), (0.82, 4), (0.5, 8), (0.3, 3)]


@pytest.mark.parametrize(("power", "bands"), CASES)
@pytest.mark.parametrize(("horizon", "apart"), [(200, 20), (97, 13), (12, 1), (5, 9)])
def test_columns_and_sensitivities(power, bands, horizon, apart):
    d = power_coefficients(power, bands)
    padded = np.zeros(horizon)
    padded[: len(d)] = d[:horizon]
    theirs = toeplitz.inverse_coef(jax.numpy.asarray(padded), n=horizon)
    assert np.allclose(encoder(d, horizon), theirs, rtol=1e-9)
    squared = toeplitz.minsep_sensitivity_squared(
        jax.numpy.asarray(encoder(d, horizon)), min_sep=apart, n=horizon
    )
    assert separated_sensitivity(d, horizon, apart) ** 2 == pytest.approx(float(squared), rel=1e-7)


@pytest.mark.parametrize(("power", "bands"), CASES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_noise_of_every_model(power, bands, momentum):
    d, rounds = power_coefficients(power, bands), 60
    workload = sgd_workload([1.0] * rounds, momentum=momentum)
    theirs = toeplitz.per_query_error(
        noising_coef=jax.numpy.asarray(d), n=rounds, workload_coef=jax.numpy.asarray(workload[:, 0])
    )
    ours = [model_noise(d, workload[t : t + 1]) ** 2 for t in range(rounds)]
    assert np.allclose(ours, theirs, rtol=1e-9)
