"""Weights of clients in a noised sum, and what they make of each client's privacy.

One noise protects everybody in the sum, so what is personal is how far a client can move it: client
k contributes w_k times an update of norm at most C, hence its sensitivity is w_k·C. Votes on norms
are not weighted.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def sum_weights(
    base: npt.ArrayLike, multiplier: npt.ArrayLike, *, mechanism: str, vote_share: float
) -> tuple[float, Floats]:
    """The noise multiplier of the sum, and weights that keep every client within its own.

    Args:
        base: weights asked for, [k], positive. Public.
        multiplier: noise multiplier z_k (λ_k) that each client's ε needs, [k], >= 0.
        mechanism: "gaussian" or "laplace".
        vote_share: part ρ of the budget that votes cost, 0 without votes.

    Returns:
        (z, w): the multiplier for a client of weight 1, the least of all; and weights in (0, 1],
        proportional to `base` as far as z_k allows.

    Raises:
        ValueError: the votes alone, which have no weights, cost some client more than it has.

    Guarantees:
        `event_multiplier(w_k, z) >= z_k` for every client.
    """
    z, largest = float(np.min(multiplier)), float(np.max(base))
    return z, weights_within(
        base, multiplier, z=z, largest=largest, mechanism=mechanism, vote_share=vote_share
    )


def weights_within(
    base: npt.ArrayLike,
    multiplier: npt.ArrayLike,
    *,
    z: float,
    largest: float,
    mechanism: str,
    vote_share: float,
) -> Floats:
    """Weights [k] in a sum whose noise multiplier and largest weight asked for are known.

    Args:
        base, multiplier, mechanism, vote_share: as in `sum_weights`.
        z: noise multiplier for a client of weight 1, at most each of `multiplier`.
        largest: the largest of `base` in the sum.

    Raises:
        ValueError: as `sum_weights`.
    """
    asked = np.asarray(base, dtype=np.float64) / largest
    if z == 0:
        return asked
    # Gaussian: 1/z_k² = (w²(1-ρ) + ρ)/z²; Laplace: 1/λ_k = (w(1-ρ) + ρ)/λ.
    ratio = z / np.asarray(multiplier, dtype=np.float64)
    room = (np.square(ratio) if mechanism == "gaussian" else ratio) - vote_share
    if not (room > 0).all():
        strictest = float(np.max(multiplier))
        raise ValueError(
            f"vote_share={vote_share}: the votes of a client weigh the same whatever its ε, and "
            f"would cost the strictest client (noise multiplier {strictest:.3g}, the "
            f"loosest {z:.3g}) more than it has; lower vote_share, use thresholds 'released' or "
            "'fixed', or bring the clients' ε closer together"
        )
    most = room / (1 - vote_share)
    most = np.sqrt(most) if mechanism == "gaussian" else most
    # Down by more than the rounding of the formulas, so that no client passes its ε.
    most = np.where(ratio < 1, most * (1 - 1e-12), 1.0)
    return np.minimum(asked, most)


def event_multiplier(
    weight: npt.ArrayLike, z: float, *, mechanism: str, vote_share: float
) -> Floats:
    """Total noise multiplier of clients with the given weights: float64, the shape of `weight`.

    Args:
        weight: w in (0, 1].
        z: multiplier for weight 1, >= 0.
        mechanism: "gaussian" or "laplace".
        vote_share: ρ, 0 without votes.
    """
    w = np.asarray(weight, dtype=np.float64)
    if mechanism == "gaussian":
        return z / np.sqrt(np.square(w) * (1 - vote_share) + vote_share)
    return z / (w * (1 - vote_share) + vote_share)
