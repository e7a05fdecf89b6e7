"""What a noised step costs beyond its event, because the noise that is drawn is not the ideal one.

The accountant knows Gaussian and Laplace noise of unbounded range. A sampler that reads a finite
number of bits has a largest draw, its cutoff c. In units of the noise scale a unit moves the
released vector by some v, of L2 norm at most S = 1/z (Gaussian) or L1 norm at most S = 1/lambda
(Laplace): `noise_scales` makes it so for all layers and votes together.

Let R be the set of noise vectors that can be drawn, m its probability under the ideal noise, and
tau(v) = P(x in R, x + v not in R). Under both neighbours the density that is drawn is the ideal one
divided by m where the other neighbour can produce the same output, and such outputs fail to exist
for the other with probability at most tau/m. Over T adaptively chosen steps (no unit sampled, or
Poisson sampled, coins of the others revealed) the good outputs give at most delta(epsilon)/m^T and
the others at most T·tau/m^T. So a mechanism that is (epsilon, delta - T·tau - (1 - m^T)·delta) DP
with ideal noise is (epsilon, delta) DP with the noise that is drawn, and (1 - m^T) <= T·(1 - m).

- Laplace: 1 - m <= N·exp(-c) for N elements, and coordinate i leaves R on one side only:
  tau = sum_i (exp(-(c - |v_i|)) - exp(-c))/2 <= exp(-c)·(exp(S) - 1)/2, since the terms
  exp(|v_i|) - 1 are superadditive. Whatever N is.
- Gaussian (Box-Muller): pairs of elements have a radius of at most c; 1 - m <= n·exp(-c²/2) for n
  pairs. A pair that moves by s leaves R with probability at most P(c - s < radius <= c) =
  h(s) = exp(-(c - s)²/2) - exp(-c²/2), which is convex with h(0) = 0 for s <= c - 1. So
  sum_i h(s_i) <= sum_i s_i·h(S)/S <= sqrt(n)·h(S).

The grid form has no cut to speak of, but probabilities that are off by a factor within exp(±eta)
an element, for a Gaussian up to a cutoff c of single elements. Where both neighbours' noise is
within it, the density ratio is off by at most exp(2·N·eta) a step, and delta by exp(N·eta): an
inflation of epsilon by 2·N·eta and of delta by delta·N·eta a step. The rest has a probability of at
most N·2·Q(c) + sum_i (Q(c - |v_i|) - Q(c)) <= tail + sqrt(N)·(Q(c - S) - Q(c)), Q the Gaussian
tail, convex up to c. Laplace noise has no cutoff: with delta 0 its epsilon alone is inflated.

Reference:
    Bun and Steinke 2016, arXiv:1605.02065 (truncated noise costs a delta); the bounds above are
    derived here.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from aadp_kernels import grid_law, tail_cutoff
from fl_lightning.accounting.composition import affordable_steps, calibrate, compose_epsilon
from fl_lightning.accounting.noise_part_tails import cut_part_tails
from fl_lightning.values.event import NoiseEvent

_MOST_NOISE = 2.0**40


@dataclass(frozen=True)
class SamplerCost:
    """What one noised step costs on top of its event; steps add up. Public.

    Args:
        epsilon: added to epsilon.
        delta: taken from delta before the events are composed.
    """

    epsilon: float = 0.0
    delta: float = 0.0


Beside = tuple[NoiseEvent, int, SamplerCost]  # an event, how often, and what it costs beyond


def noise_streams(dims: Sequence[int], *, votes: bool) -> tuple[int, ...]:
    """Elements that draw noise in one step: those of each layer, and a vote for each layer."""
    return (*dims, *([len(dims)] if votes else []))


@functools.lru_cache(maxsize=4096)
def inexact_noise(
    event: NoiseEvent,
    form: str,
    *,
    streams: tuple[int, ...],
    delta: float,
    noise_parts: int | None = None,
) -> SamplerCost:
    """What a step costs beyond its event.

    Args:
        event: the step.
        form: form of the noise, "wide", "fast" or "grid".
        streams: see `noise_streams`.
        delta: the client's delta.
        noise_parts: how many parts of different hands make the whole noise; None: it is one noise.
    """
    cutoff = tail_cutoff(event.mechanism, form)
    if noise_parts is not None and event.mechanism == "laplace":
        gaussian, elements = tail_cutoff("gaussian", form), sum(streams)
        tails = cut_part_tails(
            event, gaussian=gaussian, laplace=cutoff, noise_parts=noise_parts, elements=elements,
            delta=delta,
        )  # fmt: skip
        return SamplerCost(0.0, tails)
    streams *= noise_parts or 1
    if form != "grid":
        return cut_tails(event, cutoff=cutoff, streams=streams, delta=delta)
    inflation, tail = grid_law.inexactness(event.mechanism, sum(streams))
    return grid_errors(event, inflation, tail, cutoff=cutoff, elements=sum(streams), delta=delta)


def cut_tails(
    event: NoiseEvent, *, cutoff: float, streams: tuple[int, ...], delta: float
) -> SamplerCost:
    """The delta that a largest draw of `cutoff` noise scales costs in one step.

    Args:
        event: the step.
        cutoff: largest |noise| / scale; for a Gaussian the largest radius of a pair.
        streams: elements of each layer (and of the votes), which draw noise for themselves.
        delta: the client's delta.

    Edge cases:
        | case | result |
        |---|---|
        | no noise | nothing: epsilon is infinite anyway |
        | a sensitivity beyond the cutoff | delta 1: some outputs tell the unit for sure |
    """
    if event.noise_multiplier == 0:
        return SamplerCost()
    shift = 1 / event.noise_multiplier
    if event.mechanism == "laplace":
        missing = sum(streams) * math.exp(-cutoff)
        leaves = math.exp(-cutoff) * math.expm1(min(shift, 2 * cutoff)) / 2
    else:
        pairs = sum(-(-count // 2) for count in streams)
        missing = pairs * math.exp(-(cutoff**2) / 2)
        if shift <= cutoff - 1:
            gain = math.expm1(cutoff * shift - shift**2 / 2)
            leaves = math.sqrt(pairs) * math.exp(-(cutoff**2) / 2) * gain
        else:
            leaves = pairs * math.exp(-(max(cutoff - shift, 0.0) ** 2) / 2)
    return SamplerCost(0.0, min(1.0, leaves + delta * missing))


def grid_errors(
    event: NoiseEvent,
    inflation: float,
    tail: float,
    *,
    cutoff: float,
    elements: int,
    delta: float,
) -> SamplerCost:
    """What whole-number noise costs in one step.

    Args:
        event: the step.
        inflation: 2·N·eta, from `aadp_kernels.grid_law.inexactness`, with eta the largest
            |ln(probability drawn / probability charged)| of an element with noise up to the cutoff.
        tail: probability of noise beyond the cutoff.
        cutoff: noise scales within which eta holds; infinite for Laplace.
        elements: N.
        delta: the client's delta.

    Edge cases:
        delta 0 with Laplace noise: nothing is taken from delta.
    """
    if event.noise_multiplier == 0:
        return SamplerCost()
    leaves, shift = 0.0, 1 / event.noise_multiplier
    if math.isfinite(cutoff):
        gain = math.erfc((cutoff - shift) / math.sqrt(2)) - math.erfc(cutoff / math.sqrt(2))
        leaves = (math.sqrt(elements) if shift <= cutoff else elements) * gain / 2
    return SamplerCost(
        inflation, min(1.0, (tail + leaves) * math.exp(inflation) + delta * inflation / 2)
    )


def charged_epsilon(
    event: NoiseEvent, steps: int, delta: float, extra: SamplerCost, beside: Beside | None = None
) -> float:
    """Epsilon of `steps` equal steps at `delta`, with what each costs beyond its event.

    Args:
        event, steps, delta: of the steps.
        extra: what each costs beyond its event.
        beside: what else is composed with them.
    """
    other, times, cost = beside or (event, 0, SamplerCost())
    left = delta - steps * extra.delta - times * cost.delta
    if left < 0:
        return math.inf
    counts = Counter({event: steps}) + Counter({other: times})
    return compose_epsilon(counts, left) + steps * extra.epsilon + times * cost.epsilon


def calibrate_charged(
    event: NoiseEvent,
    steps: int,
    epsilon: float,
    delta: float,
    extra: Callable[[NoiseEvent], SamplerCost],
    *,
    beside: Beside | None = None,
) -> float:
    """The noise multiplier with which `steps` steps cost at most `epsilon`, extras included.

    Args:
        event: the step; its multiplier does not matter.
        steps: noised steps planned, >= 1.
        epsilon: target, > 0 and finite.
        delta: in [0, 1).
        extra: what a step costs beyond its event; never more for a larger multiplier.
        beside: another event, how often it happens too, and what each costs beyond it.

    Returns:
        The multiplier of `accounting.calibrate` where that is enough, else a larger one. A large
        epsilon or a small sampling rate would need less noise than can be drawn: then it is the
        smallest whose extras leave half of epsilon and delta, and less than epsilon is spent.

    Raises:
        ValueError: the extras alone cost more than epsilon or delta.
    """

    def charged(multiplier: float) -> float:
        tried = replace(event, noise_multiplier=multiplier)
        return charged_epsilon(tried, steps, delta, extra(tried), beside)

    def drawn(multiplier: float) -> bool:
        cost = extra(replace(event, noise_multiplier=multiplier))
        return steps * cost.epsilon <= epsilon / 2 and steps * cost.delta <= delta / 2

    floor = _smallest(drawn)
    if floor is not None and charged(floor) <= epsilon:
        return floor
    other = SamplerCost() if beside is None else beside[2]
    times = 0 if beside is None else beside[1]
    left, rest, cost = epsilon, delta, SamplerCost()
    for _ in range(8):
        multiplier = _ideal(event, steps, left, rest, beside)
        cost = extra(replace(event, noise_multiplier=multiplier))
        if charged(multiplier) <= epsilon:
            return multiplier
        # Rounding of the ledger's sums must not pass the target either.
        left = epsilon * (1 - 1e-12) - steps * cost.epsilon - times * other.epsilon
        rest = delta - (steps * cost.delta + times * other.delta) * (1 + 1e-9)
        if left <= 0 or rest <= 0:
            break
    if floor is None:
        raise ValueError(
            f"epsilon={epsilon} with delta={delta} in {steps} steps cannot be proven: the noise "
            f"that is drawn differs from the ideal one, which alone costs epsilon "
            f"{steps * cost.epsilon:.3g} and delta {steps * cost.delta:.3g}; use "
            "noise_form='wide' (at delta=0: noise_form='grid'), fewer steps or a larger epsilon or "
            "delta"
        )
    # At the floor or above it the extras are what they are at the floor, or less.
    cost = extra(replace(event, noise_multiplier=floor))
    left = epsilon * (1 - 1e-12) - steps * cost.epsilon - times * other.epsilon
    rest = delta - (steps * cost.delta + times * other.delta) * (1 + 1e-9)
    return max(floor, _ideal(event, steps, left, rest, beside))


def _ideal(
    event: NoiseEvent, steps: int, epsilon: float, delta: float, beside: Beside | None
) -> float:
    """The multiplier that ideal noise would need."""
    return calibrate(
        mechanism=event.mechanism,
        sampling_rate=event.sampling_rate,
        steps=steps,
        epsilon=epsilon,
        delta=delta,
        adjacency=event.adjacency,
        beside=None if beside is None else beside[:2],
    )


def _smallest(good: Callable[[float], bool]) -> float | None:
    """The smallest good multiplier up to 1 %, if larger ones of a good one are good; or None."""
    high = 1.0
    while not good(high):
        high *= 2
        if high > _MOST_NOISE:
            return None
    low = high / 2
    while good(low) and low > 1 / _MOST_NOISE:
        high, low = low, low / 2
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if good(middle) else (middle, high)
    return high


def affordable_charged(event: NoiseEvent, epsilon: float, delta: float, extra: SamplerCost) -> int:
    """A number of steps with `charged_epsilon` of at most `epsilon`: `affordable_steps` or less."""
    steps = affordable_steps(event, epsilon, delta)
    if charged_epsilon(event, steps, delta, extra) <= epsilon:
        return steps
    for cost, budget in ((extra.epsilon, epsilon), (extra.delta, delta)):
        if cost > 0:
            steps = min(steps, int(budget / 2 / cost))
    if steps == 0:
        return 0
    left, rest = epsilon - steps * extra.epsilon, delta - steps * extra.delta
    return min(steps, affordable_steps(event, left, rest))
