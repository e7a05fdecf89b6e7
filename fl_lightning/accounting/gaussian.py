"""Epsilon of Gaussians without sampling, in closed form, by Python and numpy alone.

A machine with a GPU may have no scipy, and to load it takes longer than to verify a ledger.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

# Below, the square of what a Gaussian moves by is no number any more.
_LEAST = 1e-150
_FAR = 20.0
Floats = npt.NDArray[np.float64]


def gaussian_epsilon(multipliers: Floats, delta: Floats) -> Floats:
    """Epsilon of one Gaussian of each noise multiplier at each delta, [n].

    In closed form (Balle and Wang 2018, arXiv 1805.06530, eq. 6), never rounded down; inf where
    there is next to no noise, or a delta is not above 0.
    """
    pairs, back = np.unique(np.stack([multipliers, delta], 1), axis=0, return_inverse=True)
    if len(pairs) < len(multipliers):  # most clients are like others
        return gaussian_epsilon(*pairs.T)[back.ravel()]
    found = np.full(len(multipliers), np.inf)
    usable = (multipliers > _LEAST) & (delta > 0)
    move, wanted = 1 / multipliers[usable], delta[usable]
    low, high = np.zeros(len(move)), np.ones(len(move))
    while (short := _gaussian_delta(high, move) > wanted).any():
        high = np.where(short, 2 * high, high)
    # Until the two ends are neighbours, or nearly so.
    for _ in range(64):
        middle = (low + high) / 2
        if not ((low < middle) & (middle < high)).any():
            break
        above = _gaussian_delta(middle, move) > wanted
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    found[usable] = np.where(_gaussian_delta(np.zeros(len(move)), move) <= wanted, 0.0, high)
    return found


def _gaussian_delta(epsilon: Floats, move: Floats) -> Floats:
    """Delta of a Gaussian that moves by `move` standard deviations.

    Φ(t) - exp(ε)·Φ(t - move) with t = move/2 - ε/move. The second term is written so that ε and the
    logarithm of Φ, two large numbers of opposite sign, have been cancelled: ε = move·(move/2 - t).
    """
    with np.errstate(over="ignore"):  # far from the delta that is looked for
        t = move / 2 - epsilon / move
        second = np.exp(-t * t / 2) * scaled_erfc((move - t) / math.sqrt(2))
        return (_erfc(-t / math.sqrt(2)) - second) / 2


def scaled_erfc(x: Floats) -> Floats:
    """exp(x²)·erfc(x) of numbers that are not negative; relative errors below 1e-14.

    From `_FAR` on by its asymptotic series, of which no later term reaches 1e-16 there.
    """
    near = np.minimum(x, _FAR)
    # x² of a few bits is exact; its rounding would grow with it.
    few = near.astype(np.float32).astype(np.float64)
    product = np.exp(few * few) * np.exp((near - few) * (near + few)) * _erfc(near)
    if (x < _FAR).all():
        return product
    far, term = np.maximum(x, _FAR), np.ones(x.shape)
    series = term
    for k in range(1, 9):
        term = term * -(2 * k - 1) / (2 * far) / far
        series = series + term
    return np.where(x < _FAR, product, series / (far * math.sqrt(math.pi)))


def _erfc(x: Floats) -> Floats:
    return np.asarray(np.frompyfunc(math.erfc, 1, 1)(x), dtype=np.float64)
