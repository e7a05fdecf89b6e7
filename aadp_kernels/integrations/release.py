"""What a release must be charged for, and the composition of pure epsilons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aadp_kernels import _validate
from aadp_kernels.grid_law import inexactness
from aadp_kernels.layout import Layout
from aadp_kernels.scales import noise_scales

UNITS = ("record", "client")
_ORDERS = tuple(1 + x / 10 for x in range(1, 100)) + tuple(2.0**x for x in range(4, 17))


@dataclass(frozen=True)
class Release:
    """One noisy release, as an accountant has to see it. All of it is public.

    Attributes:
        mechanism: "gaussian" or "laplace".
        noise_multiplier: Of all layers together: gaussian sum_l (S_l / stddev_l)^2 = 1 / z^2,
            laplace sum_l S_l / b_l = 1 / lambda, with S_l the sensitivity under `adjacency`.
        unit: What is protected, "record" or "client".
        adjacency: "zero_out" or "replace_one".
        seen_by: Who may see the release but learns nothing else: "public" (the noise was added
            after a trusted sum) or "server" (every client added its own).
        poisson_rate: Rate at which units were sampled with secret independent coins, 1 for all.
            Shuffled or fixed-size batches are not Poisson: their rate is 1 here.
        arithmetic: "real" (proven for real numbers; floating point leaks in its low bits) or
            "grid" (proven for the numbers that were written).
        epsilon_inflation: What the grid form adds to epsilon, see `grid_law.inexactness`.
        tail_delta: What its cut tails add to delta (see there).
        planned_steps: None: every step is a release of its own. Else this one release is a whole
            run of at most so many steps: it is charged once, and nothing is added for a step.
    """

    mechanism: str
    noise_multiplier: float
    unit: str
    adjacency: str
    seen_by: str = "public"
    poisson_rate: float = 1.0
    arithmetic: str = "real"
    epsilon_inflation: float = 0.0
    tail_delta: float = 0.0
    planned_steps: int | None = None

    def __post_init__(self) -> None:
        _validate.one_of("unit", self.unit, UNITS)
        _validate.one_of("seen_by", self.seen_by, ("public", "server"))
        if not 0 < self.poisson_rate <= 1:
            raise ValueError(f"poisson_rate must be in (0, 1], got {self.poisson_rate}")

    def __str__(self) -> str:
        sampled = f", Poisson rate {self.poisson_rate:g}" if self.poisson_rate < 1 else ""
        whole = f", once for all {self.planned_steps} steps" if self.planned_steps else ""
        return (
            f"{self.mechanism}, noise multiplier {self.noise_multiplier:g}, unit {self.unit}, "
            f"adjacency {self.adjacency}, seen by {self.seen_by}{sampled}, "
            f"{self.arithmetic} arithmetic{whole}"
        )

    @property
    def pure_epsilon(self) -> float:
        """Epsilon with delta 0 of this release alone, amplified by its sampling; inf if gaussian.

        ln(1 + q (exp(1 / lambda) - 1)) for Poisson rate q. Amplification needs zero_out adjacency.
        """
        if self.mechanism != "laplace" or self.noise_multiplier == 0:
            return math.inf
        rate = self.poisson_rate if self.adjacency == "zero_out" else 1.0
        return amplified(1 / self.noise_multiplier + self.epsilon_inflation, rate)


def amplified(epsilon: float, poisson_rate: float) -> float:
    """Pure epsilon after Poisson sampling, `ln(1 + q (exp(epsilon) - 1))`, without overflow."""
    if epsilon > 50:
        return epsilon + math.log(poisson_rate + math.exp(-epsilon) * (1 - poisson_rate))
    return math.log1p(poisson_rate * math.expm1(epsilon))


def compose_pure(epsilons: Sequence[tuple[float, int]], delta: float) -> float:
    """Epsilon at `delta` of releases that are each epsilon_i-DP with delta 0.

    Args:
        epsilons: Pairs (epsilon_i, number of such releases).
        delta: In [0, 1). 0 gives the plain sum.

    Returns:
        The smaller of the sum and the Renyi bound of randomised response.

    Raises:
        ValueError: A delta outside [0, 1), a negative epsilon or number.

    Guarantees:
        An upper bound, also if each release was chosen from those before it. Every epsilon-DP
        mechanism is randomised response followed by a function of its answer, so its Renyi
        divergence is at most that of randomised response.

    Edge cases:
        No releases: 0. An infinite epsilon: inf.

    Reference:
        Kairouz, Oh, Viswanath 2015, arXiv:1311.0776 (randomised response is the worst case);
        Mironov 2017, arXiv:1702.07476 (composition); Canonne, Kamath, Steinke 2020,
        arXiv:2004.00010, proposition 12 (conversion).
    """
    if not 0 <= delta < 1:
        raise ValueError(f"delta must be in [0, 1), got {delta}")
    for epsilon, count in epsilons:
        if not (epsilon >= 0 and count >= 0):
            raise ValueError(f"epsilons must be pairs >= 0, got {(epsilon, count)}")
    best = math.fsum(epsilon * count for epsilon, count in epsilons)
    if delta == 0 or not math.isfinite(best):
        return best
    for order in _ORDERS:
        total = math.fsum(count * _response_rdp(epsilon, order) for epsilon, count in epsilons)
        slack = math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
        best = min(best, max(0.0, total + slack))
    return best


def _response_rdp(epsilon: float, order: float) -> float:
    """Renyi divergence of randomised response, p = e^epsilon / (1 + e^epsilon) against 1 - p."""
    yes, no = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    high, low = order * yes + (1 - order) * no, order * no + (1 - order) * yes
    return (high + math.log1p(math.exp(low - high))) / (order - 1)


def form_of_release(form: str, mechanism: str, layout: Layout) -> dict[str, Any]:
    """The fields of a Release that follow from the form of its noise."""
    if form != "grid":
        return {"arithmetic": "real"}
    inflation, tail = inexactness(mechanism, sum(layout.sizes))
    return {"arithmetic": "grid", "epsilon_inflation": inflation, "tail_delta": tail}


def layer_clips(clip_norm: float | Sequence[float] | Tensor, layout: Layout, p: int) -> Tensor:
    """Clip norms float64 [L]: one number is the total, C / sqrt(L) (p = 2) or C / L (p = 1) each.

    Raises:
        ValueError: Not one number or one for each layer, or not positive and finite.
    """
    clips = torch.as_tensor(clip_norm, dtype=torch.float64).detach().cpu()
    if clips.dim() == 0:
        parts = layout.num_layers if p == 1 else math.sqrt(layout.num_layers)
        clips = (clips / parts).expand(layout.num_layers)
    if tuple(clips.shape) != (layout.num_layers,):
        raise ValueError(
            f"clip_norm must be a number or {layout.num_layers} of them "
            f"({', '.join(layout.layer_names)}), got shape {tuple(clips.shape)}"
        )
    if not bool(((clips > 0) & torch.isfinite(clips)).all()):
        raise ValueError(f"clip_norm must be positive and finite, got {clips.tolist()}")
    return clips.contiguous()


def equal_scales(
    clips: Tensor, *, mechanism: str, noise_multiplier: float, adjacency: str
) -> Tensor:
    """One noise scale for all layers [L]: z * norm2(S) (gaussian) or lambda * norm1(S)."""
    shares = clips.square() if mechanism == "gaussian" else clips
    return noise_scales(
        clips, shares / shares.sum(), mechanism=mechanism, noise_multiplier=noise_multiplier,
        adjacency=adjacency,
    )  # fmt: skip
