"""Pictures of overlapping shapes from a public seed, and a basis for features learned from them.

Natural images share much of their statistics with such "dead leaves" (Lee, Mumford and Huang, 2001,
Baradad et al., 2021, arXiv:2106.05963): what can be learned from drawings costs no privacy.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fl_lightning.data.scattering import scattering

_PICTURES = 6000


def whitened_scattering(
    x: Tensor,
    *,
    components: int = 1024,
    ridge: float = 1e-3,
    scale: int = 2,
    angles: int = 8,
    order: int = 2,
    groups: int | None = 27,
) -> Tensor:
    """Scattering features in the whitened principal components of drawn pictures, each of norm 1.

    A step of noisy gradient descent then gains as much in weak directions as in strong ones, and
    noise is not spent on directions in which images hardly differ.

    Args:
        x: grey square images [N, 1, n, n], float32.
        components: principal components that are kept, at least 1.
        ridge: added to each component's variance before it is divided by its root, above 0; the
            features have a total variance of about 0.6.
        scale, angles, order, groups: as for `scattering`.

    Returns:
        float32 [N, components], rows of L2 norm 1 (0 for a row of zeros).

    Raises:
        ValueError: naming the argument and its value.

    Guarantees:
        As `scattering`: mean and components come from drawings made from a fixed public seed.
    """
    if x.ndim != 4 or x.shape[1] != 1:
        raise ValueError(f"x must be grey images [N, 1, n, n], got {list(x.shape)}")
    if not 0 < ridge < math.inf:
        raise ValueError(f"ridge={ridge} must be positive and finite")
    parts = x.split(2000)  # all coefficients of all records would not fit into memory
    first = _features(parts[0], scale, angles, order, groups)
    if not 1 <= components <= min(first.shape[1], _PICTURES - 1):
        most = min(first.shape[1], _PICTURES - 1)
        raise ValueError(f"components={components} must be in [1, {most}]")
    mean, variance, directions = _drawn_components(x.shape[-1], scale, angles, order, groups)
    basis = directions[:, :components] * (variance[:components] + ridge).rsqrt()
    rows = [(first - mean) @ basis]
    for part in parts[1:]:
        rows.append((_features(part, scale, angles, order, groups) - mean) @ basis)
    return torch.nn.functional.normalize(torch.cat(rows))


def _features(x: Tensor, scale: int, angles: int, order: int, groups: int | None) -> Tensor:
    features = scattering(x, scale=scale, angles=angles, order=order, groups=groups).flatten(1)
    return features / math.sqrt(features.shape[1])


@cache
def _drawn_components(
    side: int, scale: int, angles: int, order: int, groups: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [d], variances [d] from large to small, and directions [d, d] of drawn features."""
    features = _features(drawings(_PICTURES, side), scale, angles, order, groups)
    mean = features.mean(0)
    centred = features - mean
    variance, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    return mean, variance.flip(0).clamp(min=0), directions.flip(1)


def drawings(count: int, side: int, seed: int = 0) -> Tensor:
    """Grey pictures of one to eight overlapping shapes on black, float32 [count, 1, side, side].

    Shapes are ellipses and rounded boxes of log-uniform size at uniform places, half of them
    turned; some striped, some noisy, some black. Values in [-1, 1].
    """
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:side, :side] * (28 / side)
    pictures = np.full((count, side, side), -1.0)
    for picture in pictures:
        for _ in range(rng.integers(1, 9)):
            _draw(picture, row, column, rng)
    return torch.from_numpy(pictures).float()[:, None]


def _draw(
    picture: np.ndarray, row: np.ndarray, column: np.ndarray, rng: np.random.Generator
) -> None:
    y, x = rng.uniform(2, 26, 2)
    height, width = np.exp(rng.uniform(math.log(1.5), math.log(14), 2))
    turn = rng.uniform(0, math.pi) if rng.random() < 0.5 else 0.0
    along = (column - x) * math.cos(turn) + (row - y) * math.sin(turn)
    across = (row - y) * math.cos(turn) - (column - x) * math.sin(turn)
    power = rng.choice([2, 8])
    inside = np.abs(along / height) ** power + np.abs(across / width) ** power < 1
    grey = np.full(picture.shape, rng.uniform(-1, 1))
    if rng.random() < 0.4:
        frequency, phase, angle = rng.uniform((0.2, 0, 0), (2.5, 2 * math.pi, math.pi))
        wave = frequency * (math.cos(angle) * column + math.sin(angle) * row) + phase
        grey += rng.uniform(0, 0.6) * np.sin(wave)
    if rng.random() < 0.4:
        grey += rng.uniform(0, 0.3) * rng.standard_normal(picture.shape)
    if rng.random() < 0.2:
        grey[:] = -1.0
    picture[inside] = grey[inside].clip(-1, 1)
