"""Standard noise of the forms fast and wide as Triton device functions.

A program draws the noise of a *tile*, `TILE` consecutive elements of one layer that begin at a
multiple of `TILE`. A tile comes as one part, or as four for ChaCha in the fast form, each a matrix
[rows, width] whose rows are runs of consecutive elements that one thread holds: `part_index` says
which. So every word is made where it is used and memory is read and written in 128-bit pieces.

`BLOCKS` is the number of consecutive Philox blocks in a row. The words, their addresses and what is
made of them are those of `_torch.noise`; wide does the same float64 operations in the same order
(compile it without fused multiply-adds), fast replaces ln, sin, cos and sqrt by float32
approximations of the hardware.
"""

# Triton's constexpr arguments, ranges and launch options have no types that fit.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from aadp_kernels._torch.noise import _ATANH as ATANH
from aadp_kernels._torch.noise import _COS as COSINE
from aadp_kernels._torch.noise import _SIN as SINE
from aadp_kernels._torch.noise import DOMAINS, LAYER_BITS, Segment
from aadp_kernels._triton._device import key_tensor, step_tensor
from aadp_kernels._triton.rng import chacha, load_key, philox

TILE = 1024  # of `noise_kernel`

_INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
_LN2 = tl.constexpr(math.log(2))
_SQRT_HALF_BITS = tl.constexpr(0x3FE6A09E667F3BCD)
_ATANH = tl.constexpr(tuple(ATANH))
_SIN = tl.constexpr(tuple(float(c) for c in SINE))
_COS = tl.constexpr(tuple(float(c) for c in COSINE))
_ANGLE = tl.constexpr(math.pi / 4 * 2.0**-31)
_TURN = tl.constexpr(math.pi * 2.0**-31)
_DOMAIN = tl.constexpr(1 << LAYER_BITS)
_GAUSSIAN, _LAPLACE = tl.constexpr(DOMAINS["gaussian"]), tl.constexpr(DOMAINS["laplace"])
_FAST_GAUSSIAN = tl.constexpr(DOMAINS["fast_gaussian"])
_FAST_LAPLACE = tl.constexpr(DOMAINS["fast_laplace"])
_TAIL = tl.constexpr(DOMAINS["fast_laplace_tail"] - DOMAINS["fast_laplace"])


def parts(form: str, chacha: bool) -> int:
    """Parts of a tile."""
    return 4 if form == "fast" and chacha else 1


