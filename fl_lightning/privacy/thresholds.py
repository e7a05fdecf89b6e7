"""Clip norms from released history: pure functions, one a rule. Shapes are [clients, layers].

Nothing here sees an unreleased quantity, so whatever these functions return costs no privacy
(post-processing).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_CHANGE = 2.0  # a released clip norm moves by at most this factor a round
CLIP_FLOOR = 0.1  # part of the total clip norm that is divided evenly
NORM_RANGE = 1e6  # public bound on how far a tracked norm may leave its first value


def initial_clip_norms(clip_norm: float | list[float], num_layers: int, p: int) -> Tensor:
    """Public first clip norm of each layer, float64 [L].

    A number is a total: C/√L each under an L2 clip, C/L each under an L1 clip, so that the norm
    of all layers together is at most the total. A list is taken as it is.
    """
    if isinstance(clip_norm, list):
        if len(clip_norm) != num_layers:
            raise ValueError(
                f"clip_norm={clip_norm} has {len(clip_norm)} numbers, the network has "
                f"{num_layers} layers"
            )
        return torch.tensor(clip_norm, dtype=torch.float64)
    total = clip_norm / (num_layers if p == 1 else math.sqrt(num_layers))
    return torch.full((num_layers,), total, dtype=torch.float64)


def clip_norm_from_l1(l1_norm: Tensor, dims: Tensor, *, p: int, factor: float) -> Tensor:
    """Clip norm that fits a layer whose L1 norm is `l1_norm` [..., L].

    The L1 norm itself for an L1 clip; κ·√(π/2)·M/√d for an L2 clip, the L2 norm of a Gaussian
    vector with that L1 norm. A matter of utility only: any value is private.
    """
    if p == 1:
        return l1_norm.clone()
    return factor * math.sqrt(math.pi / 2) * l1_norm / dims.sqrt()


def l1_from_clip_norm(clip_norm: Tensor, dims: Tensor, *, p: int, factor: float) -> Tensor:
    """Inverse of `clip_norm_from_l1`: the first tracked norm that a public clip norm stands for."""
    if p == 1:
        return clip_norm.clone()
    return clip_norm * dims.sqrt() / (factor * math.sqrt(math.pi / 2))


def quantile_step(
    tracked_norm: Tensor,
    released_votes: Tensor,
    expected_batch: Tensor,
    *,
    quantile: float,
    lr: float,
    initial: Tensor,
) -> Tensor:
    """One step of the geometric quantile rule on noisy votes.

    M ← M·exp(−η·(b̃ − γ)), b̃ = votes/B + ½ held in [0, 1], and M held within a public range
    around its first value.

    Args:
        tracked_norm: tracked norms M [k, L], released.
        released_votes: Σ (1[‖g_l‖₁ ≤ M_l] − ½) plus noise, [k, L].
        expected_batch: public expected batch B [k].
        quantile: target fraction γ.
        lr: step size η.
        initial: first norms [L] or [k, L].

    Reference: Andrew, Thakkar, McMahan, Ramaswamy 2021, arXiv 1905.03871, equation (1), on the L1
        norm of each layer.
    """
    below = (released_votes / expected_batch[:, None] + 0.5).clamp(0.0, 1.0)
    moved = tracked_norm * torch.exp(-lr * (below - quantile))
    return torch.minimum(torch.maximum(moved, initial / NORM_RANGE), initial * NORM_RANGE)


def estimate_l1_norm(mean_abs: Tensor, noise_scale: Tensor, dims: Tensor, mechanism: str) -> Tensor:
    """L1 norm of a layer before noise, estimated from its release.

    The mean magnitude m of released coordinates is inverted under the assumption that the layer
    has the shape of the noise: for Gaussian σ, N = d·√max(m² − 2σ²/π, 0); for Laplace b, with
    v = max(m − b, 0), N = d·(v + √(v·(m + 3b)))/2. Biased for sparse layers.

    Args:
        mean_abs: ‖ũ_l‖₁/d_l of each release, [..., L].
        noise_scale: standard deviation or b of that release, [..., L].
        dims: d_l, [L].
        mechanism: "gaussian" or "laplace".
    """
    if mechanism == "gaussian":
        squared = mean_abs.square() - 2 * noise_scale.square() / math.pi
        return dims * squared.clamp(min=0).sqrt()
    excess = (mean_abs - noise_scale).clamp(min=0)
    return dims * (excess + (excess * (mean_abs + 3 * noise_scale)).sqrt()) / 2


def released_clip_norms(
    l1_norm: Tensor, dims: Tensor, *, p: int, total: Tensor, previous: Tensor
) -> Tensor:
    """Clip norms in the proportions of estimated norms, with a public total.

    L1 clip: C_l ∝ N_l with Σ C_l = C. L2 clip: C_l² ∝ N_l²/d_l with Σ C_l² = C². A tenth is
    divided evenly, so no layer is clipped to nothing; all zeros give the even split; and no clip
    norm moves by more than a factor 2 a round.

    Args:
        l1_norm: estimated norms [k, L], from releases.
        dims: d_l [L].
        p: order of the clipped norm.
        total: public total clip norm C, a scalar.
        previous: clip norms of the client's last round [k, L].
    """
    size = l1_norm if p == 1 else l1_norm.square() / dims
    shape = (1 - CLIP_FLOOR) * normalized(size) + CLIP_FLOOR / size.shape[-1]
    clip_norm = total * (shape if p == 1 else shape.sqrt())
    return torch.minimum(torch.maximum(clip_norm, previous / MAX_CHANGE), previous * MAX_CHANGE)


def normalized(size: Tensor) -> Tensor:
    """`size` [..., L] divided by its sum over the layers; even where the sum is zero."""
    total = size.sum(-1, keepdim=True)
    even = torch.full_like(size, 1.0 / size.shape[-1])
    return torch.where(total > 0, size / torch.where(total > 0, total, 1.0), even)
