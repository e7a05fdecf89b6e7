"""Secret keys of noise."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from functools import cached_property
from typing import NoReturn

from aadp_kernels import _validate
from aadp_kernels._reuse import UsedNoise
from aadp_kernels.addresses import RNGS, key_words_needed


class NoiseKey:
    """A 32-byte secret that all noise and coins are a function of.

    Who knows the key can subtract the noise. A key is therefore never printed, pickled or copied;
    keep its bytes in a private file. A privacy claim rests on the generator as well: that nobody
    can tell its words from uniform ones without the key. That is the usual assumption for ChaCha.
    Nobody has analysed Philox as a cipher and its key has 64 bits, so a claim with "philox10"
    assumes more. A key from a public seed marks everything that is made with it as simulated.

    Args:
        secret: 32 bytes, secret.
        rng: "chacha20" (default), "chacha8" (the same stream cipher with fewer rounds, less margin)
            or "philox10" (fast, not a cipher).
        simulated: True if the secret is not secret (a public seed).

    Raises:
        ValueError: The secret is not 32 bytes, or the generator is unknown.

    Guarantees:
        Keys with different generators share no stream, nor do keys derived with different contexts.
        The same noise on two different sums reveals their difference. So a key object remembers,
        for each (mechanism, form, layer, client), its last step and the elements drawn in it: to
        draw an element twice, or for a step lower than the last, is a ReusedNoiseError. Disjoint
        elements of one step (shards) may be drawn one after another, by several threads too.
        Drawing the same noise again on purpose takes a new key object.

    Edge cases:
        | not seen by a key object | who sees to it |
        |---|---|
        | other objects with its secret (other processes, `derive` of one context twice) | caller |
        | step or client ids on an accelerator, which are never read | caller |
        | coins: the same coins twice reveal nothing new | nobody |
    """

    def __init__(self, secret: bytes, rng: str = "chacha20", simulated: bool = False) -> None:
        _validate.one_of("rng", rng, RNGS)
        if not isinstance(secret, bytes | bytearray) or len(secret) != 32:
            length = len(secret) if isinstance(secret, bytes | bytearray) else type(secret).__name__
            raise ValueError(f"secret must be 32 bytes, got {length}")
        self._secret = bytes(secret)
        self._rng = rng
        self._simulated = bool(simulated)
        self._used = UsedNoise()

    @classmethod
    def random(cls, rng: str = "chacha20") -> NoiseKey:
        """A new key from the operating system's generator."""
        return cls(secrets.token_bytes(32), rng)

    @classmethod
    def from_seed(cls, seed: int, rng: str = "chacha20") -> NoiseKey:
        """A reproducible key for experiments: marked as simulated, it protects nothing."""
        if isinstance(seed, bool) or not hasattr(seed, "__index__"):
            raise ValueError(f"seed must be an integer, got {seed!r}")
        digest = hashlib.blake2b(_encode(seed.__index__()), digest_size=32, person=b"aadp seed")
        return cls(digest.digest(), rng, simulated=True)

    @classmethod
    def from_bytes(cls, secret: bytes, rng: str = "chacha20", simulated: bool = False) -> NoiseKey:
        """The key with the given 32 secret bytes."""
        return cls(secret, rng, simulated)

    def derive(self, *context: bytes | str | int) -> NoiseKey:
        """The key for a context, such as `key.derive("round", 3, digest)`.

        Args:
            context: Public bytes, strings and integers; at least one.

        Returns:
            A key that tells nothing about this one, with the same generator and the same mark.

        Raises:
            ValueError: No context, or one of another type.

        Guarantees:
            Keyed BLAKE2b over an unambiguous encoding: ("ab", "c"), ("a", "bc"), (b"ab", "c") and
            1, "1" are all different contexts.
        """
        if not context:
            raise ValueError("context must not be empty")
        data = b"".join(_encode(item) for item in context)
        digest = hashlib.blake2b(data, digest_size=32, key=self._secret, person=b"aadp derive")
        return NoiseKey(digest.digest(), self._rng, self._simulated)

    @property
    def rng(self) -> str:
        """Name of the generator."""
        return self._rng

    @property
    def simulated(self) -> bool:
        """True if the key comes from a public seed."""
        return self._simulated

    @cached_property
    def words(self) -> tuple[int, ...]:
        """Secret. The generator's key as unsigned 32-bit words (8 for ChaCha, 2 for Philox)."""
        size = 4 * key_words_needed(self._rng)
        person = f"aadp {self._rng}".encode()
        digest = hashlib.blake2b(key=self._secret, digest_size=size, person=person).digest()
        return tuple(int.from_bytes(digest[i : i + 4], "little") for i in range(0, size, 4))

    def __repr__(self) -> str:
        return f"NoiseKey(<secret>, rng={self._rng!r}, simulated={self._simulated})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NoiseKey):
            return NotImplemented
        same_rng = self._rng == other._rng and self._simulated == other._simulated
        return hmac.compare_digest(self._secret, other._secret) and same_rng

    def __hash__(self) -> int:
        return hash((self._rng, hashlib.blake2b(key=self._secret, digest_size=8).digest()))

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a NoiseKey is secret: it cannot be copied, pickled or checkpointed")


def _encode(item: bytes | str | int) -> bytes:
    """Type, length and bytes of one part of a context, so that no two contexts coincide."""
    if isinstance(item, bool) or not isinstance(item, bytes | str | int):
        raise ValueError(f"context must be bytes, str or int, got {item!r}")
    if isinstance(item, bytes):
        tag, data = b"b", item
    elif isinstance(item, str):
        tag, data = b"s", item.encode()
    else:
        tag, data = b"i", item.to_bytes(item.bit_length() // 8 + 1, "big", signed=True)
    return tag + len(data).to_bytes(8, "big") + data
