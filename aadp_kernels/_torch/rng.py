"""Counter-based generators in torch integer operations: ChaCha and Philox4x32.

Both map a key and a 128-bit counter to a block of 32-bit words and keep no state, so any block can
be computed anywhere. The words are the same on every device, because only integer operations are
used.

References:
    ChaCha: Bernstein 2008; block layout and known answers: RFC 8439, section 2.3.
    Philox: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aadp_kernels.addresses import (
    CHACHA_CONSTANTS,
    PHILOX_MULTIPLIERS,
    PHILOX_WEYL,
    rounds_of,
    signed32,
)

_MASK32 = 0xFFFFFFFF


def random_words(rng: str, key: Sequence[int], counters: Tensor) -> Tensor:
    """Blocks of the named generator.

    Args:
        rng: One of `addresses.RNGS`.
        key: Unsigned 32-bit key words, `key_words_needed(rng)` of them.
        counters: int32 [4, n], the 128-bit counters, word 0 the least significant.

    Returns:
        int32 [words_per_block(rng), n], the bits of the unsigned words.
    """
    generator = chacha if rng.startswith("chacha") else philox
    return generator(key, counters, rounds=rounds_of(rng))


def _rotate_add(x: Tensor, bits: int, scratch: Tensor) -> None:
    """x <- rotate_left(x, bits) in three passes: the product wraps, the parts share no bit."""
    torch.bitwise_right_shift(x, 32 - bits, out=scratch)
    scratch.bitwise_and_((1 << bits) - 1)
    torch.add(scratch, x, alpha=1 << bits, out=x)


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor, scratch: Tensor) -> None:
    """The four quarter rounds of one ChaCha round at once; every argument is int32 [4, n]."""
    a.add_(b)
    d.bitwise_xor_(a)
    _rotate_add(d, 16, scratch)
    c.add_(d)
    b.bitwise_xor_(c)
    _rotate_add(b, 12, scratch)
    a.add_(b)
    d.bitwise_xor_(a)
    _rotate_add(d, 8, scratch)
    c.add_(d)
    b.bitwise_xor_(c)
    _rotate_add(b, 7, scratch)


def chacha(key: Sequence[int], counters: Tensor, *, rounds: int) -> Tensor:
    """ChaCha blocks; `counters` are the state's words 12 to 15 (RFC 8439: counter, nonce)."""
    n = counters.shape[1]
    device = counters.device
    constants = [signed32(w) for w in (*CHACHA_CONSTANTS, *key)]
    head = torch.tensor(constants, dtype=torch.int32, device=device)[:, None]
    a = torch.empty((4, n), dtype=torch.int32, device=device)
    # Spare rows let a diagonal round be a shifted view: only the rows that wrap around are copied.
    b = torch.empty((5, n), dtype=torch.int32, device=device)
    c = torch.empty((6, n), dtype=torch.int32, device=device)
    d = torch.empty((5, n), dtype=torch.int32, device=device)
    scratch = torch.empty((4, n), dtype=torch.int32, device=device)
    a.copy_(head[0:4].expand(4, n))
    b[0:4].copy_(head[4:8].expand(4, n))
    c[0:4].copy_(head[8:12].expand(4, n))
    d[1:5].copy_(counters)
    columns = (a, b[0:4], c[0:4], d[1:5])
    diagonals = (a, b[1:5], c[2:6], d[0:4])
    wraps = ((b[0], b[4]), (c[0:2], c[4:6]), (d[4], d[0]))
    for _ in range(rounds // 2):
        _quarter_rounds(*columns, scratch)
        for home, away in wraps:
            away.copy_(home)
        _quarter_rounds(*diagonals, scratch)
        for home, away in wraps:
            home.copy_(away)
    words = torch.empty((16, n), dtype=torch.int32, device=device)
    torch.add(columns[0], head[0:4], out=words[0:4])
    torch.add(columns[1], head[4:8], out=words[4:8])
    torch.add(columns[2], head[8:12], out=words[8:12])
    torch.add(columns[3], counters, out=words[12:16])
    return words


def philox(key: Sequence[int], counters: Tensor, *, rounds: int) -> Tensor:
    """Philox4x32 blocks, in int64 so that the 32 x 32 bit products are exact."""
    device = counters.device
    wide = counters.to(torch.int64).bitwise_and_(_MASK32)
    even, odd = wide[0::2].clone(), wide[1::2].clone()
    factors = torch.tensor(PHILOX_MULTIPLIERS, dtype=torch.int64, device=device)[:, None]
    schedule = [
        [(k + r * w) & _MASK32 for k, w in zip(key, PHILOX_WEYL, strict=True)]
        for r in range(rounds)
    ]
    keys = torch.tensor(schedule, dtype=torch.int64, device=device)[:, :, None]
    product = torch.empty_like(even)
    for r in range(rounds):
        torch.mul(even, factors, out=product)
        odd.bitwise_xor_(keys[r])
        torch.bitwise_right_shift(product, 32, out=even)
        even.bitwise_and_(_MASK32)
        product.bitwise_and_(_MASK32)
        # Outputs cross over: word 0 takes the high half of the other product, word 1 its low half.
        even = even.flip(0).bitwise_xor_(odd)
        odd = product.flip(0)
    words = torch.empty((4, counters.shape[1]), dtype=torch.int32, device=device)
    words[0::2] = even.to(torch.int32)
    words[1::2] = odd.to(torch.int32)
    return words
