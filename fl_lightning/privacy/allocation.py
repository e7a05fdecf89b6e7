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
    ``snr``               (C·d/s)²               C·d/s
    ====================  =====================  =========================

    ``mse`` minimises the noise energy Σ d·σ² (Σ d·b²) under the budget; ``contribution`` the same
    with each layer weighted by s/C². Both follow from one Lagrange multiplier: minimise
    Σ w·d·C²/π for Gaussian, Σ w·d·C²/π² for Laplace, subject to Σ π = 1. ``snr`` gives every layer
    the same ratio of signal to noise, n²/(d·σ²), n = s/√d being its L2 norm up to a common factor
    (that of a vector of independent, centred numbers with the L1 norm s). It is the only rule that
    gives *more* of the budget to a layer that shows *less*, down to `MIN_CONTRIBUTION`.

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
        "snr": clip_norm * dims / contribution,
    }
    if rule not in weighted:
        raise ValueError(f"allocation={rule!r} is not one of {sorted(weighted)}")
    size = weighted[rule]
    if rule in ("mse", "contribution"):
        size = size.sqrt() if mechanism == "gaussian" else size.pow(1 / 3)
    elif rule == "snr" and mechanism == "gaussian":
        size = size.square()
    return (1 - floor) * normalized(size) + floor / size.shape[-1]


def division_ratio(l1_norm: Tensor, dims: Tensor) -> Tensor:
    """Least noise energy of any division of the budget over layers, over that of flat clipping.

    With one Gaussian of multiplier z, a typical gradient whose layers have L2 norms n_l and numbers
    of parameters d_l costs z²·(Σ n_l·√d_l)² at best and z²·(Σ n_l²)·(Σ d_l) with one clip norm for
    all. The ratio is 1 where the norm per coordinate is the same in all layers: then nothing is to
    be gained by dividing.

    Args:
        l1_norm: L1 norms N_l from releases, [..., L]; n_l is taken as N_l/√d_l, up to a factor that
            the ratio does not have.
        dims: d_l [L].

    Returns:
        R in (0, 1], [...]; NaN where all norms are zero.
    """
    flat = (l1_norm.square() / dims).sum(-1) * dims.sum()
    return l1_norm.sum(-1).square() / flat
