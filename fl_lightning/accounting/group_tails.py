"""What inexact noise costs a group: `exactness` for shifts of a whole group instead of one unit.

The notation is that of `exactness`. A group of g moves the noise by sums x_S of its members'
vectors, S being those whom the coins take. All bounds there hold with the shift of the whole group,
not g times the cost of one: they compare the two neighbours directly.

Outputs that one neighbour can produce and another shift cannot:

- From x_S to 0: n and n + x_S, so tau(x_S), which counts with the probability of S.
- From 0 to any of the x_S: pair i must have a radius of more than c - s_i with s_i the sum of its
  members' |x_j|, a vector of norm at most g·S. One-sided tails a_i and b_i of coordinates add up to
  less than the tail of a_i + b_i, as h is convex with h(0) = 0. So tau(g·S) covers all of them.
- From 0, where the coins leave all of the group out with probability w: Q <= P/w for the ideal
  distributions Q = noise(0) and P, and under P the noise is outside R with probability 1 - m at
  most. So Q lies with a probability of at most (1 - m)/(t·w) where more than a part t of P's
  density cannot be produced. Elsewhere the loss grows by no more than -log(1 - t).

A sum of h over pairs: those that move by s_i <= 1 give at most sqrt(n)·S·h(1), as h is convex
there. h(s)/s² rises from 1 to c - 1, so the others give at most S² times its largest value. That is
less than sqrt(n)·h(S) where S is above 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aadp_kernels import grid_law, tail_cutoff
from fl_lightning.accounting.exactness import SamplerCost, noise_streams
from fl_lightning.accounting.noise_part_tails import missing_parts
from fl_lightning.accounting.shift_mixtures import ShiftMixture

# Part of epsilon that may be given away for outputs which the group's data can hardly produce.
_GIVEN = 1e-4


@dataclass(frozen=True)
class Sampler:
    """How far the noise of a run reaches, for shifts in noise scales. Public.

    Args:
        mechanism, form: of the noise.
        streams: elements of each layer (and of the votes).
        noise_parts: how many parts make the whole noise; None: it is one noise.
    """

    mechanism: str
    form: str
    streams: tuple[int, ...]
    noise_parts: int | None = None

    @property
    def _split(self) -> tuple[int, ...]:
        return self.streams * (self.noise_parts or 1)

    @property
    def inflation(self) -> float:
        """Epsilon that the errors of probabilities cost a step, whatever the shift."""
        return self._grid()[0] if self.form == "grid" else 0.0

    def _grid(self) -> tuple[float, float]:
        return grid_law.inexactness(self.mechanism, sum(self._split))

    def _cutoff(self, mechanism: str = "") -> float:
        return tail_cutoff(mechanism or self.mechanism, self.form)

    def missing(self) -> float:
        """1 - m: probability that ideal noise of a step cannot be drawn."""
        if self.form == "grid":
            return self._grid()[1]
        if self.mechanism == "laplace" and self.noise_parts is not None:
            cutoffs = {"gaussian": self._cutoff("gaussian"), "laplace": self._cutoff()}
            return missing_parts(self.noise_parts, sum(self.streams), **cutoffs)
        if self.mechanism == "laplace":
            return sum(self.streams) * math.exp(-self._cutoff())
        return self._pairs() * math.exp(-(self._cutoff() ** 2) / 2)

    def _pairs(self) -> int:
        return sum(-(-count // 2) for count in self._split)

    def leaves(self, shift: float) -> float:
        """tau: probability that noise moved by a vector of this norm cannot be drawn unmoved."""
        if shift == 0:
            return 0.0
        if self.mechanism == "gaussian":
            single = self.form == "grid"
            count = sum(self._split) if single else self._pairs()
            return _gaussian_leaves(shift, self._cutoff(), count, single=single)
        if self.noise_parts is not None:
            return min(1.0, math.exp(min(shift, 700.0)) * self.missing())
        cutoff = self._cutoff()
        if math.isinf(cutoff):
            return 0.0
        return min(1.0, math.exp(-cutoff) * math.expm1(min(shift, 2 * cutoff)) / 2)


def _gaussian_leaves(shift: float, cutoff: float, count: int, *, single: bool) -> float:
    def tail(x: float) -> float:
        return math.erfc(x / math.sqrt(2)) / 2 if single else math.exp(-(x**2) / 2)

    def h(s: float) -> float:
        return tail(cutoff - s) - tail(cutoff)

    if shift <= 1:
        return math.sqrt(count) * h(shift)
    reach = min(shift, cutoff - 1)
    steepest = h(reach) / reach**2
    if shift > reach:
        steepest = max(steepest, tail(max(cutoff - shift, 0.0)) / reach**2)
    return min(1.0, math.sqrt(count) * shift * h(1.0) + shift**2 * steepest)


def sampler_of(header: Mapping[str, Any], *, votes: bool) -> Sampler | None:
    """The sampler of a run by its ledger's header; None where the header does not say."""
    if "noise_form" not in header or "dims" not in header:
        return None
    noise_parts = header["min_survivors"] if header["setting"] == "client+secure_sum" else None
    streams = noise_streams(header["dims"], votes=votes)
    return Sampler(header["mechanism"], header["noise_form"], streams, noise_parts)


def group_extra(
    sampler: Sampler, counts: Mapping[ShiftMixture, int], epsilon: float, delta: float
) -> SamplerCost:
    """What all steps of a group cost beyond ideal noise.

    Args:
        sampler: of the run.
        counts: how often each step happened.
        epsilon, delta: of the group with ideal noise.

    Returns:
        Epsilon and delta to be added. A delta of 1: some outputs tell the group for sure.
    """
    steps = sum(counts.values())
    extra, leaves = steps * sampler.inflation, _leaving(sampler, counts)
    missing = steps * sampler.missing()
    forward = sum(
        n * math.fsum(w * sampler.leaves(s) for w, s in zip(m.weights, m.shifts, strict=True))
        for m, n in counts.items()
    )
    still = min((m.weights[0] if m.shifts[0] == 0 else 0.0 for m in counts), default=0.0)
    exchanged = any(m.exchange is not None for m in counts)
    if still > 0 and not exchanged and leaves > delta / 1000 and 0 < epsilon < math.inf:
        part = _GIVEN * epsilon / steps
        if part < 0.5 and missing / (part * still) < leaves:
            leaves = missing / (part * still)
            extra -= steps * math.log1p(-part)
    lost = max(forward, leaves) + missing + delta * steps * sampler.inflation / 2
    return SamplerCost(extra, min(1.0, lost * math.exp(steps * sampler.inflation) / (1 - missing)))


def _leaving(sampler: Sampler, counts: Mapping[ShiftMixture, int]) -> float:
    """Outputs without the group's data that the data cannot produce, all steps together."""
    total = 0.0
    for mixture, count in counts.items():
        if mixture.exchange is None:
            total += count * sampler.leaves(mixture.shifts[-1])
        else:
            pairs = zip(mixture.weights, mixture.shifts, strict=True)
            total += count * math.fsum(w * sampler.leaves(2 * s) for w, s in pairs)
    return min(1.0, total)
