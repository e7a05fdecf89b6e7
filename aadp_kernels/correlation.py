"""Noise of earlier steps, drawn again: correlated noise without a memory.

A model adds up the releases of all steps, so later noise had better take back a part of earlier
noise. Others keep that noise, up to a model of memory for every step. Ours is a function of its
address: a kernel draws it again where it is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aadp_kernels import _validate
from aadp_kernels.contract import DrawnAgain
from aadp_kernels.noise_key import NoiseKey

_MOST_BANDS = 64


@dataclass(frozen=True)
class Correlation:
    """Release t gets the noise `scale * (z_t + d_1 z_{t-1} + ... + d_{p-1} z_{t-p+1})`.

    What it costs in privacy is that of the whole run, not of its steps: see
    `aadp_kernels.factorization`. A step that is not charged so is not private by this noise.

    Args:
        coefficients: d_0 = 1, d_1, ..., d_{p-1}, finite, public.
        earlier: (key, step) of the release before this one, of the one before that, and so on: at
            most p - 1, fewer at the beginning of a run. None: the key of this release, at the steps
            before its own, down to step 0.

    Raises:
        ValueError: Coefficients that do not begin with 1 or are not finite, or too many of them;
            more earlier releases than coefficients; what is no key or no step.

    Guarantees:
        Nothing is stored and no noise of an earlier step is claimed again: `ReusedNoiseError`
        watches the noise of the release itself.
    """

    coefficients: tuple[float, ...]
    earlier: tuple[tuple[NoiseKey, int], ...] | None = None

    def __post_init__(self) -> None:
        values = tuple(float(d) for d in self.coefficients)
        object.__setattr__(self, "coefficients", values)
        if not values or values[0] != 1 or not all(math.isfinite(d) for d in values):
            raise ValueError(f"coefficients must be finite and begin with 1, got {values}")
        if len(values) > _MOST_BANDS:
            raise ValueError(f"coefficients must be at most {_MOST_BANDS}, got {len(values)}")
        if self.earlier is None:
            return
        object.__setattr__(self, "earlier", tuple(self.earlier))
        if len(self.earlier) >= len(values):
            raise ValueError(
                f"earlier must be at most {len(values) - 1} releases for {len(values)} "
                f"coefficients, got {len(self.earlier)}"
            )
        for key, step in self.earlier:
            if not isinstance(key, NoiseKey):
                raise ValueError(f"earlier must hold NoiseKeys, got {type(key).__name__}")
            _validate.integer_below("earlier step", step, 1 << 32)


def drawn_again(
    correlation: Correlation | None,
    key: NoiseKey,
    step: int | Tensor,
    mechanism: str,
    form: str,
) -> tuple[DrawnAgain, ...]:
    """What a release draws again; () without correlation.

    Raises:
        ValueError: Laplace noise or the grid form, for which nothing is proven; an earlier key of
            another generator; an earlier release that is this one.
    """
    if correlation is None:
        return ()
    if mechanism != "gaussian":
        raise ValueError(
            f"correlation must be None with {mechanism} noise: only Gaussian has a proof"
        )
    if form == "grid":
        raise ValueError("correlation must be None with form='grid': its multiples lie on no grid")
    later = correlation.coefficients[1:]
    if correlation.earlier is None:
        return tuple(_before(key, step, j, d) for j, d in enumerate(later, 1) if _exists(step, j))
    terms = []
    for d, (other, at) in zip(later, correlation.earlier, strict=False):
        if other.rng != key.rng:
            raise ValueError(f"earlier must hold keys of {key.rng}, got one of {other.rng}")
        if other == key and not isinstance(step, Tensor) and at == step:
            raise ValueError(f"earlier must not hold this release itself (step {step})")
        terms.append(DrawnAgain(d, other.words, at))
    return tuple(terms)


def _exists(step: int | Tensor, back: int) -> bool:
    """Whether there is a step so far back; one on an accelerator is not read."""
    return isinstance(step, Tensor) or step >= back


def _before(key: NoiseKey, step: Any, back: int, coefficient: float) -> DrawnAgain:
    """The release `back` steps before, with coefficient 0 where there is none."""
    if not isinstance(step, Tensor):
        return DrawnAgain(coefficient, key.words, step - back)
    factor = torch.where(step >= back, coefficient, 0.0).to(torch.float64)
    return DrawnAgain(factor, key.words, (step - back).clamp(min=0))
