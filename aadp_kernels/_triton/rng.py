"""ChaCha and Philox4x32 as Triton device functions: the words of `addresses`.

The counter is (block, step, client, layer), all uint32; a generator is named by its number of
rounds, `ROUNDS`, and by `CHACHA`. Rounds of Philox are unrolled, so that its key schedule, which
does not depend on the block, is computed once and outside of every loop; ChaCha has none.
"""

# Triton's constexpr arguments, ranges and launch options have no types that fit.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_key(pointer, CHACHA: tl.constexpr):
    """The key as eight uint32 scalars; Philox has two, the others are never used."""
    k0 = tl.load(pointer).to(tl.uint32, bitcast=True)
    k1 = tl.load(pointer + 1).to(tl.uint32, bitcast=True)
    if CHACHA:
        k2 = tl.load(pointer + 2).to(tl.uint32, bitcast=True)
        k3 = tl.load(pointer + 3).to(tl.uint32, bitcast=True)
        k4 = tl.load(pointer + 4).to(tl.uint32, bitcast=True)
        k5 = tl.load(pointer + 5).to(tl.uint32, bitcast=True)
        k6 = tl.load(pointer + 6).to(tl.uint32, bitcast=True)
        k7 = tl.load(pointer + 7).to(tl.uint32, bitcast=True)
        return k0, k1, k2, k3, k4, k5, k6, k7
    else:
        return k0, k1, k0, k0, k0, k0, k0, k0


@triton.jit
def _quarter(a, b, c, d):
    a += b
    d ^= a
    d = (d << 16) | (d >> 16)
    c += d
    b ^= c
    b = (b << 12) | (b >> 20)
    a += b
    d ^= a
    d = (d << 8) | (d >> 24)
    c += d
    b ^= c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@triton.jit
def chacha(block, step, client, layer, key, ROUNDS: tl.constexpr):
    """ChaCha blocks: `block` uint32 of any shape, the rest scalars -> 16 words of that shape."""
    zero = block ^ block
    i0, i1 = zero + 0x61707865, zero + 0x3320646E
    i2, i3 = zero + 0x79622D32, zero + 0x6B206574
    i4, i5, i6, i7 = zero + key[0], zero + key[1], zero + key[2], zero + key[3]
    i8, i9, i10, i11 = zero + key[4], zero + key[5], zero + key[6], zero + key[7]
    i13, i14, i15 = zero + step, zero + client, zero + layer
    x0, x1, x2, x3, x4, x5, x6, x7 = i0, i1, i2, i3, i4, i5, i6, i7
    x8, x9, x10, x11, x12, x13, x14, x15 = i8, i9, i10, i11, block, i13, i14, i15
    # A loop of the machine: unrolled, twenty rounds take Triton minutes to lay out.
    for _ in range(ROUNDS // 2):
        x0, x4, x8, x12 = _quarter(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
    return (
        x0 + i0, x1 + i1, x2 + i2, x3 + i3, x4 + i4, x5 + i5, x6 + i6, x7 + i7,
        x8 + i8, x9 + i9, x10 + i10, x11 + i11, x12 + block, x13 + i13, x14 + i14, x15 + i15,
    )  # fmt: skip


@triton.jit
def philox(block, step, client, layer, key, ROUNDS: tl.constexpr):
    """Philox4x32 blocks: `block` uint32 of any shape, the rest scalars -> 4 words of that shape."""
    zero = block ^ block
    x0, x1, x2, x3 = block, zero + step, zero + client, zero + layer
    k0, k1 = key[0], key[1]
    for _ in tl.static_range(ROUNDS):
        # One 32 x 32 -> 64 bit product is one instruction, its two halves would be two.
        p0, p2 = x0.to(tl.uint64) * 0xD2511F53, x2.to(tl.uint64) * 0xCD9E8D57
        h0, h2 = (p0 >> 32).to(tl.uint32), (p2 >> 32).to(tl.uint32)
        x0, x1, x2, x3 = h2 ^ x1 ^ k0, p2.to(tl.uint32), h0 ^ x3 ^ k1, p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return x0, x1, x2, x3
