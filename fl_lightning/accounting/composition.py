"""From noise multipliers to epsilon and back: composition, calibration, budgets in steps.

Whatever has no closed form is analysed by dp-accounting. A `NoiseEvent` is what one noised step is
to the accountant: one joint mechanism over all layers and votes with one Poisson coin per unit. Its
noise multiplier is relative to the sensitivity, so it already contains the factor 2 of
`replace_one`, the layers' shares and the votes' part of the budget.

Reference:
    PLD: Koskela et al. 2020 (arXiv 1906.03049), Doroshenko et al. 2022 (arXiv 2207.04380, the
    pessimistic "connect the dots" estimate). RDP: Mironov et al. 2019 (arXiv 1908.10530) and
    Canonne et al. 2020 (arXiv 2004.00010, prop. 12). Gaussian without sampling: Balle and Wang
    2018 (arXiv 1805.06530, eq. 6).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import astuple
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from fl_lightning.accounting.gaussian import gaussian_epsilon
from fl_lightning.values.event import NoiseEvent

ACCOUNTANTS = ("pld", "rdp")
# Below this delta the rounding of the FFT inside the PLD is no longer negligible.
SMALLEST_PLD_DELTA = 1e-10
# Beyond this epsilon a finer analysis than RDP has no meaning and the PLD grows without bound.
LARGEST_PLD_EPSILON = 1e3
LARGEST_PLD_STEPS = 10**6
_MAX_STEPS = 10**9
_FRACTIONAL_ORDERS = tuple(2 + i / 8 for i in range(1, 56) if i % 8)
_INTEGER_ORDERS = (*range(2, 64), *(round(64 * 2 ** (i / 4)) for i in range(21)))
_ORDERS = np.array(sorted(_FRACTIONAL_ORDERS + _INTEGER_ORDERS), dtype=np.float64)


def _check_delta(delta: float) -> None:
    if not 0 <= delta < 1:
        raise ValueError(f"delta must be in [0, 1), got {delta}")


def compose_epsilon(
    counts: Mapping[NoiseEvent, int], delta: float, *, accountant: Literal["pld", "rdp"] = "pld"
) -> float:
    """Epsilon of all events together at `delta`; an upper bound.

    Args:
        counts: how often each event happened; all of one adjacency.
        delta: in [0, 1).
        accountant: "pld" (tight) or "rdp" (looser, cheaper).

    Returns:
        Epsilon >= 0, inf where nothing is guaranteed.

    Raises:
        ValueError: delta, a count or the accountant is invalid, or adjacencies are mixed.

    Guarantees:
        Never below the true epsilon up to floating point rounding (about 1e-15 in delta). "pld"
        is never above "rdp". Results are cached.

    Edge cases:
        | case | result |
        |---|---|
        | no events, or counts of 0 | 0 |
        | an event without noise | inf |
        | delta = 0 | the sum of pure epsilons for Laplace, inf with any Gaussian |
        | 0 < delta < 1e-10 | "pld" gives the RDP bound (the FFT is too coarse there) |
        | more than 1e6 events, or epsilon above 1000 | "pld" gives the RDP bound |
        | only Gaussians without sampling | "pld" gives the closed form |
    """
    _check_delta(delta)
    if accountant not in ACCOUNTANTS:
        raise ValueError(f"accountant must be one of {ACCOUNTANTS}, got {accountant!r}")
    for event, count in counts.items():
        if count < 0 or count != int(count):
            raise ValueError(f"counts must be integers >= 0, got {count} for {event}")
    key = tuple(sorted(((e, int(c)) for e, c in counts.items() if c), key=lambda x: astuple(x[0])))
    if len({event.adjacency for event, _ in key}) > 1:
        raise ValueError(f"counts must share one adjacency, got {sorted(counts, key=astuple)}")
    return _compose(key, float(delta), accountant)


@lru_cache(maxsize=65536)
def _compose(key: tuple[tuple[NoiseEvent, int], ...], delta: float, accountant: str) -> float:
    if not key:
        return 0.0
    if any(event.noise_multiplier == 0 for event, _ in key):
        return math.inf
    pure = sum(event.pure_epsilon() * count for event, count in key)
    if delta == 0:
        return pure
    total = np.sum([_rdp(event) * count for event, count in key], axis=0)
    rdp = min(_rdp_epsilon(total, delta), pure)
    if accountant == "rdp":
        return rdp
    if all(e.mechanism == "gaussian" and e.sampling_rate == 1 for e, _ in key):
        one = np.array([joint_multiplier(key)])
        return min(float(gaussian_epsilon(one, np.array([delta]))[0]), rdp)
    steps = sum(count for _, count in key)
    if delta < SMALLEST_PLD_DELTA or steps > LARGEST_PLD_STEPS:
        return rdp
    if not 0 < rdp <= LARGEST_PLD_EPSILON:
        return rdp
    with np.errstate(all="ignore"):
        return min(float(composed_pld(key, rdp).get_epsilon(delta)), rdp)


def joint_multiplier(key: tuple[tuple[NoiseEvent, int], ...]) -> float:
    return 1 / math.sqrt(sum(count / event.noise_multiplier**2 for event, count in key))


def composed_pld(key: tuple[tuple[NoiseEvent, int], ...], guess: float) -> Any:
    """Composed pessimistic PLD on a grid of 1e-4 (many steps: 1e-5) of the expected epsilon."""
    steps = sum(count for _, count in key)
    fine = max(1e-2, min(1.0, 1e4 / steps)) ** 0.5
    return _composed_on(key, 1e-4 * 2.0 ** round(math.log2(max(guess, 1e-2) * fine)))


@lru_cache(maxsize=8)
def _composed_on(key: tuple[tuple[NoiseEvent, int], ...], interval: float) -> Any:
    """`composed_pld` on a grid of this interval; many guesses have the same."""
    import dp_accounting as dpa
    from dp_accounting.pld import pld_privacy_accountant as pld

    replaced = any(event.sampled_replacement for event, _ in key)
    if replaced and not all(event.sampled_replacement for event, _ in key):
        raise ValueError("counts must not mix sampled and unsampled events under replace_one")
    relation = {"neighboring_relation": dpa.NeighboringRelation.REPLACE_ONE} if replaced else {}
    accountant = pld.PLDAccountant(value_discretization_interval=interval, **relation)
    with np.errstate(all="ignore"):
        for event, count in key:
            accountant.compose(event.dp_event(), count)
    return accountant


@lru_cache(maxsize=4096)
def _rdp(event: NoiseEvent) -> np.ndarray:
    """Renyi divergences of one step at `_ORDERS`; inf at orders left out."""
    if event.sampled_replacement:
        return _replacement_rdp(event.sampling_rate, 0.5 / event.noise_multiplier)
    if event.sampling_rate == 1 and event.mechanism == "gaussian":
        # Mironov 2017 (arXiv 1702.07476), prop. 7.
        plain = _ORDERS / (2 * event.noise_multiplier**2)
        plain.setflags(write=False)
        return plain
    result = np.full(_ORDERS.shape, np.inf)
    chosen = np.ones(_ORDERS.shape, dtype=bool)
    q, z = event.sampling_rate, event.noise_multiplier
    # The library's series for fractional orders can diverge, loudly, for large z and q near 1/2.
    if q < 1 and (event.mechanism == "laplace" or z > 6):
        chosen = np.round(_ORDERS) == _ORDERS
    with np.errstate(all="ignore"):
        if q < 1 and event.mechanism == "laplace":
            result[chosen] = [_sampled_laplace_rdp(q, z, int(a)) for a in _ORDERS[chosen]]
        else:
            from dp_accounting.rdp import rdp_privacy_accountant as rdp

            accountant = rdp.RdpAccountant(_ORDERS[chosen].tolist())
            accountant.compose(event.dp_event())
            result[chosen] = accountant.rdp
    # A negative divergence is rounding of a vanishing one; NaN is overflow.
    result = np.where(np.isnan(result), np.inf, np.maximum(result, 0.0))
    result.setflags(write=False)
    return result


def _replacement_rdp(rate: float, shift: float) -> np.ndarray:
    """Divergences of (1-q) N(0) + q N(shift) from (1-q) N(0) + q N(-shift), unit variances.

    Both directions are the same. The trapezoid rule is exact to rounding for such smooth functions
    at steps of a twentieth of a standard deviation.
    """
    result = np.full(_ORDERS.shape, np.inf)
    for i, order in enumerate(_ORDERS):
        reach = 14 + 2 * (order + 1) * shift
        if reach > 5000:
            continue
        x = np.arange(-reach, reach, 0.05)
        stay = math.log1p(-rate) - x**2 / 2
        p, q = (np.logaddexp(stay, math.log(rate) - (x - s) ** 2 / 2) for s in (shift, -shift))
        terms = order * p + (1 - order) * q
        total = float(np.log(np.exp(terms - terms.max()).sum()) + terms.max())
        moment = total + math.log(0.05) - math.log(2 * math.pi) / 2
        result[i] = max(moment, 0.0) / (order - 1)
    result.setflags(write=False)
    return result


def _sampled_laplace_rdp(rate: float, scale: float, order: int) -> float:
    """Order-`order` divergence of (1-q) Q + q P from Q, by the binomial theorem.

    P and Q are mirror images, so this direction is the larger one (Mironov et al. 2019, thm. 5).
    """
    from scipy import special

    k = np.arange(order + 1, dtype=np.float64)
    log_moment = np.zeros_like(k)
    high = k[2:]
    log_moment[2:] = np.logaddexp(
        np.log(high / (2 * high - 1)) + (high - 1) / scale,
        np.log((high - 1) / (2 * high - 1)) - high / scale,
    )
    log_binomial = (
        special.gammaln(order + 1) - special.gammaln(k + 1) - special.gammaln(order - k + 1)
    )
    terms = log_binomial + k * math.log(rate) + (order - k) * math.log1p(-rate) + log_moment
    return float(special.logsumexp(terms)) / (order - 1)


def _conversion(delta: float) -> np.ndarray:
    """What RDP at each order pays for `delta`; epsilon = min over orders of RDP + this."""
    return np.log1p(-1 / _ORDERS) - np.log(delta * _ORDERS) / (_ORDERS - 1)


def _rdp_epsilon(rdp: np.ndarray, delta: float) -> float:
    return max(0.0, float(np.min(rdp + _conversion(delta))))


@lru_cache(maxsize=1024)
def calibrate(
    *,
    mechanism: str,
    sampling_rate: float,
    steps: int,
    epsilon: float,
    delta: float,
    adjacency: str = "zero_out",
    beside: tuple[NoiseEvent, int] | None = None,
) -> float:
    """The noise multiplier with which `steps` steps cost at most `epsilon` at `delta`.

    Args:
        mechanism: "gaussian" or "laplace".
        sampling_rate: Poisson rate, 0 < q <= 1.
        steps: noised steps planned, >= 1.
        epsilon: target, > 0; inf gives 0 (no noise).
        delta: in [0, 1); 0 is for Laplace only.
        adjacency: "zero_out" or "replace_one".
        beside: another event and how often it happens too; it must leave room for the steps.

    Returns:
        A multiplier m with 0.99 * epsilon <= compose_epsilon({event(m): steps}, delta) <= epsilon
        by PLD; a bracket by RDP comes first. Cached.

    Raises:
        ValueError: a value outside its range, or a Gaussian with delta 0.
    """
    _check_delta(delta)
    if steps < 1 or steps != int(steps):
        raise ValueError(f"steps must be an integer >= 1, got {steps}")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be > 0, got {epsilon}")
    if delta == 0 and mechanism == "gaussian":
        raise ValueError("delta must be > 0 for mechanism 'gaussian', got 0")
    NoiseEvent(mechanism, 1.0, sampling_rate, adjacency)
    if math.isinf(epsilon):
        return 0.0

    def spent(multiplier: float, accountant: Literal["pld", "rdp"] = "pld") -> float:
        event = NoiseEvent(mechanism, multiplier, sampling_rate, adjacency)
        counts = Counter({event: steps}) + Counter(dict([beside] if beside else []))
        return compose_epsilon(counts, delta, accountant=accountant)

    if beside is not None:
        return _search(spent, epsilon)
    if delta == 0:
        loss = math.log1p(math.expm1(epsilon / steps) / sampling_rate)
        guess = steps / epsilon if sampling_rate == 1 else 1 / loss
        return _smallest_float(guess, lambda m: spent(m) <= epsilon)
    if mechanism == "gaussian" and sampling_rate == 1:
        from dp_accounting import gaussian_mechanism

        with np.errstate(all="ignore"):
            single = gaussian_mechanism.get_sigma_gaussian(epsilon, delta)
        return _smallest_float(
            float(single) * math.sqrt(steps) * (1 + 1e-9), lambda m: spent(m) <= epsilon
        )
    return _search(spent, epsilon)


def _smallest_float(guess: float, good: Callable[[float], bool]) -> float:
    """The first good value a few roundings above `guess`."""
    step = 2.0**-52
    while not good(guess):
        guess *= 1 + step
        step *= 2
    return guess


def _search(spent: Callable[..., float], epsilon: float) -> float:
    """Root of `spent(m) = epsilon` from above: bisection by RDP, then false position by PLD."""
    low = high = 1.0
    while spent(high, "rdp") > epsilon:
        low, high = high, high * 2
    while spent(low, "rdp") <= epsilon:
        low, high = low / 2, low
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if spent(middle, "rdp") <= epsilon else (middle, high)
    high_cost = spent(high)
    low = high * max(0.5, (high_cost / epsilon) ** 2)
    while (low_cost := spent(low)) <= epsilon:
        high, high_cost, low = low, low_cost, low * 0.8
    while 0 < high_cost < 0.995 * epsilon and high / low > 1 + 1e-6:
        slope = math.log(low_cost / high_cost) / math.log(high / low)
        guess = low * (low_cost / (0.998 * epsilon)) ** (1 / slope)
        if not low * 1.0001 < guess < high * 0.9999:
            guess = math.sqrt(low * high)
        cost = spent(guess)
        if cost <= epsilon:
            high, high_cost = guess, cost
        else:
            low, low_cost = guess, cost
    return high


def affordable_steps(event: NoiseEvent, epsilon: float, delta: float) -> int:
    """The largest number of steps with epsilon by PLD at most `epsilon`, off by at most 1e-4 of it.

    Args:
        event: the step.
        epsilon: budget, >= 0.
        delta: in [0, 1).

    Returns:
        T >= 0, capped at 1e9. `compose_epsilon({event: T}, delta) <= epsilon` is checked for the
        T returned.
    """
    _check_delta(delta)
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be >= 0, got {epsilon}")
    if event.noise_multiplier == 0:
        return _MAX_STEPS if math.isinf(epsilon) else 0

    def spent(steps: int) -> float:
        return compose_epsilon({event: steps}, delta)

    if spent(_MAX_STEPS) <= epsilon:
        return _MAX_STEPS
    low = min(_affordable_by_rdp(event, epsilon, delta), _MAX_STEPS - 1)
    while spent(low) > epsilon:
        low -= max(1, low // 10**6)
    stride = max(1, low // 16)
    while spent(min(low + stride, _MAX_STEPS)) <= epsilon:
        low, stride = low + stride, stride * 2
    high = min(low + stride, _MAX_STEPS)
    # Halving and interpolating in turn: few of the expensive evaluations, and a sure end.
    halve = False
    while high - low > max(1, low // 10**4):
        share = 0.5 if halve else (epsilon - spent(low)) / (spent(high) - spent(low))
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        low, high = (middle, high) if spent(middle) <= epsilon else (low, middle)
        halve = not halve
    return low


def _affordable_by_rdp(event: NoiseEvent, epsilon: float, delta: float) -> int:
    """Steps that RDP (or pure DP) allows."""
    steps = epsilon / event.pure_epsilon()
    if delta > 0:
        rdp = _rdp(event)
        usable = np.isfinite(rdp) & (rdp > 0)
        if usable.any():
            steps = max(steps, float(np.max((epsilon - _conversion(delta))[usable] / rdp[usable])))
    return int(min(max(steps, 0.0), float(_MAX_STEPS)))
