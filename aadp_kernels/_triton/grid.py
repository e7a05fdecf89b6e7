"""Integer noise of the grid form as Triton device functions: the numbers of the specification."""

# Triton's constexpr arguments, ranges and launch options have no types that fit.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

import math

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from aadp_kernels import grid as _grid
from aadp_kernels import grid_law as _law
from aadp_kernels._triton._device import (
    MAX_ROWS,
    key_tensor,
    launch,
    per_stream,
    slices,
    step_tensor,
    to_device,
)
from aadp_kernels._triton.noise import to_element
from aadp_kernels._triton.rng import chacha, load_key, philox
from aadp_kernels._triton.wide_noise import log
from aadp_kernels.addresses import DOMAINS, LAYER_BITS, rounds_of
from aadp_kernels.contract import Noise, Segment
from aadp_kernels.layout import Layout

TILE = 256

_LN2 = tl.constexpr(math.log(2))
_DOMAIN = tl.constexpr(1 << LAYER_BITS)
_LAPLACE = tl.constexpr(DOMAINS["grid_laplace"])
_GAUSSIAN = tl.constexpr(DOMAINS["grid_gaussian"])
_LAPLACE_TAIL = tl.constexpr(DOMAINS["grid_laplace_tail"])
_TAIL_DOMAINS = tl.constexpr(_grid.TAIL_DOMAINS)
_MAX_OCTAVES = tl.constexpr(_grid.MAX_OCTAVES)
_ATTEMPTS = tl.constexpr(_grid.ATTEMPTS)
_LIMIT = tl.constexpr(_grid.LIMIT)
_MAX_WEIGHT = tl.constexpr(_grid.MAX_WEIGHT)
_QUANTUM = tl.constexpr(_grid.LN2_UP * 2.0**-_law.OCTAVE_BITS)
_OCTAVE = tl.constexpr(2.0**-_law.OCTAVE_BITS)
_TINY = tl.constexpr(torch.finfo(torch.float64).tiny)


@per_stream(16)
def threshold_tensor(device: torch.device) -> Tensor:
    """The thresholds of the digits, int64 [3, 1023] with the bits of the uint64."""
    return to_device(np.array(_law.thresholds(), dtype=np.uint64).view(np.int64), device)


@triton.jit
def grid_index(TILE: tl.constexpr, GAUSSIAN: tl.constexpr, CHACHA: tl.constexpr):
    """Elements relative to the first of the tile: int32 [rows, width]."""
    width: tl.constexpr = 2 if CHACHA and not GAUSSIAN else 1
    return tl.arange(0, TILE // width)[:, None] * width + tl.arange(0, width)[None, :]


@triton.jit
def _eight(first, step, client, word, key, TILE: tl.constexpr, CHACHA: tl.constexpr,
           ROUNDS: tl.constexpr):  # fmt: skip
    """The 8 words of each element of a Laplace tile."""
    if CHACHA:
        block = (first // 2).to(tl.uint32) + tl.arange(0, TILE // 2).to(tl.uint32)
        w = chacha(block, step, client, word, key, ROUNDS)
        return (
            tl.join(w[0], w[8]), tl.join(w[1], w[9]), tl.join(w[2], w[10]), tl.join(w[3], w[11]),
            tl.join(w[4], w[12]), tl.join(w[5], w[13]), tl.join(w[6], w[14]), tl.join(w[7], w[15]),
        )  # fmt: skip
    else:
        block = (first * 2).to(tl.uint32) + 2 * tl.arange(0, TILE)[:, None].to(tl.uint32)
        a = philox(block, step, client, word, key, ROUNDS)
        b = philox(block + 1, step, client, word, key, ROUNDS)
        return a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]


@triton.jit
def _twelve(first, step, client, word, key, TILE: tl.constexpr, CHACHA: tl.constexpr,
            ROUNDS: tl.constexpr):  # fmt: skip
    """The first 12 of the 16 words of each element of a Gaussian tile and attempt."""
    lane = tl.arange(0, TILE)[:, None].to(tl.uint32)
    if CHACHA:
        w = chacha(first.to(tl.uint32) + lane, step, client, word, key, ROUNDS)
        return w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11]
    else:
        block = (first * 4).to(tl.uint32) + 4 * lane
        a = philox(block, step, client, word, key, ROUNDS)
        b = philox(block + 1, step, client, word, key, ROUNDS)
        c = philox(block + 2, step, client, word, key, ROUNDS)
        return a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3]


@triton.jit
def _word64(high, low):
    return (high.to(tl.uint64) << 32) | low.to(tl.uint64)


