"""Accounting: known values, upper bounds, calibration, and the layers' Laplace as one."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as plds
from scipy import integrate

from fl_lightning.accounting import composition as accounting
from fl_lightning.accounting.composition import (
    affordable_steps,
    calibrate,
    compose_epsilon,
)
from fl_lightning.values.event import NoiseEvent

DELTA = 1e-5


def gaussian(z: float, q: float = 1.0) -> NoiseEvent:
    return NoiseEvent("gaussian", z, q)


def laplace(scale: float, q: float = 1.0) -> NoiseEvent:
    return NoiseEvent("laplace", scale, q)


@pytest.mark.parametrize(
    ("event", "steps", "pld", "rdp"),
    [
        (gaussian(3.0, 0.1), 50, 0.971, 1.077),
        (laplace(20.0), 50, 1.307, 1.412),
        (laplace(20.0, 0.1), 50, 0.107, 0.119),
        (gaussian(5.89, 0.1), 200, 0.911, 1.000),
        (gaussian(3.24, 0.1), 200, 1.825, 1.998),
        (gaussian(2.34, 0.1), 200, 2.733, 2.992),
        (gaussian(1.20, 0.1), 200, 7.213, 7.955),
    ],
)
def test_known_values(event: NoiseEvent, steps: int, pld: float, rdp: float) -> None:
    counts = {event: steps}
    assert compose_epsilon(counts, DELTA) == pytest.approx(pld, abs=6e-4)
    assert compose_epsilon(counts, DELTA, accountant="rdp") == pytest.approx(rdp, abs=6e-4)


@pytest.mark.parametrize(("epsilon", "z"), [(1, 5.89), (2, 3.24), (3, 2.34), (8, 1.20)])
def test_rdp_multipliers(epsilon: float, z: float) -> None:
    """The published z are the smallest with two digits."""
    assert compose_epsilon({gaussian(z, 0.1): 200}, DELTA, accountant="rdp") <= epsilon
    assert compose_epsilon({gaussian(z - 0.011, 0.1): 200}, DELTA, accountant="rdp") > epsilon


@pytest.mark.parametrize(("z", "steps"), [(0.7, 1), (4.0, 30), (100.0, 7)])
def test_unsampled_gaussian_is_exact(z: float, steps: int) -> None:
    """delta(epsilon) of the composed mechanism by numerical integration gives delta back."""
    epsilon = compose_epsilon({gaussian(z): steps}, DELTA)
    shift = math.sqrt(steps) / z

    def excess(x: float) -> float:
        top, bottom = -((x - shift) ** 2) / 2, epsilon - x * x / 2
        return (math.exp(top) - math.exp(bottom)) / math.sqrt(2 * math.pi)

    start = shift / 2 + epsilon / shift
    delta, _ = integrate.quad(excess, start, start + 12, epsabs=0, epsrel=1e-10)
    assert delta == pytest.approx(DELTA, rel=1e-6)


def test_two_events_compose() -> None:
    """Two Gaussians are one with the joint multiplier; sampled ones stay between bounds."""
    assert compose_epsilon({gaussian(3.0): 9, gaussian(4.0): 16}, DELTA) == pytest.approx(
        compose_epsilon({gaussian(1 / math.sqrt(2)): 1}, DELTA)
    )
    mixed = compose_epsilon({gaussian(2.0, 0.1): 50, gaussian(4.0, 0.1): 50}, DELTA)
    assert compose_epsilon({gaussian(4.0, 0.1): 100}, DELTA) < mixed
    assert mixed < compose_epsilon({gaussian(2.0, 0.1): 100}, DELTA)


def test_edge_cases() -> None:
    assert compose_epsilon({}, DELTA) == 0
    assert compose_epsilon({gaussian(1.0): 0}, DELTA) == 0
    assert compose_epsilon({gaussian(0.0, 0.5): 1}, DELTA) == math.inf
    assert compose_epsilon({laplace(0.0): 1, gaussian(1.0): 1}, 0.0) == math.inf
    assert compose_epsilon({gaussian(1.0): 1}, 0.0) == math.inf
    assert compose_epsilon({laplace(4.0): 3, laplace(2.0): 1}, 0.0) == pytest.approx(1.25)
    assert compose_epsilon({laplace(2.0, 0.25): 4}, 0.0) == pytest.approx(
        4 * math.log(1 + 0.25 * (math.exp(0.5) - 1))
    )
    tiny = {gaussian(3.0, 0.1): 50}
    assert compose_epsilon(tiny, 1e-12) == compose_epsilon(tiny, 1e-12, accountant="rdp")


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"mechanism": "cauchy"}, "mechanism"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"sampling_rate": 0.0}, "sampling_rate"),
        ({"sampling_rate": 1.5}, "sampling_rate"),
        ({"adjacency": "add_remove"}, "adjacency"),
        (
            {"mechanism": "laplace", "adjacency": "replace_one", "sampling_rate": 0.5},
            "no proven analysis",
        ),
    ],
)
def test_event_refusals(kwargs: dict, word: str) -> None:
    good = {"mechanism": "gaussian", "noise_multiplier": 1.0, "sampling_rate": 1.0}
    with pytest.raises(ValueError, match=word):
        NoiseEvent(**{**good, **kwargs})


def test_call_refusals() -> None:
    event = gaussian(1.0)
    with pytest.raises(ValueError, match=r"delta.*1\.0"):
        compose_epsilon({event: 1}, 1.0)
    with pytest.raises(ValueError, match="counts"):
        compose_epsilon({event: -1}, DELTA)
    with pytest.raises(ValueError, match="accountant"):
        compose_epsilon({event: 1}, DELTA, accountant="moments")  # pyright: ignore
    with pytest.raises(ValueError, match="adjacency"):
        compose_epsilon({event: 1, NoiseEvent("gaussian", 1.0, 1.0, "replace_one"): 1}, DELTA)
    plan = {"mechanism": "gaussian", "sampling_rate": 0.1, "steps": 1, "delta": DELTA}
    for change in ({"epsilon": 0.0}, {"epsilon": 1.0, "steps": 0}, {"epsilon": 1.0, "delta": 0.0}):
        with pytest.raises(ValueError, match=next(reversed(change))):
            calibrate(**{**plan, **change})
    with pytest.raises(ValueError, match="epsilon"):
        affordable_steps(event, -1.0, DELTA)


def test_replace_one_is_a_plain_event() -> None:
    """The multiplier is relative to 2 C already: the same epsilon as zero_out."""
    event = NoiseEvent("gaussian", 2.0, 1.0, "replace_one")
    assert compose_epsilon({event: 3}, DELTA) == compose_epsilon({gaussian(2.0): 3}, DELTA)


@pytest.mark.parametrize("event", [gaussian(2.0, 0.2), laplace(3.0), laplace(1.0, 0.05)])
def test_pld_is_below_rdp(event: NoiseEvent) -> None:
    counts = {event: 40}
    pld, rdp = compose_epsilon(counts, DELTA), compose_epsilon(counts, DELTA, accountant="rdp")
    assert 0.8 * rdp < pld < rdp


@pytest.mark.parametrize("q", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("scale", [0.3, 1.0, 15.0])
@pytest.mark.parametrize("order", [2, 3, 17])
def test_sampled_laplace_rdp(q: float, scale: float, order: int) -> None:
    """The closed form is the divergence by quadrature; the other direction is smaller."""

    def renyi(mixture_on_top: bool) -> float:
        def integrand(x: float) -> float:
            base = math.exp(-abs(x) / scale) / (2 * scale)
            ratio = 1 - q + q * math.exp((abs(x) - abs(x - 1)) / scale)
            return base * ratio ** (order if mixture_on_top else 1 - order)

        edge = 60 * scale
        parts = [(-edge, 0), (0, 1), (1, 1 + edge)]
        total = sum(integrate.quad(integrand, *p, epsabs=0, epsrel=1e-12)[0] for p in parts)
        return math.log(total) / (order - 1)

    closed = accounting._sampled_laplace_rdp(q, scale, order)
    assert closed == pytest.approx(renyi(True), rel=1e-6, abs=1e-13)
    assert closed >= renyi(False) - 1e-13


def test_quiet_over_the_range(caplog: pytest.LogCaptureFixture) -> None:
    """No order makes dp-accounting complain (warnings are errors in these tests anyway)."""
    logger = logging.getLogger("absl")
    logger.addHandler(caplog.handler)
    try:
        for q in (1e-4, 0.02, 0.2, 0.5, 0.51, 0.99):
            for z in (0.2, 0.9, 5.9, 30.0):
                assert np.isfinite(accounting._rdp(gaussian(z, q))).any()
        compose_epsilon({gaussian(2.0, 0.2): 60}, DELTA)
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.records == []


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
@pytest.mark.parametrize(
    ("q", "steps", "epsilon"), [(0.1, 200, 1.0), (0.1, 200, 8.0), (1.0, 20, 3.0), (0.01, 500, 0.5)]
)
def test_calibrate(mechanism: str, q: float, steps: int, epsilon: float) -> None:
    multiplier = calibrate(
        mechanism=mechanism, sampling_rate=q, steps=steps, epsilon=epsilon, delta=DELTA
    )
    spent = compose_epsilon({NoiseEvent(mechanism, multiplier, q): steps}, DELTA)
    assert 0.99 * epsilon <= spent <= epsilon


@pytest.mark.parametrize("q", [1.0, 0.1])
@pytest.mark.parametrize("epsilon", [0.3, 1.0, 7.0])
def test_calibrate_pure(q: float, epsilon: float) -> None:
    steps = 7
    scale = calibrate(mechanism="laplace", sampling_rate=q, steps=steps, epsilon=epsilon, delta=0.0)
    spent = compose_epsilon({laplace(scale, q): steps}, 0.0)
    assert epsilon * (1 - 1e-12) <= spent <= epsilon
    if q == 1:
        assert scale == pytest.approx(steps / epsilon)


def test_calibrate_without_target() -> None:
    plan = {"mechanism": "gaussian", "sampling_rate": 0.1, "steps": 3, "delta": DELTA}
    assert calibrate(epsilon=math.inf, **plan) == 0.0


@pytest.mark.parametrize(
    ("event", "epsilon", "delta"),
    [
        (gaussian(3.0, 0.1), 1.0, DELTA),
        (gaussian(10.0), 2.0, DELTA),
        (laplace(20.0, 0.1), 0.3, DELTA),
        (laplace(20.0), 1.0, 0.0),
    ],
)
def test_affordable_steps(event: NoiseEvent, epsilon: float, delta: float) -> None:
    steps = affordable_steps(event, epsilon, delta)
    assert 0 < steps < 5000
    assert compose_epsilon({event: steps}, delta) <= epsilon
    assert compose_epsilon({event: steps + 1}, delta) > epsilon


def test_affordable_steps_edges() -> None:
    assert affordable_steps(gaussian(0.0), 1.0, DELTA) == 0
    assert affordable_steps(gaussian(0.0), math.inf, DELTA) == 10**9
    assert affordable_steps(gaussian(0.5), 0.1, DELTA) == 0
    assert affordable_steps(gaussian(1.0), 1.0, 0.0) == 0
    assert affordable_steps(gaussian(1e9), 8.0, DELTA) == 10**9


CELLS = 80
GRID = np.array([0.0, 0.01, 0.1, 0.3, 0.5, 0.8, 0.95])


def _plds(epsilons: list[float], pessimistic: bool) -> plds.PrivacyLossDistribution:
    """The product of unsampled Laplaces."""
    parts = [
        plds.from_laplace_mechanism(
            1 / e,
            value_discretization_interval=2e-5,
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
        )
        for e in epsilons
    ]
    joint = parts[0]
    for part in parts[1:]:
        joint = joint.compose(part)
    return joint


def test_delta_at_zero() -> None:
    """One Laplace at epsilon 1, and the product of two at 1/2."""
    one, two = (_plds(e, True).get_delta_for_epsilon(0.0) for e in ([1.0], [0.5, 0.5]))
    assert one == pytest.approx(1 - math.exp(-0.5), abs=1e-6)
    assert two == pytest.approx(0.242, abs=5e-4)


def _profile_of_product(
    shares: list[float], q: float, epsilon: float, mixture_on_top: bool
) -> float:
    """Hockey-stick divergence of the sampled product of Laplaces, in closed pieces by grids.

    The product's privacy loss (unsampled) is a sum of independent losses; sampling acts on the
    joint likelihood ratio, one coin for all layers.
    """
    loss, mass = np.zeros(1), np.ones(1)
    edges = np.linspace(0, 1, CELLS + 1)
    for share in shares:
        middle = (edges[1:] + edges[:-1]) / 2
        # Under the distribution without the unit: x = layer's noise / sensitivity, b = 1/share.
        weights = (np.exp(-share * edges[:-1]) - np.exp(-share * edges[1:])) / 2
        own = np.concatenate([[-share], share * (2 * middle - 1), [share]])
        probability = np.concatenate([[0.5], weights, [np.exp(-share) / 2]])
        loss = (loss[:, None] + own[None, :]).ravel()
        mass = (mass[:, None] * probability[None, :]).ravel()
    ratio = 1 - q + q * np.exp(loss)
    if mixture_on_top:
        return float(np.sum(mass * np.maximum(ratio - math.exp(epsilon), 0)))
    return float(np.sum(mass * np.maximum(1 - math.exp(epsilon) * ratio, 0)))


@pytest.mark.parametrize("q", [1.0, 0.3, 0.05])
@pytest.mark.parametrize("mixture_on_top", [True, False])
@pytest.mark.parametrize("split", [[0.5, 0.5], [0.9, 0.1], [0.2, 0.3, 0.5]])
@pytest.mark.parametrize("total", [0.2, 1.0, 4.0])
def test_one_laplace_dominates_the_layers(
    q: float, mixture_on_top: bool, split: list[float], total: float
) -> None:
    """Charging one Laplace at the sum of the layers' epsilons never charges too little."""
    largest = math.log1p(q * math.expm1(total))
    for epsilon in GRID * largest:
        layers = _profile_of_product([total * s for s in split], q, epsilon, mixture_on_top)
        one = _profile_of_product([total], q, epsilon, mixture_on_top)
        # The grid's own error: second order in the width of a cell in the loss.
        assert layers <= one + 0.3 * q * (2 * total / CELLS) ** 2
        if epsilon == 0:
            assert layers < 0.999 * one


@pytest.mark.parametrize("split", [[0.5, 0.5], [0.9, 0.1], [0.25] * 4, [0.05] * 20])
@pytest.mark.parametrize("total", [0.5, 2.0])
def test_one_laplace_dominates_by_pld(split: list[float], total: float) -> None:
    """The same with dp-accounting: lower estimate of one against upper estimate of layers."""
    one = _plds([total], False)
    layers = _plds([total * s for s in split], True)
    for epsilon in GRID * total:
        # The lower estimate is off by at most one cell of 2e-5 in the loss.
        assert layers.get_delta_for_epsilon(epsilon) <= one.get_delta_for_epsilon(epsilon) + 3e-5
