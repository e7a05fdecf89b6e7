"""Masks: a 32-byte seed becomes as many uniform 64-bit numbers as an update has.

The numbers are the key stream of ChaCha20 (RFC 8439's block function, OpenSSL's implementation
through `cryptography`) with a zero nonce: a seed masks one vector and is never used again. Sums are
those of unsigned 64-bit numbers, modulo 2^64, which is also what int64 tensors do.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

_NONCE = bytes(16)  # block counter 0, nonce 0
_AT_ONCE = 1 << 15  # numbers: zeros, key stream and sum stay in the cache
MOST_NUMBERS = 1 << 34  # the block counter has 32 bits, of 8 numbers each: half of them


def add_mask(total: np.ndarray, seed: bytes, *, sign: int) -> None:
    """Add the mask of a seed to numbers, or take it away, modulo 2^64 and in place.

    Args:
        total: uint64 [n].
        seed: 32 bytes, secret.
        sign: 1 or -1.

    Raises:
        ValueError: more numbers than a seed has, or another sign.
    """
    if len(total) > MOST_NUMBERS:
        raise ValueError(f"{len(total)} numbers are more than a seed masks ({MOST_NUMBERS})")
    if sign not in (1, -1):
        raise ValueError(f"sign={sign} must be 1 or -1")
    combine = np.add if sign == 1 else np.subtract
    stream = Cipher(algorithms.ChaCha20(seed, _NONCE), mode=None).encryptor()
    zeros, buffer = bytes(8 * _AT_ONCE), bytearray(8 * _AT_ONCE)
    words = np.frombuffer(buffer, dtype="<u8")
    for start in range(0, len(total), _AT_ONCE):
        part = total[start : start + _AT_ONCE]
        stream.update_into(memoryview(zeros)[: 8 * len(part)], buffer)
        combine(part, words[: len(part)], out=part)
