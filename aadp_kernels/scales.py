"""From clip norms and layer shares to noise scales."""

from __future__ import annotations

import torch
from torch import Tensor

from aadp_kernels import _validate, _validate_tensors
from aadp_kernels.sampler_limits import MECHANISMS
from aadp_kernels.votes import ADJACENCIES


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
    _validate_tensors.nonnegative_tensor("clip", clip, finite=False)
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
    _validate_tensors.nonnegative_tensor("noise_multiplier", multiplier, finite=True)
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