def blocks_per_row(form: str, chacha: bool, itemsize: int) -> int:
    """Philox blocks in a row so that a row of the tensor is 128 bits, or 1 for ChaCha."""
    if chacha:
        return 1
    return max(1, 16 // itemsize // (4 if form == "fast" else 2))


@triton.jit
def part_index(part: tl.constexpr, TILE: tl.constexpr, FORM: tl.constexpr, CHACHA: tl.constexpr,
               BLOCKS: tl.constexpr):  # fmt: skip
    """Elements of a part relative to the first of its tile: int32 [rows, width]."""
    if CHACHA and FORM == "fast":
        block = tl.arange(0, TILE // 16)
        start = (block // 32) * 512 + (block % 32) * 4 + part * 128
        index = start[:, None] + tl.arange(0, 4)[None, :]
    else:
        width: tl.constexpr = 8 if CHACHA else (4 if FORM == "fast" else 2) * BLOCKS
        index = tl.arange(0, TILE // width)[:, None] * width + tl.arange(0, width)[None, :]
    return index


@triton.jit
def _join4(a, b, c, d):
    """[..., 4] with a, b, c, d along the new dimension."""
    pair = tl.join(tl.join(a, c), tl.join(b, d))
    if len(a.shape) == 1:
        return tl.reshape(pair, [a.shape[0], 4])
    else:
        return tl.reshape(pair, [a.shape[0], 4 * a.shape[1]])


@triton.jit
def _join2(a, b):
    """[n, 2], or [n, 2m] for [n, m]."""
    pair = tl.join(a, b)
    if len(a.shape) == 1:
        return pair
    else:
        return tl.reshape(pair, [a.shape[0], 2 * a.shape[1]])


@triton.jit
def _signed(word):
    return word.to(tl.int32, bitcast=True)


@triton.jit
def _log2_approx(x):
    if _INTERPRET:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _sqrt_approx(x):
    if _INTERPRET:
        return tl.sqrt(x)
    else:
        return tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _sin_approx(x):
    if _INTERPRET:
        return tl.sin(x)
    else:
        return tl.inline_asm_elementwise(
            "sin.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _cos_approx(x):
    if _INTERPRET:
        return tl.cos(x)
    else:
        return tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _radius_words(a, b, c, d, GAUSSIAN: tl.constexpr):
    """The words of four elements that make a magnitude: all of them, or one a pair."""
    if GAUSSIAN:
        return _join2(a, c)
    else:
        return _join4(a, b, c, d)


@triton.jit
def _least(a, b, c, d, GAUSSIAN: tl.constexpr):
    """The least word of a magnitude, uint32 of the shape of `a`."""
    least = tl.minimum(a, c)
    if not GAUSSIAN:
        least = tl.minimum(least, tl.minimum(b, d))
    return least


@triton.jit
def _minimum(x):
    """The least element of a vector or matrix, without a change of its layout."""
    if len(x.shape) == 2:
        x = tl.min(x, axis=1)
    return tl.min(x, axis=0)


@triton.jit
def _uniform(words, GAUSSIAN: tl.constexpr):
    """(n + 1/2) / 2^bits in float32, n the word (32 bits) or the word without its sign (31)."""
    if GAUSSIAN:
        return words.to(tl.float32) * 2.0**-32 + 2.0**-33
    else:
        return (words >> 1).to(tl.float32) * 2.0**-31 + 2.0**-32


@triton.jit
def _tail_uniform(words, tail, uniform, GAUSSIAN: tl.constexpr):
    """`uniform` where n >= 2^12, n being its leading digits only where n is smaller."""
    fraction = tail.to(tl.float32) * 2.0**-32 + 2.0**-33
    if GAUSSIAN:
        return tl.where(words < 4096, (words.to(tl.float32) + fraction) * 2.0**-32, uniform)
    else:
        n = (words >> 1).to(tl.float32)
        return tl.where(words < 8192, (n + fraction) * 2.0**-31, uniform)


@triton.jit
def _fast_values(words, angles, uniform, GAUSSIAN: tl.constexpr):
    """Noise [rows, width] from its words and uniforms."""
    log = _log2_approx(uniform)
    if GAUSSIAN:
        # The approximation of log2 may round up past zero at one: no square root of a negative.
        radius = _sqrt_approx(tl.maximum(log * (-2 * _LN2), 0.0))
        angle = _signed(angles).to(tl.float32) * _TURN + _TURN * 0.5
        pairs = tl.join(radius * _cos_approx(angle), radius * _sin_approx(angle))
        return tl.reshape(pairs, [pairs.shape[0], 2 * pairs.shape[1]])
    else:
        flipped = log.to(tl.uint32, bitcast=True) ^ (words << 31)
        return flipped.to(tl.float32, bitcast=True) * -_LN2


@triton.jit
def _philox_rows(
    start, step, client, word, key, ROUNDS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr
):
    """The 4 words of the blocks of a tile, from block `start` on: [ROWS], or [ROWS, BLOCKS]."""
    row = tl.arange(0, ROWS).to(tl.uint32)
    if BLOCKS == 1:
        return philox(start + row, step, client, word, key, ROUNDS)
    elif BLOCKS == 2:
        # Joined, both blocks of a row are in one thread, as its elements will be.
        a = philox(start + 2 * row, step, client, word, key, ROUNDS)
        b = philox(start + 2 * row + 1, step, client, word, key, ROUNDS)
        return tl.join(a[0], b[0]), tl.join(a[1], b[1]), tl.join(a[2], b[2]), tl.join(a[3], b[3])
    else:
        block = start + row[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :].to(tl.uint32)
        return philox(block, step, client, word, key, ROUNDS)


@triton.jit
def _fast_philox(
    start, step, client, layer, key, ROUNDS: tl.constexpr, GAUSSIAN: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    domain: tl.constexpr = _FAST_GAUSSIAN if GAUSSIAN else _FAST_LAPLACE
    limit: tl.constexpr = 4096 if GAUSSIAN else 8192
    word = layer + domain * _DOMAIN
    a, b, c, d = _philox_rows(start, step, client, word, key, ROUNDS, ROWS, BLOCKS)
    words = _radius_words(a, b, c, d, GAUSSIAN)
    angles = _join2(b, d)
    uniform = _uniform(words, GAUSSIAN)
    # One tile in hundreds needs tail words: the branch is for the whole tile.
    if _minimum(_least(a, b, c, d, GAUSSIAN)) < limit:
        word += _TAIL * _DOMAIN
        a, b, c, d = _philox_rows(start, step, client, word, key, ROUNDS, ROWS, BLOCKS)
        uniform = _tail_uniform(words, _radius_words(a, b, c, d, GAUSSIAN), uniform, GAUSSIAN)
    return _fast_values(words, angles, uniform, GAUSSIAN)


@triton.jit
def _fast_chacha(block, step, client, layer, key, ROUNDS: tl.constexpr, GAUSSIAN: tl.constexpr):
    domain: tl.constexpr = _FAST_GAUSSIAN if GAUSSIAN else _FAST_LAPLACE
    limit: tl.constexpr = 4096 if GAUSSIAN else 8192
    word = layer + domain * _DOMAIN
    w = chacha(block, step, client, word, key, ROUNDS)
    words0 = _radius_words(w[0], w[1], w[2], w[3], GAUSSIAN)
    words1 = _radius_words(w[4], w[5], w[6], w[7], GAUSSIAN)
    words2 = _radius_words(w[8], w[9], w[10], w[11], GAUSSIAN)
    words3 = _radius_words(w[12], w[13], w[14], w[15], GAUSSIAN)
    uniform0, uniform1 = _uniform(words0, GAUSSIAN), _uniform(words1, GAUSSIAN)
    uniform2, uniform3 = _uniform(words2, GAUSSIAN), _uniform(words3, GAUSSIAN)
    least = tl.minimum(
        tl.minimum(_least(*w[0:4], GAUSSIAN), _least(*w[4:8], GAUSSIAN)),
        tl.minimum(_least(*w[8:12], GAUSSIAN), _least(*w[12:16], GAUSSIAN)),
    )
    if _minimum(least) < limit:
        t = chacha(block, step, client, word + _TAIL * _DOMAIN, key, ROUNDS)
        tail = _radius_words(t[0], t[1], t[2], t[3], GAUSSIAN)
        uniform0 = _tail_uniform(words0, tail, uniform0, GAUSSIAN)
        tail = _radius_words(t[4], t[5], t[6], t[7], GAUSSIAN)
        uniform1 = _tail_uniform(words1, tail, uniform1, GAUSSIAN)
        tail = _radius_words(t[8], t[9], t[10], t[11], GAUSSIAN)
        uniform2 = _tail_uniform(words2, tail, uniform2, GAUSSIAN)
        tail = _radius_words(t[12], t[13], t[14], t[15], GAUSSIAN)
        uniform3 = _tail_uniform(words3, tail, uniform3, GAUSSIAN)
    return (
        _fast_values(words0, _join2(w[1], w[3]), uniform0, GAUSSIAN),
        _fast_values(words1, _join2(w[5], w[7]), uniform1, GAUSSIAN),
        _fast_values(words2, _join2(w[9], w[11]), uniform2, GAUSSIAN),
        _fast_values(words3, _join2(w[13], w[15]), uniform3, GAUSSIAN),
    )


@triton.jit
def _horner(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    """Polynomial with ascending coefficients, as `_torch.noise._horner`."""
    result = x * COEFFICIENTS[DEGREE] + COEFFICIENTS[DEGREE - 1]
    for i in tl.static_range(2, DEGREE + 1):
        result = result * x + COEFFICIENTS[DEGREE - i]
    return result


@triton.jit
def log(x):
    """`_torch.noise.log_`: natural logarithm of positive normal float64."""
    bits = x.to(tl.int64, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 52
    m = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    s = s * _horner(s * s, _ATANH, 11)
    return exponent.to(tl.int32).to(tl.float64) * _LN2 + s


@triton.jit
def _uniform_log(high, low, LOW_BITS: tl.constexpr):
    """ln((n + 1) / 2^(32 + LOW_BITS)), n of the words with flipped top bits."""
    u = high.to(tl.float64) + 2.0**31
    tail = low.to(tl.float64) + (2.0 ** (LOW_BITS - 1) + 1)
    u += tail * 2.0**-LOW_BITS
    return log(u * 2.0**-32)


@triton.jit
def _wide_pair(a, b, c, d, GAUSSIAN: tl.constexpr):
    """Two elements from four words: float64 [..., 2] with the last two dimensions merged."""
    a, b, c, d = _signed(a), _signed(b), _signed(c), _signed(d)
    if GAUSSIAN:
        radius = tl.sqrt(_uniform_log(a, b, 32) * -2.0)
        phi = c.to(tl.float64) + 0.5
        phi += (d & -4).to(tl.float64) * 2.0**-32
        phi *= _ANGLE
        y = phi * phi
        sine = _horner(y, _SIN, 8) * phi * radius
        cosine = _horner(y, _COS, 8) * radius
        cosine *= (1 - (d & 2)).to(tl.float64)
        swap = (d & 1) != 0
        return _join2(tl.where(swap, sine, cosine), tl.where(swap, cosine, sine))
    else:
        first = _uniform_log(a, b >> 1, 31) * ((b & 1) * 2 - 1).to(tl.float64)
        second = _uniform_log(c, d >> 1, 31) * ((d & 1) * 2 - 1).to(tl.float64)
        return _join2(first, second)


@triton.jit
def tile_noise(
    first, step, client, layer, key, TILE: tl.constexpr, GAUSSIAN: tl.constexpr,
    FORM: tl.constexpr, CHACHA: tl.constexpr, ROUNDS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Noise of scale one of the elements first .. first + TILE - 1 of a layer.

    Args:
        first: int64, a multiple of TILE (power of two; for ChaCha in the fast form >= 512).
        step, client, layer: uint32 scalars.
        key: From `load_key`.

    Returns:
        A tuple of parts [rows, width], float32 (fast) or float64 (wide), as `part_index` orders.
    """
    if FORM == "fast":
        if CHACHA:
            block = (first // 16).to(tl.uint32) + tl.arange(0, TILE // 16).to(tl.uint32)
            return _fast_chacha(block, step, client, layer, key, ROUNDS, GAUSSIAN)
        else:
            rows: tl.constexpr = TILE // (4 * BLOCKS)
            start = (first // 4).to(tl.uint32)
            return (_fast_philox(start, step, client, layer, key, ROUNDS, GAUSSIAN, rows, BLOCKS),)
    else:
        domain: tl.constexpr = _GAUSSIAN if GAUSSIAN else _LAPLACE
        word = layer + domain * _DOMAIN
        if CHACHA:
            block = (first // 8).to(tl.uint32) + tl.arange(0, TILE // 8).to(tl.uint32)
            w = chacha(block, step, client, word, key, ROUNDS)
            pair0 = _wide_pair(w[0], w[1], w[2], w[3], GAUSSIAN)
            pair1 = _wide_pair(w[4], w[5], w[6], w[7], GAUSSIAN)
            pair2 = _wide_pair(w[8], w[9], w[10], w[11], GAUSSIAN)
            pair3 = _wide_pair(w[12], w[13], w[14], w[15], GAUSSIAN)
            quads = tl.join(tl.join(pair0, pair2), tl.join(pair1, pair3))
            # [rows, element, upper bit of the pair, lower bit]: the pair comes before the element.
            return (tl.reshape(tl.permute(quads, [0, 2, 3, 1]), [TILE // 8, 8]),)
        else:
            rows: tl.constexpr = TILE // (2 * BLOCKS)
            start = (first // 2).to(tl.uint32)
            a, b, c, d = _philox_rows(start, step, client, word, key, ROUNDS, rows, BLOCKS)
            return (_wide_pair(a, b, c, d, GAUSSIAN),)


@triton.jit
def to_element(value, DTYPE: tl.constexpr):
    """`value` in a tensor's dtype; 16 bits come by way of float32, as they do in torch."""
    if DTYPE.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    if _INTERPRET and DTYPE.name == "bf16":
        # The interpreter cuts bfloat16 off; a device rounds to nearest even.
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(value == value, bits, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)


@triton.jit
def _store_noise(
    out, scale, step, client, layer, key, first, low, high, TILE: tl.constexpr,
    GAUSSIAN: tl.constexpr, FORM: tl.constexpr, CHACHA: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    noise = tile_noise(
        first, step, client, layer, key, TILE, GAUSSIAN, FORM, CHACHA, ROUNDS, BLOCKS
    )
    for part in tl.static_range(PARTS):
        element = first + part_index(part, TILE, FORM, CHACHA, BLOCKS)
        inside = (element >= low) & (element < high)
        value = noise[part].to(tl.float64) * scale
        tl.store(out + (element - low), to_element(value, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["layer", "low", "high"])
def noise_kernel(
    out_pointer, scale_pointer, step_pointer, clients_pointer, key_pointer, layer, low, high,
    TILE: tl.constexpr, GAUSSIAN: tl.constexpr, FORM: tl.constexpr, CHACHA: tl.constexpr,
    ROUNDS: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out[k, i] = scale * noise(step, clients[k], layer, low + i) for low + i < high.

    Grid (tiles, K). The product is float64, rounded once to the dtype of `out`.
    """
    row = tl.program_id(1).to(tl.int64)
    first = (low // TILE + tl.program_id(0)) * TILE
    key = load_key(key_pointer, CHACHA)
    step = tl.load(step_pointer).to(tl.uint32)
    client = tl.load(clients_pointer + row).to(tl.uint32)
    scale = tl.load(scale_pointer)
    out = out_pointer + row * (high - low)
    _store_noise(
        out, scale, step, client, layer.to(tl.uint32), key, first, low, high, TILE, GAUSSIAN, FORM,
        CHACHA, ROUNDS, BLOCKS, PARTS,
    )  # fmt: skip


def scaled_noise(
    rng: str,
    key_words: Sequence[int],
    segment: Segment,
    clients: Tensor,
    *,
    step: int | Tensor,
    mechanism: str,
    form: str,
    scale: float | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Noise of a scale (a number, or float64 [K, count]) in `dtype`, [K, count]."""
    layer, offset, count = segment
    device = clients.device
    if isinstance(scale, Tensor):
        noise = scaled_noise(
            rng, key_words, segment, clients, step=step, mechanism=mechanism, form=form, scale=1.0,
            dtype=torch.float64,
        )  # fmt: skip
        return (noise * scale).to(dtype)
    out = torch.empty((len(clients), count), dtype=dtype, device=device)
    tiles = -(-(offset + count) // TILE) - offset // TILE
    secure = rng.startswith("chacha")
    if out.numel():
        noise_kernel[(tiles, len(clients))](
            out, torch.full((), scale, dtype=torch.float64, device=device),
            step_tensor(step, device), clients.contiguous(), key_tensor(tuple(key_words), device),
            layer, offset, offset + count, TILE=TILE, GAUSSIAN=mechanism == "gaussian", FORM=form,
            CHACHA=secure, ROUNDS=int(rng[6:]),
            BLOCKS=blocks_per_row(form, secure, dtype.itemsize), PARTS=parts(form, secure),
            enable_fp_fusion=form == "fast",
        )  # fmt: skip
    return out
