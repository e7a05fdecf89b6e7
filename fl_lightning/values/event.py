"""One noised step as an accountant sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import dp_accounting

MECHANISMS = ("gaussian", "laplace")
ADJACENCIES = ("zero_out", "replace_one")


@dataclass(frozen=True)
class NoiseEvent:
    """One noised step of one client as the accountant sees it. Public.

    Args:
        mechanism: "gaussian" or "laplace".
        noise_multiplier: noise scale / sensitivity of the whole joint release (standard deviation
            over L2 sensitivity, or b over L1 sensitivity), votes included. 0 means no noise.
        sampling_rate: Poisson rate q of the units, 0 < q <= 1; 1 is "every unit, no coins".
        adjacency: "zero_out" or "replace_one". A sampled Gaussian under replace_one is analysed as
            such, by the pair of mixtures that the two units give; a sampled Laplace is not.

    Raises:
        ValueError: a value outside its range, or a sampled Laplace under `replace_one`.
    """

    mechanism: str
    noise_multiplier: float
    sampling_rate: float = 1.0
    adjacency: str = "zero_out"

    def __post_init__(self) -> None:
        if self.mechanism not in MECHANISMS:
            raise ValueError(f"mechanism must be one of {MECHANISMS}, got {self.mechanism!r}")
        if self.adjacency not in ADJACENCIES:
            raise ValueError(f"adjacency must be one of {ADJACENCIES}, got {self.adjacency!r}")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError(
                f"noise_multiplier must be finite and >= 0, got {self.noise_multiplier}"
            )
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate must be in (0, 1], got {self.sampling_rate}")
        if self.sampled_replacement and self.mechanism == "laplace":
            raise ValueError(
                f"adjacency 'replace_one' with mechanism 'laplace' and sampling_rate "
                f"{self.sampling_rate} < 1 has no proven analysis here; use sampling_rate 1, "
                "adjacency 'zero_out' or mechanism 'gaussian'"
            )

    @property
    def sampled_replacement(self) -> bool:
        """Whether two units are exchanged that secret coins may both leave out."""
        return self.adjacency == "replace_one" and self.sampling_rate < 1

    def dp_event(self) -> dp_accounting.DpEvent:
        """The event in dp-accounting's vocabulary (`NonPrivateDpEvent` without noise).

        For its relation REPLACE_SPECIAL; a sampled Gaussian under `replace_one` is for REPLACE_ONE,
        whose multiplier is relative to one unit, not to the difference of two.
        """
        import dp_accounting as dpa

        if self.noise_multiplier == 0:
            return dpa.NonPrivateDpEvent()
        scale = self.noise_multiplier * (2 if self.sampled_replacement else 1)
        inner = (
            dpa.GaussianDpEvent(scale)
            if self.mechanism == "gaussian"
            else dpa.LaplaceDpEvent(scale)
        )
        return (
            inner
            if self.sampling_rate == 1
            else dpa.PoissonSampledDpEvent(self.sampling_rate, inner)
        )

    def pure_epsilon(self) -> float:
        """The step's epsilon at delta 0: log(1 + q (exp(1/lambda) - 1)); inf for a Gaussian."""
        if self.mechanism == "gaussian" or self.noise_multiplier == 0:
            return math.inf
        if self.sampling_rate == 1:
            return 1 / self.noise_multiplier
        return _log_mix(self.sampling_rate, 1 / self.noise_multiplier)


def _log_mix(rate: float, loss: float) -> float:
    """log(1 - rate + rate * exp(loss)) without overflow."""
    if loss < 30:
        return math.log1p(rate * math.expm1(loss))
    return loss + math.log(rate + (1 - rate) * math.exp(-loss))
