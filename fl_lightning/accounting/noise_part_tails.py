"""What noise in parts costs beyond its event: every part has a largest draw of its own.

Let m parts of honest clients be the whole noise; further parts are independent of the data and
only post-process the sum. R is the set of draws that the sampler can make, mu the probability that
ideal draws are in it (`exactness` has the rest of the notation).

- Gaussian. The sum is a function of the m parts released one by one, each with an m-th of the
  shift: m vectors of scale sigma/sqrt(m) that move by v/m, jointly by |v|/sigma, as the sum does.
  So `cut_tails` holds with the streams of all m parts.
- Laplace. A difference of gamma variables of shape 1/m cannot carry a shift by itself. Write P, P'
  for the sum with ideal parts under both neighbours, dP/dP' <= exp(S), and B' for the part of P'
  with draws outside R, of mass 1 - mu: then P' = mu·(what is drawn) + B'. With b = dB'/dP',
  P = (1 - b)·P + b·P, where the first part is mu·dP/dP' times what is drawn under the neighbour,
  and the second has a mass of at most exp(S)·(1 - mu). So tau = exp(S)·(1 - mu) in the composition
  of `exactness`, a step, with S = 1/lambda.

A gamma variable (Marsaglia and Tsang 2000) of shape 1 + 1/m takes 1/a attempts on average, a the
probability of acceptance, each with a Gaussian and an exponential draw, and one more exponential
draw for the power: 1 - mu <= 2·m·N·((e_g + e_l)/a + e_l + (1 - a)^attempts) for N elements, with
e_g and e_l the probabilities that a draw is beyond its cutoff.

Reference:
    Ács and Castelluccia 2011 (Laplace noise in parts); the bounds above are derived here.
"""

from __future__ import annotations

import math

from fl_lightning.values.event import NoiseEvent


def acceptance(shape: float) -> float:
    """Probability that an attempt at a gamma variable of the given shape, >= 1, is accepted.

    The integral of the acceptance test over a Gaussian draw, in closed form.
    """
    d = shape - 1 / 3
    return math.exp(d + (1 / 6 - d) * math.log(d) + math.lgamma(d + 1 / 3)) / math.sqrt(2 * math.pi)


def missing_parts(noise_parts: int, elements: int, *, gaussian: float, laplace: float) -> float:
    """Bound of the probability that ideal Laplace parts need a draw that cannot be made.

    Args:
        noise_parts: m.
        elements: N.
        gaussian, laplace: cutoffs, in noise scales; the Gaussian's of the radius of a pair.
    """
    from fl_lightning.privacy.noise_parts import ATTEMPTS  # with torch, which few ledgers need

    accepted = acceptance(1 + 1 / noise_parts)
    beyond = math.exp(-(gaussian**2) / 2), math.exp(-laplace)
    each = sum(beyond) / accepted + beyond[1] + (1 - accepted) ** ATTEMPTS
    return 2 * noise_parts * elements * each


def cut_part_tails(
    event: NoiseEvent, *, gaussian: float, laplace: float, noise_parts: int, elements: int,
    delta: float,
) -> float:  # fmt: skip
    """The delta that cut draws of Laplace parts cost in one step.

    Args:
        event: the step, with Laplace noise.
        gaussian, laplace: cutoffs, see `missing_parts`.
        noise_parts: m.
        elements: that draw noise.
        delta: the client's delta.

    Edge cases:
        No noise costs nothing: epsilon is infinite anyway. A delta of 1: beyond what is possible.
    """
    if event.noise_multiplier == 0:
        return 0.0
    missing = missing_parts(noise_parts, elements, gaussian=gaussian, laplace=laplace)
    ratio = math.exp(min(1 / event.noise_multiplier, 700.0))
    return min(1.0, ratio * missing + delta * missing)
