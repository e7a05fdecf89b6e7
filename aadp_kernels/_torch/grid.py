"""Noise on an integer grid, drawn exactly from integer operations, and the quantising of updates.

T = 2^30 steps make one octave. A proposal G >= 0 has P(G = g) proportional to 2^(-g/T):
G = H T + R with P(H = h) = 2^-(h+1) and three independent digits R = d0 2^20 + d1 2^10 + d2 in
0..1023, see `grid_law.thresholds`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor

from aadp_kernels._torch.noise import Transform, elements, log_
from aadp_kernels._torch.rng import random_words
from aadp_kernels.addresses import DOMAINS, LAYER_BITS, words_per_block
from aadp_kernels.contract import Noise, Segment
from aadp_kernels.grid import (
    ATTEMPTS,
    LIMIT,
    MAX_OCTAVES,
    MAX_WEIGHT,
    TAIL_DOMAINS,
    quantum,
    release,
)
from aadp_kernels.grid_law import DIGIT_BITS, OCTAVE_BITS, thresholds

_LN2 = math.log(2)
_SIGN = -(1 << 63)


@cache
def _ordered_thresholds(device: torch.device) -> Tensor:
    """The thresholds with the top bit flipped, so that signed order is unsigned order [3, 1023]."""
    return torch.tensor([[c + _SIGN for c in row] for row in thresholds()], device=device)


def _word64(words: Tensor, first: int) -> Tensor:
    """The bits of two words as int64, the first word high."""
    low = words[first + 1].to(torch.int64).bitwise_and_(0xFFFFFFFF)
    return words[first].to(torch.int64).bitwise_left_shift_(32).bitwise_or_(low)


def _bit_length(x: Tensor) -> Tensor:
    """Bits of 0 <= x < 2^32, read off the exponent of float64, where such x are exact."""
    exponent = x.to(torch.float64).view(torch.int64).bitwise_right_shift(52).sub_(1022)
    return exponent.clamp_(min=0)


def _leading_zeros(number: Tensor) -> Tensor:
    """Zeros before the first one of 64 bits; 64 where there is none."""
    high = number.bitwise_right_shift(32).bitwise_and_(0xFFFFFFFF)
    low = number.bitwise_and(0xFFFFFFFF)
    return 64 - torch.where(high > 0, _bit_length(high) + 32, _bit_length(low))


def _element_words(words: Tensor, need: int) -> Tensor:
    """Words of blocks [width, n] as the words of elements [need, n * width / need]."""
    width = words.shape[0]
    if width >= need:
        return words.view(width // need, need, -1).permute(1, 2, 0).reshape(need, -1)
    return words.view(width, -1, need // width).permute(2, 0, 1).reshape(need, -1)


def _proposal(words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Negative or not, octaves H (63 where more bits are needed) and remainder R."""
    first = _word64(words, 0)
    octaves = _leading_zeros(first.bitwise_left_shift(1)).clamp_(max=63)
    remainder = torch.zeros_like(octaves)
    for j, table in enumerate(_ordered_thresholds(words.device)):
        number = _word64(words, 2 * j + 2).bitwise_xor_(_SIGN)
        digit = torch.searchsorted(table, number, right=True)
        remainder.bitwise_left_shift_(DIGIT_BITS).add_(digit)
    return first < 0, octaves, remainder


def more_octaves(words: Iterable[int]) -> int:
    """Octaves of an element whose first 63 bits are zero, from further unsigned words."""
    octaves = 63
    for word in words:
        octaves += 32 - word.bit_length()
        if word:
            return octaves
    return octaves


def _tail_words(rng: str, key_words: Sequence[int], address: Tensor) -> Iterable[int]:
    """The words of whole blocks in the tail domains; `address` [4, n] in the first domain."""
    shift = DOMAINS["grid_laplace_tail"] - DOMAINS["grid_laplace"]
    for domain in range(shift, shift + TAIL_DOMAINS):
        counters = address.clone()
        counters[3] += domain << LAYER_BITS
        blocks = random_words(rng, key_words, counters).t().reshape(-1)
        for word in blocks.tolist():
            yield word & 0xFFFFFFFF


