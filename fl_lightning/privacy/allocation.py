"""Division of the privacy budget over the layers: π_l > 0 with Σ π_l = 1."""

from __future__ import annotations

import torch
from torch import Tensor

from fl_lightning.privacy.thresholds import normalized


def layer_shares(
    rule: str,
    *,
    contribution: Tensor,
    clip_norm: Tensor,
    dims: Tensor,
    mechanism: str,
    floor: float,
) -> Tensor:
    """Share of the budget of each layer, [..., L]: of 1/z² for Gaussian, of ε for Laplace.

    ====================  =====================  =========================
    rule                  Gaussian, π ∝          Laplace, π ∝
    ====================  =====================  =========================
    ``uniform``           1                      1
    ``abstract``          s                      s
    ``mse``               C·√d                   (d·C²)^(1/3)
    ``contribution``      √(s·d)                 (s·d)^(1/3)
    ====================  =====================  =========================

    ``mse`` minimises the noise energy Σ d·σ² (Σ d·b²) under the budget; ``contribution`` the same
    with each layer weighted by s/C². Both follow from one Lagrange multiplier: minimise
    Σ w·d·C²/π for Gaussian, Σ w·d·C²/π² for Laplace, subject to Σ π = 1.

    Args:
        rule: one of the table.
        contribution: s_l [..., L], from releases.
        clip_norm: C_l [..., L].
        dims: d_l [L].
        mechanism: "gaussian" or "laplace".
        floor: part α of the budget divided evenly, so that no layer's noise is infinite.

    Returns:
        (1 − α)·π + α/L, same shape as `contribution`.
    """
    weighted = {
        "uniform": torch.ones_like(contribution),
        "abstract": contribution,
        "mse": dims * clip_norm.square(),
        "contribution": dims * contribution,
    }
    if rule not in weighted:
        raise ValueError(f"allocation={rule!r} is not one of {sorted(weighted)}")
    size = weighted[rule]
    if rule in ("mse", "contribution"):
        size = size.sqrt() if mechanism == "gaussian" else size.pow(1 / 3)
    return (1 - floor) * normalized(size) + floor / size.shape[-1]