@triton.jit
def _bit_length(x):
    """Bits of a uint32, read off the exponent of float64, where it is exact."""
    exponent = (x.to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1022
    return tl.where(x == 0, 0, exponent)


@triton.jit
def _leading_zeros(number):
    """Zeros before the first one of a uint64; 64 where there is none."""
    high, low = (number >> 32).to(tl.uint32), number.to(tl.uint32)
    return 64 - tl.where(high != 0, _bit_length(high) + 32, _bit_length(low))


@triton.jit
def _digit(number, thresholds, DIGIT: tl.constexpr):
    """How many of the 1023 ascending thresholds are at most `number`."""
    found = number.to(tl.int32) & 0
    for bit in tl.static_range(10):
        value = tl.load(thresholds + (1023 * DIGIT - 1) + (found + (512 >> bit)))
        found += tl.where(value.to(tl.uint64, bitcast=True) <= number, 512 >> bit, 0)
    return found


@triton.jit
def _proposal(w, thresholds):
    """Negative or not, octaves H (63: more bits are needed) and remainder R, from 8 words."""
    first = _word64(w[0], w[1])
    octaves = tl.minimum(_leading_zeros(first << 1), 63)
    high = _digit(_word64(w[2], w[3]), thresholds, 0).to(tl.int64)
    middle = _digit(_word64(w[4], w[5]), thresholds, 1).to(tl.int64)
    low = _digit(_word64(w[6], w[7]), thresholds, 2).to(tl.int64)
    return (first >> 63) != 0, octaves, (high << 20) | (middle << 10) | low


@triton.jit
def more_octaves(octaves, first, step, client, layer, key, TILE: tl.constexpr,
                 CHACHA: tl.constexpr, ROUNDS: tl.constexpr):  # fmt: skip
    """`octaves` that are 63 counted on in the words of the tail domains."""
    open_ = octaves == 63
    word = layer + _LAPLACE_TAIL * _DOMAIN
    for _ in range(_TAIL_DOMAINS):
        w = _eight(first, step, client, word, key, TILE, CHACHA, ROUNDS)
        for i in tl.static_range(8):
            octaves += tl.where(open_, 32 - _bit_length(w[i]), 0)
            open_ = open_ & (w[i] == 0)
        word += _DOMAIN
    return octaves


@triton.jit
def _laplace(first, step, client, layer, key, thresholds, TILE: tl.constexpr,
             CHACHA: tl.constexpr, ROUNDS: tl.constexpr):  # fmt: skip
    word = layer + _LAPLACE * _DOMAIN
    w = _eight(first, step, client, word, key, TILE, CHACHA, ROUNDS)
    negative, octaves, remainder = _proposal(w, thresholds)
    if tl.max(tl.max(octaves, axis=1), axis=0) == 63:
        octaves = more_octaves(octaves, first, step, client, layer, key, TILE, CHACHA, ROUNDS)
        remainder = tl.where(octaves == _MAX_OCTAVES, 0, remainder)
    magnitude = (octaves << 30) + remainder
    return tl.where(negative, -1 - magnitude, magnitude)


@triton.jit
def _accepts(w, magnitude):
    """Whether -ln U > (g - ln 2)^2 / 2 for g = magnitude / T."""
    x = magnitude.to(tl.float64) * _OCTAVE - _LN2
    x = x * x * 0.5
    fraction = (_word64(w[10], w[11]) >> 11).to(tl.int64)
    mantissa = (fraction.to(tl.float64) + 0.5) * 2.0**-54 + 0.5
    zeros = _leading_zeros(_word64(w[8], w[9])).to(tl.float64)
    return zeros * _LN2 - log(mantissa) > x


@triton.jit
def _gaussian(first, step, client, layer, key, thresholds, TILE: tl.constexpr,
              CHACHA: tl.constexpr, ROUNDS: tl.constexpr):  # fmt: skip
    """Rejection until every element of the tile is accepted."""
    result = tl.zeros([TILE, 1], tl.int64)
    waiting = tl.full([TILE, 1], 1, tl.int32)
    word = layer + _GAUSSIAN * _DOMAIN
    attempt = 0
    left = 1
    while (left > 0) & (attempt < _ATTEMPTS):
        w = _twelve(first, step, client, word, key, TILE, CHACHA, ROUNDS)
        negative, octaves, remainder = _proposal(w, thresholds)
        magnitude = (octaves << 30) + remainder
        good = _accepts(w, magnitude) & ((negative == 0) | (magnitude != 0)) & (waiting != 0)
        result = tl.where(good, tl.where(negative, -magnitude, magnitude), result)
        waiting = tl.where(good, 0, waiting)
        left = tl.max(tl.max(waiting, axis=1), axis=0)
        word += _DOMAIN
        attempt += 1
    return result


@triton.jit
def grid_noise(
    first, step, client, layer, key, thresholds, TILE: tl.constexpr, GAUSSIAN: tl.constexpr,
    CHACHA: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Noise in quanta of the elements first .. first + TILE - 1, int64 like `grid_index`."""
    if GAUSSIAN:
        return _gaussian(first, step, client, layer, key, thresholds, TILE, CHACHA, ROUNDS)
    else:
        return _laplace(first, step, client, layer, key, thresholds, TILE, CHACHA, ROUNDS)


@triton.jit
def quantum(scale, GAUSSIAN: tl.constexpr):
    """Grid step of a noise scale; 0 for scale 0, NaN for what is no scale."""
    step = scale * (_OCTAVE if GAUSSIAN else _QUANTUM)
    step = tl.where(step < _TINY, _TINY, step)
    step = tl.where((scale > 0) & (scale < float("inf")), step, float("nan"))
    return tl.where(scale == 0, 0.0, step)


@triton.jit
def quantum_weight(factor, step):
    """What turns an element into quanta; NaN where the factor or the step is."""
    weight = factor / step
    return tl.where(weight > _MAX_WEIGHT, _MAX_WEIGHT, weight)


@triton.jit
def quantise(value, weight):
    """value * weight as an integer, towards zero, within the limit; 0 for NaN."""
    quanta = tl.where(weight == weight, value * weight, 0.0)
    quanta = tl.where(quanta == quanta, quanta, 0.0)
    quanta = tl.where(quanta > _LIMIT, 1.0 * _LIMIT, quanta)
    return tl.where(quanta < -_LIMIT, -1.0 * _LIMIT, quanta).to(tl.int64)


@triton.jit
def release(total, noise, step, GAUSSIAN: tl.constexpr):
    """Integers with noise as float64."""
    noised = total + noise
    noised = tl.minimum(tl.maximum(noised, -_LIMIT), _LIMIT)
    return (noised.to(tl.float64) + (0.0 if GAUSSIAN else 0.5)) * step


@triton.jit(
    do_not_specialize=["layer", "low", "high"],
    do_not_specialize_on_alignment=["scale_pointer", "step_pointer", "clients_pointer"],
)
def grid_kernel(
    out_pointer, scale_pointer, step_pointer, clients_pointer, key_pointer, thresholds, layer, low,
    high, TILE: tl.constexpr, GAUSSIAN: tl.constexpr, CHACHA: tl.constexpr,
    ROUNDS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """out[k, i] = noise of element low + i of a layer: quanta if COUNTS, else in the scale's units.

    Grid (tiles, K).
    """
    # A low or high below 2^31 comes as int32, and so would products with it.
    row, low, high = tl.program_id(1).to(tl.int64), low.to(tl.int64), high.to(tl.int64)
    first = (low // TILE + tl.program_id(0)) * TILE
    key = load_key(key_pointer, CHACHA)
    noise = grid_noise(
        first, tl.load(step_pointer).to(tl.uint32),
        tl.load(clients_pointer + row).to(tl.uint32), layer.to(tl.uint32), key, thresholds, TILE,
        GAUSSIAN, CHACHA, ROUNDS,
    )  # fmt: skip
    element = first + grid_index(TILE, GAUSSIAN, CHACHA)
    out = out_pointer + row * (high - low) + (element - low)
    inside = (element >= low) & (element < high)
    if COUNTS:
        tl.store(out, noise, mask=inside)
    else:
        size = quantum(tl.load(scale_pointer), GAUSSIAN)
        value = (noise.to(tl.float64) + (0.0 if GAUSSIAN else 0.5)) * size
        tl.store(out, to_element(value, out_pointer.dtype.element_ty), mask=inside)


def scaled_noise(
    noise: Noise, segment: Segment, scale: float | Tensor, dtype: torch.dtype
) -> Tensor:
    """`Backend.scaled_noise` of the grid form."""
    (layer, offset, count), mechanism = segment, noise.mechanism
    clients, device = noise.clients, noise.clients.device
    if isinstance(scale, Tensor) and dtype != torch.int64:
        counts = scaled_noise(noise, segment, 1.0, torch.int64)
        size = _grid.quantum(scale, mechanism)
        return ((counts.to(torch.float64) + _grid.OFFSETS[mechanism]) * size).to(dtype)
    out = torch.empty((len(clients), count), dtype=dtype, device=device)
    tiles = -(-(offset + count) // TILE) - offset // TILE
    size = 1.0 if isinstance(scale, Tensor) else scale
    for rows in slices(len(clients) if count else 0, MAX_ROWS):
        some = clients[rows].contiguous()
        launch(
            grid_kernel, (tiles, len(some)), device, out[rows],
            torch.full((), size, dtype=torch.float64, device=device),
            step_tensor(noise.step, device), some, key_tensor(tuple(noise.key_words), device),
            threshold_tensor(device), layer, offset, offset + count, TILE=TILE,
            GAUSSIAN=mechanism == "gaussian",
            CHACHA=noise.rng.startswith("chacha"), ROUNDS=rounds_of(noise.rng),
            COUNTS=dtype == torch.int64, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def layer_integers(noise: Noise, layout: Layout, scale: Tensor) -> list[Tensor | None]:
    """`Backend.layer_integers`: one launch a layer."""
    return [
        scaled_noise(noise, (layer, 0, dim), 1.0, torch.int64) if dim else None
        for layer, dim in enumerate(layout.dims)
    ]
