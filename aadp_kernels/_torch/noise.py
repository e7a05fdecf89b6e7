"""Standard Gaussian and Laplace noise, and Bernoulli coins, from counter-based words.

Only +, -, *, /, sqrt and integer operations are used, each of which IEEE 754 fixes to the last bit:
the result does not depend on the length of the call, on vector tails, on threads or on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._torch.rng import random_words
from aadp_kernels.addresses import (
    ATANH,
    COSINE,
    DOMAINS,
    FAST_REFINED_BELOW,
    LAYER_BITS,
    SINE,
    SQRT_HALF_BITS,
    signed32,
    words_per_block,
)
from aadp_kernels.contract import Noise, Segment

_LN2 = math.log(2)

Tile = tuple[int, int]  # elements, and the blocks that serve them and no others
Transform = Callable[[Tensor, Tensor], Tensor]  # words and counters -> elements, tile by tile


def _horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Polynomial with ascending coefficients; separate roundings, never a fused multiply-add."""
    result = torch.mul(x, coefficients[-1]).add_(coefficients[-2])
    for coefficient in reversed(coefficients[:-2]):
        result.mul_(x).add_(coefficient)
    return result


def log_(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float64, in place, to about one ulp."""
    bits = x.view(torch.int64)
    exponent = bits - SQRT_HALF_BITS
    exponent.bitwise_right_shift_(52)
    bits.sub_(exponent, alpha=1 << 52)
    # ln m = 2 atanh(s) with s = (m - 1) / (m + 1) and m in [sqrt(1/2), sqrt(2)), so |s| < 0.172.
    s = x - 1
    s.div_(x.add_(1))
    torch.mul(s, s, out=x)
    s.mul_(_horner(x, ATANH))
    torch.mul(exponent.to(torch.float64), _LN2, out=x)
    return x.add_(s)


def _sqrt_(x: Tensor) -> Tensor:
    """Square root in place; numpy's on a CPU, since torch's may come from MKL, one ulp off."""
    if x.device.type != "cpu":
        return x.sqrt_()
    np.sqrt(x.numpy(), out=x.numpy())
    return x


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
    radius = _sqrt_(_uniform_log(quads[:, 0], quads[:, 1], 32).mul_(-2))
    # The angle is uniform on one arc of 90 degrees; the last two bits choose the arc.
    low = quads[:, 3]
    phi = quads[:, 2].to(torch.float64).add_(0.5)
    phi.add_(low.bitwise_and(-4).to(torch.float64), alpha=2.0**-32).mul_(math.pi / 4 * 2.0**-31)
    y = phi * phi
    sine = _horner(y, SINE).mul_(phi).mul_(radius)
    cosine = _horner(y, COSINE).mul_(radius)
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


def _wide_gaussian(words: Tensor, counters: Tensor) -> Tensor:
    return _gaussian(words).t()


def _wide_laplace(words: Tensor, counters: Tensor) -> Tensor:
    return _laplace(words).t()


def _fast_flat(words: Tensor) -> Tensor:
    """Words [4 * r, n] in the order of their elements, [4 * r * n]."""
    rows = words.shape[0] // 4
    lanes = 32 if rows == 4 else 1
    return words.view(rows, 4, -1, lanes).permute(2, 0, 3, 1).reshape(-1)


def _fast_uniform(rng: str, key_words: Sequence[int], n: Tensor, stride: int, counters: Tensor):
    """n + 1/2 in float64 for the numbers n of every `stride`-th element, refined where n is small.

    The refined ones are n + (t + 1/2) 2^-32 with the tail word t of the same address.
    """
    u = n.to(torch.float64).add_(0.5)
    small = (n < FAST_REFINED_BELOW).nonzero()[:, 0]
    if len(small) == 0:
        return u
    element = small * stride
    if rng.startswith("chacha"):
        column = element // 512 * 32 + element % 128 // 4
        word = element % 512 // 128 * 4 + element % 4
    else:
        column, word = element // 4, element % 4
    address = counters[:, column]
    address[3] += 2 << LAYER_BITS  # from a fast domain to its tail domain
    tail = random_words(rng, key_words, address).gather(0, word[None])[0]
    tail = tail.to(torch.int64).bitwise_and_(0xFFFFFFFF).to(torch.float64).add_(0.5)
    u[small] = n[small].to(torch.float64).add_(tail, alpha=2.0**-32)
    return u


def _fast_laplace(rng: str, key_words: Sequence[int]) -> Transform:
    """A sign bit and 31 bits of uniform an element."""

    def transform(words: Tensor, counters: Tensor) -> Tensor:
        word = _fast_flat(words).to(torch.int64).bitwise_and_(0xFFFFFFFF)
        u = _fast_uniform(rng, key_words, word >> 1, 1, counters)
        return log_(u.mul_(2.0**-31)).mul_(word.bitwise_and(1).mul_(2).sub_(1))

    return transform


def _fast_gaussian(rng: str, key_words: Sequence[int]) -> Transform:
    """Box-Muller with 32 bits for the radius and 32 for the angle."""

    def transform(words: Tensor, counters: Tensor) -> Tensor:
        pairs = _fast_flat(words).view(-1, 2)
        first = pairs[:, 0].to(torch.int64).bitwise_and_(0xFFFFFFFF)
        u = _fast_uniform(rng, key_words, first, 2, counters)
        radius = _sqrt_(log_(u.mul_(2.0**-32)).mul_(-2))
        # The angle is pi * x; x minus its nearest multiple of 1/2 is exact.
        x = pairs[:, 1].to(torch.float64).add_(0.5).mul_(2.0**-31)
        quarter = x.mul(2).round_()
        phi = x.sub_(quarter, alpha=0.5).mul_(math.pi)
        y = phi * phi
        sine, cosine = _horner(y, SINE).mul_(phi).mul_(radius), _horner(y, COSINE).mul_(radius)
        turn = quarter.to(torch.int64).bitwise_and_(3)
        odd = turn.bitwise_and(1).to(torch.bool)
        across, up = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
        across = torch.where((turn == 1) | (turn == 2), -across, across)
        up = torch.where(turn >= 2, -up, up)
        return torch.stack((across, up), -1)

    return transform


def _counters(noise: Noise, segments: Sequence[Segment], domain: int, tile: Tile) -> Tensor:
    """int32 [4, K * blocks] counters of whole tiles that cover the segments, client by client."""
    clients, step, device = noise.clients, noise.step, noise.clients.device
    elements, per_tile = tile
    blocks, layers = [], []
    for layer, offset, count in segments:
        first = offset // elements * per_tile
        last = -(-(offset + count) // elements) * per_tile
        blocks.append(torch.arange(first, last, dtype=torch.int64, device=device))
        word = signed32(layer + (domain << LAYER_BITS))
        layers.append(torch.full((last - first,), word, dtype=torch.int32, device=device))
    block = torch.cat(blocks).to(torch.int32)
    counters = torch.empty((4, len(clients), len(block)), dtype=torch.int32, device=device)
    counters[0] = block
    counters[1] = step.to(torch.int32) if isinstance(step, Tensor) else signed32(step)
    counters[2] = clients.to(torch.int32)[:, None]
    counters[3] = torch.cat(layers)
    return counters.view(4, -1)


def _chunk_columns(device: torch.device, words: int) -> int:
    """Columns a pass: small enough for the cache on a CPU, large enough to hide dispatch."""
    return 1 << 14 if device.type == "cpu" else (1 << 26) // words


def elements(
    noise: Noise,
    segments: Sequence[Segment],
    *,
    domain: str,
    tile: Tile,
    transform: Transform,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Per segment [K, count]: `transform` of the words, tile by tile."""
    per_tile, blocks = tile
    rows, device = len(noise.clients), noise.clients.device
    counters = _counters(noise, segments, DOMAINS[domain], tile)
    tiles = counters.shape[1] // blocks
    flat = torch.empty((tiles, per_tile), dtype=dtype, device=device)
    chunk = -(-_chunk_columns(device, words_per_block(noise.rng)) // blocks)
    for start in range(0, tiles, chunk):
        part = counters[:, start * blocks : (start + chunk) * blocks]
        values = transform(random_words(noise.rng, noise.key_words, part), part)
        flat[start : start + chunk] = values.reshape(-1, per_tile)
    flat = flat.view(rows, tiles // max(rows, 1) * per_tile)
    results, column = [], 0
    for _, offset, count in segments:
        skip = offset % per_tile
        results.append(flat[:, column + skip : column + skip + count])
        column += -(-(skip + count) // per_tile) * per_tile
    return results


def standard_noise(noise: Noise, segments: Sequence[Segment]) -> list[Tensor]:
    """Noise of scale one, wide or fast: float64 [K, count] for every (layer, offset, count)."""
    total = _of_one_step(noise, segments)
    for term in noise.again:
        earlier = noise._replace(key_words=term.key_words, step=term.step)
        for value, drawn in zip(total, _of_one_step(earlier, segments), strict=True):
            value.add_(drawn.mul_(term.coefficient))
    return total


def _of_one_step(noise: Noise, segments: Sequence[Segment]) -> list[Tensor]:
    """`standard_noise` without what is drawn again."""
    gaussian, width = noise.mechanism == "gaussian", words_per_block(noise.rng)
    if noise.form == "fast":
        make = _fast_gaussian if gaussian else _fast_laplace
        domain, transform = f"fast_{noise.mechanism}", make(noise.rng, noise.key_words)
        tile = (512, 32) if width == 16 else (4, 1)
    else:
        domain, tile = noise.mechanism, (width // 2, 1)
        transform = _wide_gaussian if gaussian else _wide_laplace
    return elements(
        noise, segments, domain=domain, tile=tile, transform=transform, dtype=torch.float64
    )


def _word64(words: Tensor, counters: Tensor) -> Tensor:
    """Words of blocks as numbers of 64 bits, the first word of a pair high."""
    pairs = words.view(words.shape[0] // 2, 2, -1)
    low = pairs[:, 1].to(torch.int64).bitwise_and_(0xFFFFFFFF)
    return pairs[:, 0].to(torch.int64).bitwise_left_shift_(32).bitwise_or_(low).t()


def coins(noise: Noise, n: int, rates: Sequence[float]) -> Tensor:
    """Independent Bernoulli coins, bool [K, n]; the rate is kept to 2^-63."""
    tile = (words_per_block(noise.rng) // 2, 1)
    (bits,) = elements(
        noise, [(0, 0, n)], domain="coins", tile=tile, transform=_word64, dtype=torch.int64
    )
    whole, device = 1 << 63, noise.clients.device
    limits = [min(round(Fraction(rate) * whole), whole - 1) for rate in rates]
    limit = torch.tensor(limits, dtype=torch.int64, device=device)[:, None]
    always = torch.tensor([rate >= 1 for rate in rates], device=device)[:, None]
    return (bits.bitwise_and(whole - 1) < limit) | always
