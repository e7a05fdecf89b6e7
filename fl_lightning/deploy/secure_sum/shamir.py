"""Shamir's secret sharing over a prime field: any `threshold` shares are the secret, fewer nothing.

The arithmetic is that of Python's integers, whose time depends on their values: shares are made and
put together where nobody measures single operations.

Reference:
    Shamir 1979, "How to share a secret".
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence

# The smallest prime above 2^256, so that every 32 bytes are a number of the field.
PRIME = 2**256 + 297
SHARE_BYTES = 33


def split(
    secret: int,
    threshold: int,
    points: Sequence[int],
    *,
    prime: int = PRIME,
    draw: Callable[[int], int] = secrets.randbelow,
) -> dict[int, int]:
    """One share for each point.

    Args:
        secret: in [0, prime).
        threshold: shares that are enough, from 1 to the number of points.
        points: distinct, in [1, prime).
        prime: of the field.
        draw: n → uniform whole number below n; secret.

    Returns:
        point → share in [0, prime).

    Raises:
        ValueError: an argument out of range.

    Guarantees:
        Any threshold - 1 shares are uniform and independent of the secret.
    """
    if not 0 <= secret < prime:
        raise ValueError("secret must be a number of the field")
    if len(set(points)) < len(points) or not all(1 <= x < prime for x in points):
        raise ValueError(f"points={list(points)} must be distinct and from 1 below the prime")
    if not 1 <= threshold <= len(points):
        raise ValueError(f"threshold={threshold} must be from 1 to {len(points)}")
    coefficients = [secret, *(draw(prime) for _ in range(threshold - 1))]
    return {x: _value(coefficients, x, prime) for x in points}


def _value(coefficients: Sequence[int], x: int, prime: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % prime
    return value


def weights_at_zero(points: Iterable[int], *, prime: int = PRIME) -> dict[int, int]:
    """Lagrange's coefficients: the secret is the sum of weight · share over the points.

    Args:
        points: as many as the threshold or more, distinct, in [1, prime).
        prime: of the field.
    """
    points = list(points)
    weights = {}
    for x in points:
        above, below = 1, 1
        for other in points:
            if other != x:
                above = above * other % prime
                below = below * (other - x) % prime
        weights[x] = above * pow(below, -1, prime) % prime
    return weights


def combine(shares: Mapping[int, int], weights: Mapping[int, int], *, prime: int = PRIME) -> int:
    """The secret of shares at the points of `weights_at_zero`.

    Args:
        shares: by point; those without a weight are not used.
        weights: of the points that are used.
        prime: of the field.

    Raises:
        KeyError: a share is missing.
    """
    return sum(weight * shares[x] for x, weight in weights.items()) % prime


def to_bytes(share: int) -> bytes:
    """A share of the field of `PRIME` as 33 bytes."""
    return share.to_bytes(SHARE_BYTES, "big")


def from_bytes(data: bytes) -> int:
    """The share of 33 bytes.

    Raises:
        ValueError: another length, or no number of the field.
    """
    share = int.from_bytes(data, "big")
    if len(data) != SHARE_BYTES or share >= PRIME:
        raise ValueError(f"share of {len(data)} bytes is no number of the field")
    return share
