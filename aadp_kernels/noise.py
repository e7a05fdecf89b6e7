"""Secret noise keys and the noise and coins that are drawn with them."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from functools import cached_property
from typing import NoReturn

import torch
from torch import Tensor

from aadp_kernels import _dispatch, _validate
from aadp_kernels._eager import eager
from aadp_kernels._reuse import UsedNoise
from aadp_kernels.addresses import (
    CUTOFFS,
    LAYER_BITS,
    RNGS,
    key_words_needed,
    words_per_block,
)
from aadp_kernels.contract import Noise, Segment

MECHANISMS = ("gaussian", "laplace")
FORMS = ("wide", "fast", "grid")

_MAX_STEP = 1 << 32
_MAX_LAYER = 1 << LAYER_BITS


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


def tail_cutoff(mechanism: str, form: str = "wide") -> float:
    """Largest |noise| / scale that the sampler can give; in the grid form, up to which it is right.

    An accountant charges a delta for the missing tails; a Gaussian beyond 9.419 has mass 4.6e-21.
    The grid form of Laplace noise misses nothing, see `aadp_kernels.grid`.

    | form | gaussian | laplace |
    |---|---|---|
    | wide | 9.419 | 43.67 |
    | fast | 9.493 | 44.36 |
    | grid | 10 | inf |
    """
    _validate.one_of("mechanism", mechanism, MECHANISMS)
    _validate.one_of("form", form, FORMS)
    return CUTOFFS[mechanism, form]


def max_elements(rng: str, form: str = "wide") -> int:
    """Elements that one (step, client, layer) stream can serve.

    | form | ChaCha | Philox |
    |---|---|---|
    | wide | 2^35 | 2^33 |
    | fast | 2^36 | 2^34 |
    | grid | 2^32 | 2^30 |
    """
    _validate.one_of("form", form, FORMS)
    words_an_element = {"wide": 2, "fast": 1, "grid": 16}[form]
    return (1 << 32) * words_per_block(rng) // words_an_element


@eager
def sample_noise(
    shape: Sequence[int],
    *,
    mechanism: str,
    scale: float | Tensor,
    key: NoiseKey,
    step: int | Tensor,
    client: int | Tensor = 0,
    layer: int = 0,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    form: str = "wide",
    impl: str = "auto",
) -> Tensor:
    """Gaussian or Laplace noise that is a function of its address only.

    Equals `scale * torch.randn(shape)` or `Laplace(0, scale).sample(shape)` in distribution.

    Args:
        shape: Shape of the result. With a tensor of clients, [K, ...].
        mechanism: "gaussian" or "laplace".
        scale: Standard deviation (gaussian) or b (laplace), public, >= 0 and finite; a tensor is
            broadcast to `shape`.
        key: Secret key.
        step: Step or round, in [0, 2^32), public; also a 0-d int64 tensor.
        client: Client id in [0, 2^32), or int64 [K]: row k then uses client[k].
        layer: Layer index, in [0, 2^24).
        offset: Index of the first element of the result (of a row, with a tensor of clients).
        dtype: Floating dtype of the result; int64 (grid form only) gives counts of quanta.
        device: Device of the result; the noise has the same bits on all of them.
        form: "wide" (64 bits an element, float64), "fast" (32 bits an element; numba and triton
            compute it in float32) or "grid" (float-safe: integers, see `aadp_kernels.grid`).
        impl: "torch" (the specification), "numba" (CPU only, faster), "triton" (GPU) or "auto":
            the fastest that is installed, has the form and pays.

    Returns:
        Noise, `dtype` [shape].

    Raises:
        ValueError: A scale that is negative or not finite, an address out of range, a shape that
            does not begin with K, an `impl` that is unknown, cannot run here or lacks
            the form.
        ReusedNoiseError: Noise that this key object has drawn before, see `NoiseKey`.

    Guarantees:
        Element i of the flattened result (of the row) depends on (key, step, client, layer,
        offset + i) only: neither on the shape nor on the split of a call. |noise| <=
        tail_cutoff(mechanism, form) * scale. The wide form is computed in float64 and rounded once
        to `dtype`, with the same bits in every implementation. Implementations of the fast form
        agree to scale * 2^-18 * (1 + |noise| / scale) and 4 ulp of `dtype`.

    Edge cases:
        | case | result |
        |---|---|
        | scale 0 | exactly zero |
        | empty shape, K = 0 | empty |

    Reference:
        Box and Muller 1958; Salmon et al. 2011 (counter-based generators); RFC 8439 (ChaCha20).
    """
    _validate.one_of("mechanism", mechanism, MECHANISMS)
    _validate.one_of("form", form, FORMS)
    shape = torch.Size(shape)
    place = torch.device(device) if device is not None else _scale_device(scale)
    cohort = isinstance(client, Tensor) and client.dim() == 1
    clients = _validate.client_ids(client, place)
    if cohort and (not shape or shape[0] != len(clients)):
        raise ValueError(f"shape must begin with {len(clients)} clients, got {tuple(shape)}")
    count = torch.Size(shape[1:] if cohort else shape).numel()
    if not (dtype.is_floating_point or (form == "grid" and dtype == torch.int64)):
        raise ValueError(f"dtype must be floating point (or int64 with form='grid'), got {dtype}")
    step, layer = check_address(key, step=step), _validate.integer_below("layer", layer, _MAX_LAYER)
    backend = _dispatch.backend(impl, "noise", device=place, elements=count, form=form)
    offset = _validate.integer_below("offset", offset, max_elements(key.rng, form) - count + 1)
    if isinstance(scale, Tensor):
        _validate.nonnegative_tensor("scale", scale, finite=True)
        scale = scale.to(device=place, dtype=torch.float64).expand(shape)
        nothing = shape.numel() == 0
    else:
        scale = _validate.finite_nonnegative("scale", scale)
        nothing = shape.numel() == 0 or scale == 0
    if nothing:
        return torch.zeros(shape, dtype=dtype, device=place)
    segment = (layer, offset, count)
    claim(key, mechanism, form, step, client, [segment])
    if isinstance(scale, Tensor):
        scale = scale.reshape(-1, count)
    noise = Noise(key.rng, key.words, mechanism, form, step, clients)
    return backend.scaled_noise(noise, segment, scale, dtype).reshape(shape)


@eager
def poisson_mask(
    n: int,
    rate: float | Sequence[float],
    *,
    key: NoiseKey,
    step: int | Tensor,
    client: int | Tensor = 0,
    device: torch.device | str | None = None,
    impl: str = "auto",
) -> Tensor:
    """Independent coins for Poisson sampling, `torch.rand(n) < rate` in distribution.

    Args:
        n: Number of records, public.
        rate: Probability of True, in [0, 1], public; with a tensor of clients also one for each.
        key: Secret key: who knows the coins has no amplification to fear.
        step: Step in [0, 2^32); also a 0-d int64 tensor.
        client: Client id in [0, 2^32), or int64 [K].
        device: Device of the result.
        impl: As for `sample_noise`.

    Returns:
        bool [n], or [K, n] for a tensor of clients. Private.

    Raises:
        ValueError: A rate outside [0, 1], an address out of range, an `impl` that is unknown or
            cannot run here.

    Guarantees:
        Coin i depends on (key, step, client, i) only; P(True) differs from the rate by at most
        2^-63; the coins share no random bits with any noise under the same key.

    Edge cases:
        Rate 0 gives no True, rate 1 gives all True, n = 0 gives an empty mask.
    """
    place = torch.device(device) if device is not None else torch.device("cpu")
    n = _validate.integer_below("n", n, max_elements(key.rng))
    clients = _validate.client_ids(client, place)
    step = check_address(key, step=step)
    backend = _dispatch.backend(impl, "coins", device=place, elements=n)
    rates = list(rate) if isinstance(rate, Sequence) else [float(rate)] * len(clients)
    if len(rates) != len(clients):
        raise ValueError(f"rate must be one for each of {len(clients)} clients, got {len(rates)}")
    for value in rates:
        if not 0 <= value <= 1:
            raise ValueError(f"rate must be in [0, 1], got {value!r}")
    cohort = isinstance(client, Tensor) and client.dim() == 1
    if n == 0 or len(clients) == 0:
        return torch.zeros((len(clients), n) if cohort else (n,), dtype=torch.bool, device=place)
    noise = Noise(key.rng, key.words, "coins", "wide", step, clients)
    mask = backend.coins(noise, n, rates)
    return mask if cohort else mask[0]


def check_address(key: NoiseKey, *, step: int | Tensor) -> int | Tensor:
    """The step, or an error unless the key is a key and the step fits its field.

    A step that lies on an accelerator is not read.
    """
    if not isinstance(key, NoiseKey):
        raise ValueError(f"key must be a NoiseKey, got {type(key).__name__}")
    if isinstance(step, Tensor):
        if step.dim() or step.dtype != torch.int64:
            raise ValueError(f"step must be 0-d int64, got {step.dtype} {tuple(step.shape)}")
        if step.device.type != "cpu":
            return step
        step = int(step)
    return _validate.integer_below("step", step, _MAX_STEP)


def claim(
    key: NoiseKey,
    mechanism: str,
    form: str,
    step: int | Tensor,
    client: int | Tensor,
    segments: Sequence[Segment],
) -> None:
    """Note what a release draws, before it is drawn; a ReusedNoiseError if it was drawn before.

    Nothing is read from an accelerator.
    """
    if isinstance(step, Tensor):
        return
    if not isinstance(client, Tensor):
        clients = [client.__index__()]
    elif client.is_cpu:
        clients = client.reshape(-1).tolist()
    else:
        return
    key._used.claim(f"{form} {mechanism}", step, clients, segments)


def _scale_device(scale: float | Tensor) -> torch.device:
    """Noise lies where its scale lies, by default."""
    return scale.device if isinstance(scale, Tensor) else torch.device("cpu")
