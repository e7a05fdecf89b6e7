"""Standard Gaussian and Laplace noise, and Bernoulli coins, from counter-based words.

Addressing. The 128-bit counter of a block is (block, step, client, layer + 2^24 * domain), 32 bits
each, so no two (domain, step, client, layer, block) share a block. A pair of words serves one
element: elements 8j .. 8j+7 come from ChaCha block j, elements 2j, 2j+1 from Philox block j.

Only +, -, *, /, sqrt and integer operations are used, each of which IEEE 754 fixes to the last bit:
the result does not depend on the length of the call, on vector tails, on threads or on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from aadp_kernels._torch.rng import random_words, signed32, words_per_block

DOMAINS = {"gaussian": 1, "laplace": 2, "coins": 3}
LAYER_BITS = 24
GAUSSIAN_CUTOFF = math.sqrt(2 * 64 * math.log(2))
LAPLACE_CUTOFF = 63 * math.log(2)

_LN2 = math.log(2)
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD
_ATANH = [2 / (2 * k + 1) for k in range(12)]
_SIN = [(-1) ** k / math.factorial(2 * k + 1) for k in range(9)]
_COS = [(-1) ** k / math.factorial(2 * k) for k in range(9)]

Segment = tuple[int, int, int]  # layer, first element, number of elements


def _horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Polynomial with ascending coefficients; separate roundings, never a fused multiply-add."""
    result = torch.mul(x, coefficients[-1]).add_(coefficients[-2])
    for coefficient in reversed(coefficients[:-2]):
        result.mul_(x).add_(coefficient)
    return result


