"""Parts of the messages of a secure sum: numbers, keys and what survivors sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fl_lightning.deploy.policy import Refused
from fl_lightning.deploy.secure_sum.keys import KEY_BYTES, digest, joined, signed_by
from fl_lightning.deploy.secure_sum.terms import SumTerms

# Member → sealing key, mask key (public) and the signature under both.
KeyList = dict[int, tuple[bytes, bytes, bytes]]


def number_bytes(number: int) -> bytes:
    """A member's number as eight bytes."""
    return number.to_bytes(8, "big")


def members_of(found: Any, terms: SumTerms) -> list[int]:
    """A list of members' numbers, ascending.

    Raises:
        Refused: it is none.
    """
    if not isinstance(found, list) or not all(type(k) is int for k in found):
        raise Refused("sum: a list of members cannot be read")
    if found != sorted(set(found)) or not all(0 <= k < len(terms.members) for k in found):
        raise Refused("sum: a list of members has others than members, or is not ascending")
    return found


def bytes_by_number(found: Any, terms: SumTerms) -> dict[int, bytes]:
    """Member → bytes, of an object with hex digits.

    Raises:
        Refused: it is none.
    """
    try:
        read = {int(k): bytes.fromhex(v) for k, v in found.items()}
        exact = all(str(int(k)) == k for k in found)
    except (AttributeError, TypeError, ValueError) as error:
        raise Refused("sum: an object of hex digits by member cannot be read") from error
    if not exact or not all(0 <= k < len(terms.members) for k in read):
        raise Refused("sum: an object by member has others than members")
    return dict(sorted(read.items()))


def parse_keys(found: Any, terms: SumTerms) -> KeyList:
    """The keys of a message.

    Raises:
        Refused: they cannot be read.
    """
    if not isinstance(found, dict):
        raise Refused("sum: the keys cannot be read")
    parts = [bytes_by_number({k: _part(v, i) for k, v in found.items()}, terms) for i in range(3)]
    return {k: (parts[0][k], parts[1][k], parts[2][k]) for k in parts[0]}


def _part(value: Any, place: int) -> Any:
    if not isinstance(value, list) or len(value) != 3:
        raise Refused("sum: keys must be two keys and a signature")
    return value[place]


def keys_are_signed(
    terms: SumTerms, number: int, seal: bytes, mask: bytes, signature: bytes
) -> bool:
    """Whether a member signed these keys for these terms."""
    parts = (terms.digest, number_bytes(number), seal, mask)
    right = len(seal) == len(mask) == KEY_BYTES
    return right and signed_by(terms.members[number], signature, "keys", *parts)


def check_keys(keys: KeyList, terms: SumTerms) -> None:
    """Whether enough members are there, each with keys that it alone signed.

    Raises:
        Refused: naming the first that is not.
    """
    for number, (seal, mask, signature) in keys.items():
        if not keys_are_signed(terms, number, seal, mask, signature):
            raise Refused(f"sum: the keys of member {number} are not signed by it; given up")
    public = [key for seal, mask, _ in keys.values() for key in (seal, mask)]
    if len(set(public)) < len(public):
        raise Refused("sum: two keys are equal; given up")
    if len(keys) < terms.threshold:
        raise Refused(f"sum: keys of {len(keys)} members, {terms.threshold} are needed; given up")


def view_digest(
    terms: SumTerms, keys: KeyList, sharers: Sequence[int], survivors: Sequence[int]
) -> bytes:
    """What survivors sign: terms, keys, who shared its secrets and who survived, 32 bytes."""
    lists = (b"".join(map(number_bytes, numbers)) for numbers in (keys, sharers, survivors))
    return digest(b"view", terms.digest, joined(p for v in keys.values() for p in v[:2]), *lists)


def view_is_signed(terms: SumTerms, number: int, signature: bytes, view: bytes) -> bool:
    """Whether a member signed a view."""
    return signed_by(terms.members[number], signature, "survivors", view)
