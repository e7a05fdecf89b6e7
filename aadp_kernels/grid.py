"""The grid form: noise and contributions are integers, so that floating point can leak nothing.

A sum x + noise in floating point has gaps that depend on x: some outputs are possible for one x
and impossible for another, whatever the noise scale (Mironov 2012). In the grid form everything
private is an integer until the noise is in:

1. A unit's layer, clipped to C, is divided by the quantum q and cut to integers, towards zero. The
   factor is shrunk by the rounding bounds, so that the integer vector has a norm of at most C / q,
   always. Rounding to the nearest would add up to d / 2 quanta. Over several units or records the
   *integers* are summed, in int64; cutting after the sum could cost d quanta of sensitivity.
2. Integer noise k of scale T = 2^30 quanta is added to the sum S.
3. The release is (S + k + offset) * q, rounded: a function of the integer S + k only.

**Laplace.** k = floor(X) for a Laplace variable X with density proportional to 2^(-|x|/T), and
q >= b ln2 / T. For an integer S, S + floor(X) = floor(S + X): the release is a function of the
continuous Laplace mechanism with sensitivity C / q and scale T / ln2 <= b / q, so its epsilon is
at most C / b in every accounting of that mechanism, subsampled or composed. offset 1/2 takes away
the bias of the floor. k is drawn from integers alone: |X| has as integer part G = H T + R with
independent H and R, H the zeros before the first one in a row of fair coins, R three independent
digits (the exponential factorises over them), and floor(-|X|) = -1 - G. The digits' tables are
rounded to 2^-64, which `inexactness` charges. H is exact up to 8255 octaves, where the remaining
mass sits; S is clamped to +-4096 T before and S + k after the noise (a contraction of S, then a
function of the release), so that all that mass gives the same output as it would have: delta is 0.
The clamp lies 2839 noise scales from zero.

**Gaussian.** k is a discrete Gaussian, P(k) proportional to exp(-k^2 / (2 T^2)), q = sigma / T. By
Canonne, Kamath and Steinke 2020 (theorems 4 and 14) its Renyi divergences are those of the
continuous one or less. Its other curves are not, but the mass of a cell [k - 1/2, k + 1/2] of the
continuous one differs from P(k) by a factor within exp(+-(g^2 + 1) / (24 T^2)) at g = |k| / T, and
round(S + X) = S + round(X): so it is charged as the continuous Gaussian with an inflation of
epsilon. It is drawn by rejection from the two-sided G with the probability exp(-(g - ln2)^2 / 2),
evaluated in float64; the bound on that rounding is in `inexactness`. It accepts 68 % at a time; 128
rejections in a row (1e-64) would give k = 0.

Sums. An entry of a record stops at 4096 T quanta (a clip norm above 4096 noise scales would be
needed), a running sum at 2^61; both are contractions, so the sensitivity stays. An int64 overflow
is impossible. Running sums are PRIVATE: the clamps come before a wrap could.

References:
    Mironov 2012, "On significance of the least significant bits for differential privacy";
    Canonne, Kamath, Steinke 2020, arXiv:2004.00010 (discrete Gaussian);
    Ghosh, Roughgarden, Sundararajan 2009, arXiv:0811.2841 (geometric mechanism).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aadp_kernels import _validate, _validate_tensors
from aadp_kernels.grid_law import OCTAVE_BITS

ATTEMPTS = 128
TAIL_DOMAINS = 32
MAX_OCTAVES = 63 + 256 * TAIL_DOMAINS
LIMIT = 1 << 42
SUM_LIMIT = 1 << 61
RECORDS_AT_ONCE = 1 << 18
MAX_WEIGHT = 2.0**1000
OFFSETS = {"laplace": 0.5, "gaussian": 0.0}
LN2_UP = math.nextafter(math.log(2), 1)


def quantum(scale: float | Tensor, mechanism: str) -> Tensor:
    """Grid step q of a noise scale: `scale * ln2 / 2^30` (laplace) or `scale / 2^30` (gaussian).

    Args:
        scale: b or standard deviation, >= 0 and finite, public.
        mechanism: "gaussian" or "laplace".

    Returns:
        float64, of the shape of `scale`; never below the exact value (of the Laplace step).

    Raises:
        ValueError: An unknown mechanism; a scale on the CPU that is negative or not finite.

    Edge cases:
        | scale | q |
        |---|---|
        | 0 | 0: no grid |
        | so small that q would be subnormal | the smallest normal number: more noise than asked |
        | negative or not finite, on an accelerator | NaN |
    """
    _validate.one_of("mechanism", mechanism, tuple(OFFSETS))
    scale = torch.as_tensor(scale, dtype=torch.float64)
    _validate_tensors.nonnegative_tensor("scale", scale, finite=True)
    factor = (LN2_UP if mechanism == "laplace" else 1.0) * 2.0**-OCTAVE_BITS
    step = (scale * factor).clamp(min=torch.finfo(torch.float64).tiny)
    step = torch.where(torch.isfinite(scale) & (scale > 0), step, torch.nan)
    return torch.where(scale == 0, 0.0, step)


def release(total: Tensor, noise: Tensor | None, step: Tensor, mechanism: str) -> Tensor:
    """Integers S with noise as float64, (S + noise + offset) * step; exactly zero where step is 0.

    Without noise a step that is not 0 gives NaN.
    """
    if noise is None:
        noise = torch.zeros_like(total)
        step = torch.where(step == 0, 0.0, torch.nan)
    noised = (total.clamp(-LIMIT, LIMIT) + noise).clamp(-LIMIT, LIMIT)
    return torch.where(step == 0, 0.0, (noised.to(torch.float64) + OFFSETS[mechanism]) * step)
