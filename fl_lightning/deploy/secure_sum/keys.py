"""Keys of a secure sum: a long-term identity that signs, and keys of one round that agree.

Every signature and every agreed key names its purpose and the digest of the round's terms, so that
nothing made for one purpose or round serves another.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_DOMAIN = b"aadp-fl secure sum 1"
_ONE_USE = bytes(12)  # nonce of a key that seals one message
KEY_BYTES = 32


def joined(parts: Iterable[bytes]) -> bytes:
    """Parts with their lengths: no two lists of parts give the same bytes."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def digest(*parts: bytes) -> bytes:
    """SHA-256 of some parts, 32 bytes."""
    return hashlib.sha256(joined([_DOMAIN, *parts])).digest()


@dataclass(frozen=True)
class Identity:
    """A node's long-term key (Ed25519); others know it by `name`.

    Args:
        private: secret.
    """

    private: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def new(cls) -> Identity:
        """A fresh one."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def kept_in(cls, path: Path) -> Identity:
        """The identity in a file of 32 bytes, mode 600; a fresh one where there is none.

        Raises:
            ValueError: others can read the file, or it holds no key.
        """
        if not path.exists():
            made = cls.new()
            partial = path.with_name(path.name + ".partial")
            partial.unlink(missing_ok=True)
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(made.private.private_bytes_raw())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        if path.stat().st_mode & 0o077:
            raise ValueError(f"identity={path}: others can read it; chmod 600 it")
        return cls(Ed25519PrivateKey.from_private_bytes(path.read_bytes()))

    @property
    def name(self) -> str:
        """The public key, 64 hex digits."""
        return self.private.public_key().public_bytes_raw().hex()

    def sign(self, purpose: str, *parts: bytes) -> bytes:
        """Signature of some parts for a purpose, 64 bytes."""
        return self.private.sign(joined([_DOMAIN, purpose.encode(), *parts]))


def signed_by(name: str, signature: bytes, purpose: str, *parts: bytes) -> bool:
    """Whether the identity `name` signed these parts for this purpose."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(name))
        key.verify(signature, joined([_DOMAIN, purpose.encode(), *parts]))
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True)
class RoundKeys:
    """A node's keys of one round (X25519): one seals shares, the other agrees on masks. Secret."""

    seal: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate, repr=False)
    mask: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate, repr=False)

    @property
    def public(self) -> tuple[bytes, bytes]:
        """Public keys for sealing and for masks, 32 bytes each."""
        seal, mask = (key.public_key().public_bytes_raw() for key in (self.seal, self.mask))
        return seal, mask


def public_of(mask: bytes) -> bytes:
    """The public key of a private X25519 key, 32 bytes each."""
    return X25519PrivateKey.from_private_bytes(mask).public_key().public_bytes_raw()


def agree(private: X25519PrivateKey, public: bytes, purpose: str, *parts: bytes) -> bytes:
    """A key that two nodes have in common, for one purpose: 32 bytes.

    Args:
        private: of one of them.
        public: of the other, 32 bytes.
        purpose: what the key is for.
        parts: the terms and whose key it is; both nodes give the same.

    Raises:
        ValueError: the public key is none, or of small order: anybody would know the result.
    """
    shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    ends = sorted([private.public_key().public_bytes_raw(), public])
    info = joined([_DOMAIN, purpose.encode(), *ends, *parts])
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(shared)


def seal(key: bytes, data: bytes, *parts: bytes) -> bytes:
    """Data that only holders of the key can read or make; a key seals once."""
    return ChaCha20Poly1305(key).encrypt(_ONE_USE, data, joined(parts))


def unseal(key: bytes, sealed: bytes, *parts: bytes) -> bytes:
    """The data that `seal` sealed.

    Raises:
        ValueError: it was sealed with another key or for other parts, or changed.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(_ONE_USE, sealed, joined(parts))
    except InvalidTag as error:
        raise ValueError(
            "a sealed share cannot be opened: it was changed or is not ours"
        ) from error
