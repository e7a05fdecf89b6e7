"""Contribution of each layer: its part of the L1 norm of all layers, from releases only."""

from __future__ import annotations

from torch import Tensor

from fl_lightning.privacy.thresholds import normalized

MIN_CONTRIBUTION = 1e-6


def contribution(l1_norm: Tensor) -> Tensor:
    """s_l = N_l/Σ N_j, [..., L], held above a public minimum and summing to 1.

    Args:
        l1_norm: L1 norms N_l ≥ 0 estimated from releases, [..., L]. All zero: even.
    """
    return normalized(normalized(l1_norm).clamp(min=MIN_CONTRIBUTION))