def log_(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float64, in place, to about one ulp."""
    bits = x.view(torch.int64)
    exponent = bits - _SQRT_HALF_BITS
    exponent.bitwise_right_shift_(52)
    bits.sub_(exponent, alpha=1 << 52)
    # ln m = 2 atanh(s) with s = (m - 1) / (m + 1) and m in [sqrt(1/2), sqrt(2)), so |s| < 0.172.
    s = x - 1
    s.div_(x.add_(1))
    torch.mul(s, s, out=x)
    s.mul_(_horner(x, _ATANH))
    torch.mul(exponent.to(torch.float64), _LN2, out=x)
    return x.add_(s)


def _uniform_log(high: Tensor, low: Tensor, low_bits: int) -> Tensor:
    """ln((n + 1) / 2^(32 + low_bits)) for the unsigned n = high * 2^low_bits + low, all bits used.

    `high` and `low` are signed views of unsigned words with the top bit flipped, int32.
    """
    u = high.to(torch.float64).add_(2.0**31)
    tail = low.to(torch.float64).add_(2.0 ** (low_bits - 1) + 1)
    u.add_(tail, alpha=2.0**-low_bits)
    return log_(u.mul_(2.0**-32))


def _gaussian(words: Tensor) -> Tensor:
    """Box-Muller: int32 words [4 * pairs, n] -> float64 [2 * pairs, n]."""
    pairs = words.shape[0] // 4
    quads = words.view(pairs, 4, -1)
    radius = _uniform_log(quads[:, 0], quads[:, 1], 32).mul_(-2).sqrt_()
    # The angle is uniform on one arc of 90 degrees; the last two bits choose the arc.
    low = quads[:, 3]
    phi = quads[:, 2].to(torch.float64).add_(0.5)
    phi.add_(low.bitwise_and(-4).to(torch.float64), alpha=2.0**-32).mul_(math.pi / 4 * 2.0**-31)
    y = phi * phi
    sine = _horner(y, _SIN).mul_(phi).mul_(radius)
    cosine = _horner(y, _COS).mul_(radius)
    cosine.mul_(low.bitwise_and(2).neg_().add_(1))
    swap = low.bitwise_and(1).to(torch.bool)
    out = torch.empty((pairs, 2, words.shape[1]), dtype=torch.float64, device=words.device)
    torch.where(swap, sine, cosine, out=out[:, 0])
    torch.where(swap, cosine, sine, out=out[:, 1])
    return out.view(2 * pairs, -1)


def _laplace(words: Tensor) -> Tensor:
    """Inverse distribution function: a sign bit and 63 bits of uniform an element."""
    pairs = words.view(words.shape[0] // 2, 2, -1)
    low = pairs[:, 1]
    magnitude = _uniform_log(pairs[:, 0], low.bitwise_right_shift(1), 31)
    return magnitude.mul_(low.bitwise_and(1).mul_(2).sub_(1))


def _counters(segments: Sequence[Segment], clients: Tensor, step: int, domain: int, per_block: int):
    """int32 [4, K * blocks] counters of whole blocks that cover the segments, client by client."""
    device = clients.device
    blocks, layers = [], []
    for layer, offset, count in segments:
        first, last = offset // per_block, -(-(offset + count) // per_block)
        blocks.append(torch.arange(first, last, dtype=torch.int64, device=device))
        word = signed32(layer + (domain << LAYER_BITS))
        layers.append(torch.full((last - first,), word, dtype=torch.int32, device=device))
    block = torch.cat(blocks).to(torch.int32)
    counters = torch.empty((4, len(clients), len(block)), dtype=torch.int32, device=device)
    counters[0] = block
    counters[1] = signed32(step)
    counters[2] = clients.to(torch.int32)[:, None]
    counters[3] = torch.cat(layers)
    return counters.view(4, -1)


def _chunk_columns(device: torch.device, words: int) -> int:
    """Columns a pass: small enough for the cache on a CPU, large enough to hide dispatch."""
    return 1 << 14 if device.type == "cpu" else (1 << 26) // words


def _elements(rng, key_words, segments, clients, step, domain, transform, dtype) -> list[Tensor]:
    """Per segment [K, count]: `transform` of the words, one result per pair of words."""
    width = words_per_block(rng)
    per_block = width // 2
    counters = _counters(segments, clients, step, DOMAINS[domain], per_block)
    columns = counters.shape[1]
    flat = torch.empty((columns, per_block), dtype=dtype, device=clients.device)
    chunk = _chunk_columns(clients.device, width)
    for start in range(0, columns, chunk):
        words = random_words(rng, key_words, counters[:, start : start + chunk])
        flat[start : start + chunk] = transform(words).t()
    flat = flat.view(len(clients), columns // max(len(clients), 1) * per_block)
    results, column = [], 0
    for _, offset, count in segments:
        skip = offset % per_block
        results.append(flat[:, column + skip : column + skip + count])
        column += -(-(skip + count) // per_block) * per_block
    return results


def standard_noise(
    rng: str,
    key_words: Sequence[int],
    segments: Sequence[Segment],
    clients: Tensor,
    *,
    step: int,
    mechanism: str,
) -> list[Tensor]:
    """Noise of scale one, float64 [K, count] for every (layer, offset, count) segment."""
    transform = _gaussian if mechanism == "gaussian" else _laplace
    return _elements(rng, key_words, segments, clients, step, mechanism, transform, torch.float64)


def coins(
    rng: str,
    key_words: Sequence[int],
    n: int,
    clients: Tensor,
    *,
    step: int,
    rates: Sequence[float],
) -> Tensor:
    """Independent Bernoulli coins, bool [K, n]; the rate is kept to 2^-63."""

    def word64(words: Tensor) -> Tensor:
        pairs = words.view(words.shape[0] // 2, 2, -1)
        low = pairs[:, 1].to(torch.int64).bitwise_and_(0xFFFFFFFF)
        return pairs[:, 0].to(torch.int64).bitwise_left_shift_(32).bitwise_or_(low)

    bits = _elements(rng, key_words, [(0, 0, n)], clients, step, "coins", word64, torch.int64)[0]
    whole = 1 << 63
    limits = [min(round(Fraction(rate) * whole), whole - 1) for rate in rates]
    limit = torch.tensor(limits, dtype=torch.int64, device=clients.device)[:, None]
    always = torch.tensor([rate >= 1 for rate in rates], device=clients.device)[:, None]
    return (bits.bitwise_and(whole - 1) < limit) | always
