"""Scattering features: fixed wavelets and moduli, so nothing is learned from any record.

A linear layer on them is a strong private model, since no privacy is spent on the first layers of
a network (Tramèr and Boneh, 2021, arXiv:2011.11660).
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

_CHUNK = 256  # records at once, so that the transforms of one chunk stay in the cache


def scattering(
    x: Tensor, *, scale: int = 2, angles: int = 8, order: int = 2, groups: int | None = 27
) -> Tensor:
    """Scattering coefficients of square images, each record by itself.

    Args:
        x: images [N, c, n, n], float32.
        scale: J >= 1; coefficients are averaged over 2^J pixels and n is divided by 2^J, which must
            divide it.
        angles: L >= 1, orientations of the wavelets.
        order: 1 or 2, the number of moduli.
        groups: groups of channels that are brought to mean 0 and variance 1 within each record
            (group normalisation without parameters); None leaves the coefficients as they are.

    Returns:
        float32 [N, c·m, n/2^J, n/2^J] with m = `channels(scale, angles, order)`; by order, then by
        wavelet.

    Raises:
        ValueError: naming the argument and its value.

    Guarantees:
        A function of each record alone and of public constants. Deterministic for one machine and
        number of threads.

    Reference:
        Bruna and Mallat, 2013, arXiv:1203.1513: S_0 = x∗φ, S_1 = |x∗ψ_1|∗φ,
        S_2 = ||x∗ψ_1|∗ψ_2|∗φ for scales j_1 < j_2, Morlet wavelets of width 0.8·2^j and frequency
        3π/(4·2^j). Images are continued by reflection, and nothing is subsampled before the end.
    """
    _check(x, scale, angles, order, groups)
    n, c, side, _ = x.shape
    images = x.reshape(n * c, side, side)
    parts = [_scatter(part, scale, angles, order) for part in images.split(_CHUNK)]
    features = torch.cat(parts).reshape(n, -1, side >> scale, side >> scale)
    return features if groups is None else nn.functional.group_norm(features, groups)


def channels(scale: int, angles: int, order: int) -> int:
    """Coefficients an image channel: 1 + J·L + L²·J(J−1)/2, without the last term for order 1."""
    second = angles**2 * scale * (scale - 1) // 2 if order == 2 else 0
    return 1 + scale * angles + second


def _check(x: Tensor, scale: int, angles: int, order: int, groups: int | None) -> None:
    if x.ndim != 4 or x.shape[2] != x.shape[3] or not x.is_floating_point():
        raise ValueError(
            f"x must be float square images [N, c, n, n], got {x.dtype} {list(x.shape)}"
        )
    if scale < 1 or x.shape[2] % 2**scale or x.shape[2] <= 2**scale:
        raise ValueError(
            f"scale={scale} must be >= 1 and 2^scale a proper divisor of the size {x.shape[2]}"
        )
    if angles < 1:
        raise ValueError(f"angles={angles} must be >= 1")
    if order not in (1, 2):
        raise ValueError(f"order={order} must be 1 or 2")
    width = x.shape[1] * channels(scale, angles, order)
    if groups is not None and (groups < 1 or width % groups):
        raise ValueError(f"groups={groups} must divide the {width} channels")


def _scatter(images: Tensor, scale: int, angles: int, order: int) -> Tensor:
    side, margin = images.shape[-1], 2**scale
    wide = nn.functional.pad(images[:, None], [margin] * 4, mode="reflect")[:, 0]
    bank, average = wavelets(wide.shape[-1], scale, angles), averages(side, scale)
    spectrum = torch.fft.fft2(wide)
    zeroth, first, second = [_smooth(wide, average)], [], []
    for j1, band in enumerate(bank):
        for wavelet in band:
            modulus = torch.fft.ifft2(spectrum * wavelet).abs()
            first.append(_smooth(modulus, average))
            if order == 2 and j1 + 1 < scale:
                inner = torch.fft.fft2(modulus)
                for other in bank[j1 + 1 :].flatten(0, 1):
                    second.append(_smooth(torch.fft.ifft2(inner * other).abs(), average))
    return torch.stack([*zeroth, *first, *second], 1)


def _smooth(images: Tensor, average: Tensor) -> Tensor:
    """(x∗φ) at every 2^J-th pixel of the middle: the Gaussian is a product over the axes."""
    return average @ images @ average.mT


@cache
def wavelets(size: int, scale: int, angles: int) -> Tensor:
    """Spectra of the Morlet wavelets on a torus of `size`², float32 [J, L, size, size].

    ψ(u) = g(u)·(exp(iξ·u) − β) with β such that Σ ψ = 0 and g a Gaussian of unit sum, narrower
    along the wave by a factor 4/L.
    """
    bank = np.zeros((scale, angles, size, size))
    for j in range(scale):
        for i in range(angles):
            # The order of angles is that of other implementations, from 3π/8 down for L = 8.
            theta = (int(angles / 2 - 1) - i) * math.pi / angles
            bank[j, i] = _morlet(size, 0.8 * 2**j, theta, 0.75 * math.pi / 2**j, 4 / angles)
    return torch.from_numpy(bank).float()


def _morlet(size: int, width: float, theta: float, frequency: float, slant: float) -> np.ndarray:
    # Copies up to two periods away make the wavelet periodic.
    u = np.arange(-2 * size, 3 * size)
    row, column = np.meshgrid(u, u, indexing="ij")
    along = row * math.cos(theta) + column * math.sin(theta)
    across = column * math.cos(theta) - row * math.sin(theta)
    envelope = np.exp(-(along**2 + slant**2 * across**2) / (2 * width**2))
    envelope *= slant / (2 * math.pi * width**2)
    wave = envelope * np.exp(1j * frequency * along)
    morlet = wave - wave.sum() / envelope.sum() * envelope
    return np.fft.fft2(morlet.reshape(5, size, 5, size).sum((0, 2))).real


@cache
def averages(side: int, scale: int) -> Tensor:
    """Rows of weights that smooth a padded line of pixels, float32 [side/2^J, side + 2·2^J]."""
    step, width = 2**scale, 0.8 * 2 ** (scale - 1)
    size = side + 2 * step
    distance = np.arange(size)[None] - np.arange(step, step + side, step)[:, None]
    copies = distance[..., None] + size * np.arange(-2, 3)
    weights = np.exp(-(copies**2) / (2 * width**2)).sum(-1) / (math.sqrt(2 * math.pi) * width)
    return torch.from_numpy(weights).float()
