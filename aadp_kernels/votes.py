"""One budget for clipped sums and for the votes on their norms."""

from __future__ import annotations

import math

from aadp_kernels import _validate
from aadp_kernels.sampler_limits import MECHANISMS

ADJACENCIES = ("zero_out", "replace_one")


def vote_noise(
    noise_multiplier_total: float,
    *,
    num_layers: int,
    vote_share: float,
    mechanism: str,
    adjacency: str,
) -> tuple[float, float]:
    """Divide one budget between the clipped sums and the votes of the same step.

    One unit's votes are +-1/2 in each of L layers: sqrt(L)/2 in L2 and L/2 in L1, doubled under
    replace_one.

    Args:
        noise_multiplier_total: z or lambda of the joint event, what the accountant sees; >= 0.
        num_layers: L >= 1.
        vote_share: rho in (0, 1), the votes' part of the budget.
        mechanism: "gaussian" or "laplace".
        adjacency: "zero_out" or "replace_one".

    Returns:
        (noise multiplier for the sums, absolute noise scale of each vote sum):
        gaussian (z / sqrt(1 - rho), z * sqrt(L) / (2 * sqrt(rho))),
        laplace (lambda / (1 - rho), L * lambda / (2 * rho)).

    Raises:
        ValueError: An argument out of its range.

    Edge cases:
        Total 0 gives (0, 0).

    Reference:
        Andrew, Thakkar, McMahan, Ramaswamy 2021, arXiv:1905.03871, theorem 1, for L thresholds.
    """
    _validate.one_of("mechanism", mechanism, MECHANISMS)
    _validate.one_of("adjacency", adjacency, ADJACENCIES)
    total = _validate.finite_nonnegative("noise_multiplier_total", noise_multiplier_total)
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    if not 0 < vote_share < 1:
        raise ValueError(f"vote_share must be in (0, 1), got {vote_share}")
    vote = 1.0 if adjacency == "replace_one" else 0.5
    if mechanism == "gaussian":
        sums = total / math.sqrt(1 - vote_share)
        return sums, total * vote * math.sqrt(num_layers / vote_share)
    return total / (1 - vote_share), total * vote * num_layers / vote_share
