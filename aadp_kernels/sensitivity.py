"""From clip norms and layer shares to noise scales."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aadp_kernels import _validate
from aadp_kernels.noise import MECHANISMS

ADJACENCIES = ("zero_out", "replace_one")


def sensitivity(clip: Tensor, *, adjacency: str) -> Tensor:
    """How far one unit can move a sum of clipped contributions: C, or 2C under replace_one.

    Args:
        clip: Clip norms [..., L], public, >= 0; inf means no clipping.
        adjacency: "zero_out" (the unit's contribution becomes zero) or "replace_one" (the unit is
            exchanged for another).

    Returns:
        float64 [..., L], in the norm of the clipping (L2 for gaussian, L1 for laplace).

    Raises:
        ValueError: Unknown adjacency; a clip norm that is negative or NaN.
    """
    _validate.one_of("adjacency", adjacency, ADJACENCIES)
    clip = torch.as_tensor(clip)
    _validate.nonnegative_tensor("clip", clip, finite=False)
    return clip.to(torch.float64) * (2.0 if adjacency == "replace_one" else 1.0)


def noise_scales(
    clip: Tensor,
    shares: Tensor,
    *,
    mechanism: str,
    noise_multiplier: float | Tensor,
    adjacency: str,
) -> Tensor:
    """Noise scale of every layer, such that all layers together are one mechanism.

    gaussian: stddev_l = z * S_l / sqrt(pi_l), so sum_l (S_l / stddev_l)^2 = 1 / z^2.
    laplace: b_l = lambda * S_l / pi_l, so sum_l S_l / b_l = 1 / lambda.

    Args:
        clip: Clip norms C [..., L], public.
        shares: Layer shares pi [..., L], public, > 0, summing to at most 1.
        mechanism: "gaussian" or "laplace".
        noise_multiplier: z or lambda >= 0, a number, or one for each leading index ([K] for [K,
            L]).
        adjacency: "zero_out" or "replace_one".

    Returns:
        float64 [..., L]. Rounding a scale down by a cast weakens the guarantee by as much.

    Raises:
        ValueError: An unbounded clip norm with a positive multiplier; shares that are not positive
            or sum to more than 1; a multiplier that is negative or not finite.

    Guarantees:
        Shares that pass 1 by rounding (up to 1e-5) are divided by their sum, so the noise is never
        less than the formula with exact shares asks for.

    Edge cases:
        Multiplier 0 gives zero scales, also for an infinite clip norm. Clip norm 0 gives scale 0:
        the contribution is zero as well.
    """
    _validate.one_of("mechanism", mechanism, MECHANISMS)
    sensitivities = sensitivity(clip, adjacency=adjacency)
    shares = torch.as_tensor(shares).to(device=sensitivities.device, dtype=torch.float64)
    if shares.dim() == 0 or shares.shape[-1] != sensitivities.shape[-1]:
        raise ValueError(
            f"shares must have {sensitivities.shape[-1]} layers, got shape {tuple(shares.shape)}"
        )
    multiplier = torch.as_tensor(noise_multiplier, dtype=torch.float64, device=sensitivities.device)
    _validate.nonnegative_tensor("noise_multiplier", multiplier, finite=True)
    total = shares.sum(-1, keepdim=True)
    if not bool((shares > 0).all() & (total <= 1 + 1e-5).all()):
        raise ValueError(f"shares must be positive and sum to at most 1, got {shares.tolist()}")
    multiplier = multiplier.unsqueeze(-1)
    noisy = multiplier > 0
    if bool((noisy & torch.isinf(sensitivities)).any()):
        raise ValueError("clip must be finite where noise_multiplier is positive, got inf")
    part = shares / total.clamp(min=1.0)
    part = part.sqrt() if mechanism == "gaussian" else part
    return torch.where(noisy, multiplier * sensitivities.where(noisy, 0.0) / part, 0.0)


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
