"""What a release says of a canary: log-likelihood ratios piece by piece, by the stated noise.

A piece is a layer, or the votes. Stated scales are what the ledger charges for. So that noise that
is missing altogether is noticed too, the attacker also looks at how much noise each piece has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
_LEAST_NOISE = 1e-4  # of what is stated


@dataclass(frozen=True)
class Readings:
    """Readings of one or many canaries.

    Args:
        there, opposite: log-likelihood ratios of the canary, and of its opposite, against zero,
            [n, steps, pieces].
        noise: noise seen in units of what is stated, [n, steps, pieces]; NaN where nothing can be
            seen beside the canary. Variances for Gaussian noise, mean magnitudes for Laplace.
    """

    there: Floats
    opposite: Floats
    noise: Floats


def read(released: Tensor, shift: Tensor, mechanism: str) -> Tensor:
    """One piece of k releases, in units of the stated noise.

    Args:
        released: [k, d].
        shift: what the canary adds, [k, d].
        mechanism: "gaussian" or "laplace".

    Returns:
        [k, 3]: there, opposite and noise, see `Readings`.
    """
    released, shift = released.double().cpu(), shift.double().cpu()
    dims = released.shape[1]
    if mechanism == "laplace":
        size = released.abs()
        there = (size - (released - shift).abs()).sum(1)
        opposite = (size - (released + shift).abs()).sum(1)
        quiet = shift.abs() <= 0.01 * shift.abs().amax(1, keepdim=True)
        noise = (size * quiet).sum(1) / quiet.sum(1)  # NaN where nothing is quiet
        return torch.stack([there, opposite, noise], 1)
    length = shift.norm(dim=1)
    along = (released * shift).sum(1)
    rest = released.square().sum(1) - (along / length).nan_to_num(0.0).square()
    noise = rest / (dims - 1) if dims > 1 else torch.full_like(rest, torch.nan)
    half = length.square() / 2
    return torch.stack([along - half, -along - half, noise], 1)


def read_pieces(released: Sequence[Tensor], shift: Sequence[Tensor], mechanism: str) -> Tensor:
    """Several pieces of k releases: [k, pieces, 3]."""
    pieces = zip(released, shift, strict=True)
    return torch.stack([read(r, s, mechanism) for r, s in pieces], 1)


def joined(steps: Sequence[Tensor]) -> Readings:
    """Readings of k canaries from those of each step, each [k, pieces, 3]."""
    values = torch.stack(list(steps), 1).numpy()
    return Readings(values[..., 0], values[..., 1], values[..., 2])


def log_ratios(readings: Readings, *, rate: float, replaced: bool, mechanism: str) -> Floats:
    """The attacker's statistic for each canary, [n]: large where it seems to be there.

    Args:
        readings: of all steps.
        rate: probability that a unit takes part in a step; one coin for all pieces.
        replaced: whether the other world has the canary's opposite, or zero.
        mechanism: "gaussian" or "laplace".
    """
    with np.errstate(invalid="ignore"):
        seen = np.array([_mean(readings.noise[..., p]) for p in range(readings.noise.shape[-1])])
    # Mean magnitudes are as the scale; variances as its square, and so are the ratios.
    scale = np.where(np.isnan(seen), 1.0, np.clip(seen, _LEAST_NOISE, 1.0))
    there = _mixed((readings.there / scale).sum(-1), rate)
    if not replaced:
        return there.sum(-1)
    return (there - _mixed((readings.opposite / scale).sum(-1), rate)).sum(-1)


def _mean(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _mixed(ratio: Floats, rate: float) -> Floats:
    """log(1 - q + q e^ratio)."""
    if rate == 1:
        return ratio
    return np.logaddexp(np.log1p(-rate), np.log(rate) + ratio)
