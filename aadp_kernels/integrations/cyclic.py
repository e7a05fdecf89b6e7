"""Minibatches in a fixed cyclic order, and correlated noise for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aadp_kernels import _validate
from aadp_kernels.correlation import Correlation
from aadp_kernels.factorization import best_coefficients, last_of_sgd, separated_sensitivity
from aadp_kernels.noise_key import NoiseKey


@dataclass(frozen=True)
class CyclicSteps:
    """The promise that correlated noise asks of a loop, and its coefficients. All of it is public.

    Args:
        period: Between two batches that hold a record there are at least `period` steps; with
            `CyclicBatches` that is the number of batches. Fixed beforehand, without a look at data.
        steps: Planned steps of the run. What a record is charged for ends there, so no step may
            follow.
        coefficients: d_0 = 1, d_1, ... of the noise, see `Correlation` and `best`.

    Raises:
        ValueError: A number below 1; coefficients whose inverse is not positive and falling (of
            which nothing is proven here).
    """

    period: int
    steps: int
    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("period", "steps"):
            if _validate.integer_below(name, getattr(self, name), 1 << 32) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        object.__setattr__(self, "coefficients", Correlation(self.coefficients).coefficients)
        largest = separated_sensitivity(self.coefficients, self.steps, self.period)
        object.__setattr__(self, "_sensitivity", largest)

    @classmethod
    def best(
        cls,
        *,
        period: int,
        steps: int,
        bands: int = 2,
        momentum: float = 0.0,
        nesterov: bool = False,
        learning_rates: Sequence[float] | None = None,
    ) -> CyclicSteps:
        """The coefficients that leave least noise in the last model.

        With a period of 1, every record in every step, independent noise is best.

        Args:
            period: See the class.
            steps: See the class.
            bands: p >= 1: noise of how many steps is in a release. 2 takes nearly all there is.
            momentum: Of the SGD that uses the releases.
            nesterov: Of the SGD that uses the releases.
            learning_rates: Of each step [steps], up to a factor; None: all equal.
        """
        rates = [1.0] * steps if learning_rates is None else learning_rates
        if len(rates) != steps:
            raise ValueError(f"learning_rates must be {steps} numbers, got {len(rates)}")
        last = last_of_sgd(rates, momentum=momentum, nesterov=nesterov)
        found = best_coefficients(bands, last, lambda d: separated_sensitivity(d, steps, period))
        return cls(period, steps, found)

    @property
    def sensitivity(self) -> float:
        """L2 distance of the whole run between neighbours, in units of one step's clip norm."""
        return self._sensitivity  # pyright: ignore[reportAttributeAccessIssue]

    def multiplier(self, noise_multiplier: float) -> float:
        """Noise multiplier of the whole run as one Gaussian mechanism."""
        return noise_multiplier / self.sensitivity

    def correlation(self, key: NoiseKey, step: int, first_step: int) -> Correlation:
        """The noise of a step of a run that began at `first_step`: none from before it."""
        back = min(len(self.coefficients) - 1, step - first_step)
        return Correlation(self.coefficients, tuple((key, step - j) for j in range(1, back + 1)))

    def facts(self) -> dict[str, Any]:
        """For a state: what must not change within a run."""
        return {
            "period": self.period, "steps": self.steps, "coefficients": list(self.coefficients)
        }  # fmt: skip


class CyclicBatches:
    """Batches of record indices in a fixed order: every record comes back after `period` steps.

    Args:
        n: Number of records, public.
        period: Number of batches that the records are dealt out into, <= n.
        steps: Batches of one pass over this object.
        seed: Of the public permutation by which the records are dealt out.
        first_step: Batch to begin with: where a run goes on.

    Guarantees:
        Batch t is the records of part t % period, whatever was drawn before. Parts differ by at
        most one record.

    Raises:
        ValueError: A period that is not in [1, n].
    """

    def __init__(
        self, n: int, *, period: int, steps: int, seed: int = 0, first_step: int = 0
    ) -> None:
        if not 1 <= period <= n:
            raise ValueError(f"period must be in [1, {n}], got {period}")
        self.n, self.period, self.steps, self.next_step = n, period, steps, first_step
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        self._parts = [order[part::period].sort().values for part in range(period)]

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.steps):
            part, self.next_step = self.next_step % self.period, self.next_step + 1
            yield self._parts[part]
