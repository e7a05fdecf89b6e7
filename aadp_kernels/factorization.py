"""What correlated noise costs in privacy, and what it leaves in the model: matrices of a whole run.

Round t releases y_t = x_t + sigma * sum_j d_j z_{t-j}, that is y = D (C x + sigma z): D has the
coefficients d of a `Correlation` in its bands, C is its inverse, z is fresh Gaussian noise. Here
x_t is in units of the noise: a unit (a client, or a record) that takes part in round t moves x_t
by at most 1 in L2. A server that knows y knows C x + sigma z, and the other way round. So a whole
run is one Gaussian mechanism: its noise multiplier is sigma / sensitivity, where a unit's
sensitivity comes from the columns of C of the rounds that it takes part in.

Three things follow. The rounds in which a unit takes part must be fixed beforehand, without a look
at data. A unit is charged for all planned rounds at once, also for those after its last: later
noise takes a part of the earlier noise back. And a run cannot be made longer than planned.

Reference:
    Denisov et al. 2022, arXiv:2202.08312 (releases may depend on earlier ones); Choquette-Choo et
    al. 2023, arXiv:2306.08153 (units that take part many times); Kalinin and Lampert 2024,
    arXiv:2405.13763 (Toeplitz matrices); Kalinin et al. 2025, arXiv:2505.12128 (a banded inverse).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

# Rounding of sums of a few thousand products: a sensitivity is stated larger by this.
_ROUNDING = 1 + 1e-9
_POWERS = np.linspace(0.02, 0.98, 49)
_FINE = 1e-4


def power_coefficients(power: float, bands: int) -> tuple[float, ...]:
    """The first coefficients of (1 - x)^power: d_0 = 1, d_j = d_{j-1} (j - 1 - power) / j.

    Args:
        power: In (0, 1). 0.5 is the inverse square root of prefix sums; more takes back more.
        bands: How many, p >= 1. 1 is independent noise.

    Raises:
        ValueError: An argument out of its range.
    """
    if not 0 < power < 1:
        raise ValueError(f"power must be in (0, 1), got {power}")
    if bands < 1:
        raise ValueError(f"bands must be at least 1, got {bands}")
    found = [1.0]
    for j in range(1, bands):
        found.append(found[-1] * (j - 1 - power) / j)
    return tuple(found)


def encoder(coefficients: Sequence[float], horizon: int) -> npt.NDArray[np.float64]:
    """First column of C, the inverse of D: float64 [horizon]. Column s is it, s rows lower.

    Args:
        coefficients: d_0 = 1, d_1, ... of D.
        horizon: Planned rounds T >= 1.

    Raises:
        ValueError: Coefficients that do not begin with 1, a horizon below 1.
    """
    d = np.asarray(coefficients, dtype=np.float64)
    if d.ndim != 1 or not len(d) or d[0] != 1 or not np.isfinite(d).all():
        raise ValueError(f"coefficients must be finite and begin with 1, got {coefficients}")
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    c = np.zeros(horizon)
    c[0] = 1.0
    for t in range(1, horizon):
        back = min(t, len(d) - 1)
        c[t] = -(d[1 : back + 1] @ c[t - back : t][::-1])
    return c


def sensitivities(
    coefficients: Sequence[float], horizon: int, schedules: Iterable[Sequence[int]]
) -> npt.NDArray[np.float64]:
    """How far each unit moves C x, all planned rounds together, in L2: float64 [units].

    Args:
        coefficients: d_0 = 1, d_1, ... of D.
        horizon: Planned rounds T.
        schedules: Of each unit the rounds in which it takes part, in [0, T), each at most once.

    Raises:
        ValueError: A round outside [0, T) or named twice.

    Guarantees:
        At least sqrt(sum_ij |<C_i, C_j>|) over the rounds i, j of the unit: whatever vectors of
        norm 1 it contributes, and however they depend on earlier releases. Attained if C >= 0.
    """
    c = encoder(coefficients, horizon)
    products: dict[int, npt.NDArray[np.float64]] = {}

    def inner(lag: int, later: int) -> float:
        """|<C_s, C_t>| for t - s = lag: a prefix sum, since both columns end at the last row."""
        if lag not in products:
            products[lag] = np.cumsum(c[lag:] * c[: horizon - lag])
        return abs(float(products[lag][horizon - 1 - later]))

    found = []
    known: dict[tuple[int, ...], float] = {}
    for schedule in schedules:
        rounds = tuple(sorted(int(r) for r in schedule))
        if rounds and not (rounds[0] >= 0 and rounds[-1] < horizon):
            raise ValueError(f"schedule must name rounds in [0, {horizon}), got {rounds}")
        if len(set(rounds)) < len(rounds):
            raise ValueError(f"schedule must name a round once, got {rounds}")
        if rounds not in known:
            total = math.fsum(
                (1 if i == j else 2) * inner(later - earlier, later)
                for j, later in enumerate(rounds)
                for i, earlier in enumerate(rounds[: j + 1])
            )
            known[rounds] = math.sqrt(total) * _ROUNDING
        found.append(known[rounds])
    return np.array(found, dtype=np.float64)


def cyclic_schedules(horizon: int, period: int) -> list[range]:
    """The rounds of each unit where every unit comes back after exactly `period` rounds."""
    if period < 1 or horizon < 1:
        raise ValueError(f"period and horizon must be at least 1, got {period} and {horizon}")
    return [range(first, horizon, period) for first in range(min(period, horizon))]


def separated_sensitivity(coefficients: Sequence[float], horizon: int, apart: int) -> float:
    """The largest of `sensitivities` over all units whose rounds are at least `apart` rounds apart.

    Where the columns of C are not negative and fall, the inner product of two of them falls with
    their distance and with the later one's place. So rounds 0, apart, 2 apart, ... are the worst.

    Raises:
        ValueError: C is not so, or an argument is out of its range.
    """
    c = encoder(coefficients, horizon)
    if (c < 0).any() or (np.diff(c) > 0).any():
        raise ValueError(
            f"coefficients must have an inverse that is positive and falling, got {coefficients}"
        )
    total = np.zeros(horizon)
    for first in cyclic_schedules(horizon, apart)[0]:
        total[first:] += c[: horizon - first]
    return float(np.linalg.norm(total)) * _ROUNDING


def sgd_workload(
    learning_rates: Sequence[float], *, momentum: float = 0.0, nesterov: bool = False
) -> npt.NDArray[np.float64]:
    """The model after each round as sums of releases, for SGD: float64 [T, T], lower triangular.

    Row r has what release t is multiplied by in the model after round r, its sign left out. The
    last row alone, `sgd_workload(...)[-1:]`, stands for the last model; see `last_of_sgd`.

    Args:
        learning_rates: Of each round, [T].
        momentum: In [0, 1), as in `torch.optim.SGD` without dampening.
        nesterov: As in `torch.optim.SGD`.
    """
    rates = _rates(learning_rates, momentum)
    back = np.subtract.outer(np.arange(len(rates)), np.arange(len(rates)))
    step = np.where(back >= 0, float(momentum) ** np.maximum(back, 0), 0.0)
    if nesterov:
        step = np.eye(len(rates)) + momentum * step
    return np.cumsum(rates[:, None] * step, axis=0)


def last_of_sgd(
    learning_rates: Sequence[float], *, momentum: float = 0.0, nesterov: bool = False
) -> npt.NDArray[np.float64]:
    """The last row of `sgd_workload`, float64 [1, T], in time and memory of T."""
    rates = _rates(learning_rates, momentum)
    row = np.zeros(len(rates) + 1)
    for t in range(len(rates) - 1, -1, -1):
        row[t] = rates[t] + momentum * row[t + 1]
    row = row[:-1]
    return (rates + momentum * row if nesterov else row)[None]


def _rates(learning_rates: Sequence[float], momentum: float) -> npt.NDArray[np.float64]:
    rates = np.asarray(learning_rates, dtype=np.float64)
    if rates.ndim != 1 or not len(rates) or not np.isfinite(rates).all():
        raise ValueError("learning_rates must be finite numbers, one for each round")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    return rates


def model_noise(coefficients: Sequence[float], workload: npt.NDArray[np.float64]) -> float:
    """Standard deviation of the noise in an element of the model, in units of sigma.

    Args:
        coefficients: d_0 = 1, d_1, ... of D.
        workload: [R, T], see `sgd_workload`; of several rows the root mean square counts.
    """
    rounds = workload.shape[1]
    columns = np.zeros_like(workload)
    for j, d in enumerate(coefficients[:rounds]):
        columns[:, : rounds - j] += d * workload[:, j:]
    return math.sqrt((columns**2).sum(1).mean())


def best_coefficients(
    bands: int,
    workload: npt.NDArray[np.float64],
    sensitivity: Callable[[Sequence[float]], float],
) -> tuple[float, ...]:
    """The `power_coefficients` that leave least noise in the model at an equal guarantee.

    Args:
        bands: p in [1, 64].
        workload: See `model_noise`.
        sensitivity: Largest sensitivity of a unit, of coefficients; from public facts alone.

    Returns:
        Those that minimise sensitivity times `model_noise`; independent noise where none is better.
    """
    if not 1 <= bands <= 64:
        raise ValueError(f"bands must be in [1, 64], got {bands}")

    def cost(coefficients: Sequence[float]) -> float:
        return sensitivity(coefficients) * model_noise(coefficients, workload)

    def cost_of(power: float) -> float:
        return cost(power_coefficients(power, bands))

    if bands == 1:
        return (1.0,)
    middle = int(np.argmin([cost_of(power) for power in _POWERS]))
    low, high = _POWERS[max(middle - 1, 0)], _POWERS[min(middle + 1, len(_POWERS) - 1)]
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > _FINE:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if cost_of(left) <= cost_of(right) else (left, high)
    found = power_coefficients(round((low + high) / 2, 4), bands)
    return found if cost(found) < cost((1.0,)) else (1.0,)
