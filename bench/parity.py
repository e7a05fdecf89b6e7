"""The gate: nothing is timed that does not clip and draw noise as it should.

Clip factors are compared with float64; noise is checked by its first two absolute moments, by its
independence within a result and from one call to the next, and, where a specification draws the
same words, number by number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# Of |z| and z^2 for unit scale: mean and variance.
MOMENTS = {
    "laplace": ((1.0, 1.0), (2.0, 20.0)),
    "gaussian": ((math.sqrt(2 / math.pi), 1 - 2 / math.pi), (1.0, 2.0)),
}
SIGMAS = 6.0
SLACK = 5e-3  # of a moment: rounding to half precision, approximate logarithms


class ParityError(Exception):
    """An implementation does not compute what it is compared for."""


def check_clip(got: Mapping[int, Tensor], expected: Mapping[int, Tensor], rtol: float) -> None:
    """Every element is that of the clipped update: to `rtol`, 10^-6 of the largest, a subnormal.

    Raises:
        ParityError: Names the first tensor that differs.
    """
    for i, want in expected.items():
        have = got[i].double()
        info = torch.finfo(got[i].dtype)
        allowed = rtol * want.abs() + 1e-6 * want.abs().max() + 2 * info.smallest_normal * info.eps
        off = (have - want).abs() > allowed
        if bool(off.any()) or have.shape != want.shape:
            worst = float(((have - want).abs() / want.abs().max()).max())
            raise ParityError(f"clip: tensor {i}, {int(off.sum())} elements differ ({worst:.1e})")


def check_noise(z: Tensor, mechanism: str) -> None:
    """Whether numbers look like independent noise of scale one; sharp from about 1000 on.

    Raises:
        ParityError: A moment is off by more than six standard errors, or halves are correlated.
    """
    z = z.double().flatten()
    n = z.numel()
    if n < 1000:
        raise ParityError(f"noise: {n} numbers are too few to check")
    if not bool(torch.isfinite(z).all()):
        raise ParityError("noise: not finite")
    for power, (mean, variance) in enumerate(MOMENTS[mechanism], 1):
        seen = float(z.abs().pow(power).mean())
        if abs(seen - mean) > SIGMAS * math.sqrt(variance / n) + SLACK * mean:
            raise ParityError(f"noise: mean of |z|^{power} is {seen:.4f}, must be {mean:.4f}")
    deviation = math.sqrt(MOMENTS[mechanism][1][0])
    if abs(float(z.mean())) > SIGMAS * deviation / math.sqrt(n) + SLACK * deviation:
        raise ParityError(f"noise: mean is {float(z.mean()):.4f}")
    independent(z[: n // 2], z[n // 2 : 2 * (n // 2)], "halves of one result")


def independent(a: Tensor, b: Tensor, what: str) -> None:
    """Raise ParityError if two samples of noise are correlated."""
    a, b = a.double().flatten(), b.double().flatten()
    correlation = float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())
    # Laplace products have kurtosis 6 * 6: twice six standard errors leave no false alarm.
    if abs(correlation) > 2 * SIGMAS / math.sqrt(a.numel()):
        raise ParityError(f"noise: {what} have correlation {correlation:.3f}")


def check_same(got: Tensor, clipped: Tensor, noise: Tensor, scale: float) -> None:
    """clipped + scale * noise, up to the accuracy that a faster form may have.

    |difference| <= scale * 2^-18 * (1 + |noise|) + 4 units in the last place of both terms.

    Raises:
        ParityError: Elsewhere.
    """
    added = scale * noise
    ulp = torch.finfo(got.dtype).eps * (clipped.abs() + added.abs())
    allowed = scale * 2.0**-18 * (1 + noise.abs()) + 4 * ulp
    off = (got.double() - clipped - added).abs() > allowed
    if bool(off.any()):
        raise ParityError(f"specification: {int(off.sum())} of {off.numel()} elements differ")