def _laplace(rng: str, key_words: Sequence[int]) -> Transform:
    """floor of a continuous Laplace variable: G, or -1 - G for a negative one."""

    def transform(words: Tensor, counters: Tensor) -> Tensor:
        own = _element_words(words, 8)
        negative, octaves, remainder = _proposal(own)
        per_element = max(1, 8 // words.shape[0])
        for i in (octaves == 63).nonzero()[:, 0].tolist():
            start = i * per_element if words.shape[0] < 8 else i // 2
            tail = list(_tail_words(rng, key_words, counters[:, start : start + per_element]))
            # Two elements share a ChaCha block of 16 words.
            if words.shape[0] == 16:
                half = 8 * (i % 2)
                tail = [w for b in range(0, len(tail), 16) for w in tail[b + half : b + half + 8]]
            octaves[i] = more_octaves(tail)
        remainder = torch.where(octaves == MAX_OCTAVES, 0, remainder)
        magnitude = octaves.bitwise_left_shift_(OCTAVE_BITS).add_(remainder)
        return torch.where(negative, -1 - magnitude, magnitude)

    return transform


def _accepts(words: Tensor, magnitude: Tensor) -> Tensor:
    """Whether -ln U > (g - ln 2)^2 / 2 for g = magnitude / T."""
    x = magnitude.to(torch.float64).mul_(2.0**-OCTAVE_BITS).sub_(_LN2)
    x.mul_(x).mul_(0.5)
    fraction = _word64(words, 10).bitwise_right_shift_(11).bitwise_and_((1 << 53) - 1)
    mantissa = fraction.to(torch.float64).add_(0.5).mul_(2.0**-54).add_(0.5)
    zeros = _leading_zeros(_word64(words, 8)).to(torch.float64)
    return zeros.mul_(_LN2).sub_(log_(mantissa)) > x


def _gaussian(rng: str, key_words: Sequence[int]) -> Transform:
    """Discrete Gaussian of standard deviation T, by rejection from the two-sided proposal."""

    def transform(words: Tensor, counters: Tensor) -> Tensor:
        own = _element_words(words, 16)
        blocks = max(1, 16 // words.shape[0])
        address = counters.view(4, -1, blocks)
        result = torch.zeros(own.shape[1], dtype=torch.int64, device=words.device)
        waiting = torch.arange(own.shape[1], device=words.device)
        for attempt in range(ATTEMPTS):
            if attempt:
                again = address[:, waiting].reshape(4, -1)
                again[3] += attempt << LAYER_BITS
                own = _element_words(random_words(rng, key_words, again), 16)
            negative, octaves, remainder = _proposal(own)
            magnitude = octaves.bitwise_left_shift_(OCTAVE_BITS).add_(remainder)
            good = _accepts(own, magnitude) & ~(negative & (magnitude == 0))
            value = torch.where(negative, -magnitude, magnitude)
            result[waiting[good]] = value[good]
            waiting = waiting[~good]
            if len(waiting) == 0:
                break
        return result

    return transform


def integer_noise(noise: Noise, segments: Sequence[Segment]) -> list[Tensor]:
    """Noise in quanta, int64 [K, count] for every (layer, offset, count) segment."""
    gaussian, width = noise.mechanism == "gaussian", words_per_block(noise.rng)
    need, make = (16, _gaussian) if gaussian else (8, _laplace)
    return elements(
        noise, segments, domain=f"grid_{noise.mechanism}",
        tile=(max(1, width // need), max(1, need // width)),
        transform=make(noise.rng, noise.key_words), dtype=torch.int64,
    )  # fmt: skip


def quantise(part: Tensor, factor: Tensor, finite: Tensor, step: Tensor) -> Tensor:
    """Clipped rows in quanta, towards zero: int64 [K, n] of float64 [K, n]; the rest are [K].

    One division a row and one product an element. Entries beyond LIMIT stop there.
    """
    weight = (factor / step).clamp(max=MAX_WEIGHT)
    value = torch.where(finite[:, None], part * weight[:, None], 0.0)
    return value.clamp(-LIMIT, LIMIT).nan_to_num(0.0).trunc().to(torch.int64)


def released(
    part: Tensor,
    factor: Tensor,
    finite: Tensor,
    noise: Tensor | None,
    scale: Tensor,
    mechanism: str,
) -> Tensor:
    """Clipped rows, quantised and noised, float64 [K, n] of `part` [K, n]; the rest are [K]."""
    step = quantum(scale, mechanism)
    return release(quantise(part, factor, finite, step), noise, step[:, None], mechanism)
