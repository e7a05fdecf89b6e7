"""A node's part in one secure sum: five messages, each answered once and in their order.

Whatever a message lacks ends the node's part: what it holds is forgotten, and no later message of
this sum is answered. The keys are in memory alone, so a node that starts again has dropped out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor

from fl_lightning.deploy.policy import Refused
from fl_lightning.deploy.secure_sum import shamir
from fl_lightning.deploy.secure_sum.grid import as_words
from fl_lightning.deploy.secure_sum.keys import (
    KEY_BYTES,
    Identity,
    RoundKeys,
    agree,
    seal,
    unseal,
)
from fl_lightning.deploy.secure_sum.masks import add_mask
from fl_lightning.deploy.secure_sum.messages import (
    KeyList,
    bytes_by_number,
    check_keys,
    members_of,
    number_bytes,
    parse_keys,
    view_digest,
    view_is_signed,
)
from fl_lightning.deploy.secure_sum.terms import SumTerms
from fl_lightning.keys.digests import digest as digest_of
from fl_lightning.values.message import encode


class Contribution(Protocol):
    """What a node adds to a sum, and the line that it writes before."""

    def values(self) -> Tensor:
        """The node's noised update on the grid of the terms: int64 [size], private."""
        ...

    def write(self, digest: str) -> str:
        """Charge the sum and write it down, durably; raises where that cannot be.

        Args:
            digest: of the masked numbers that leave afterwards.

        Returns:
            The head of the node's ledger, public.
        """
        ...


@dataclass
class _Secrets:
    """What a node knows in one sum. Private."""

    keys: RoundKeys = field(default_factory=RoundKeys)
    own_mask: bytes = b""
    pair_masks: dict[int, tuple[bytes, int]] = field(default_factory=dict)
    own_shares: bytes = b""
    shares: dict[int, bytes] = field(default_factory=dict)


def _stage(before: str, after: str) -> Callable[[Callable[..., bytes]], Callable[..., bytes]]:
    """A message that is due at one stage; its failure ends the node's part."""

    def decorate(answer: Callable[..., bytes]) -> Callable[..., bytes]:
        @wraps(answer)
        def checked(self: SumClient, *message: Mapping[str, Any]) -> bytes:
            due, self._due = self._due, "nothing"
            try:
                if due != before:
                    raise Refused(f"sum: '{before}' is out of turn, '{due}' is due; given up")
                reply = answer(self, *message)
            except BaseException:
                self._secrets = None
                raise
            self._due = after
            return reply

        return checked

    return decorate


class SumClient:
    """One node in one sum.

    Args:
        identity: of the node.
        number: of the node among the members.
        terms: that its holder allows (`check_terms`).
        contribution: asked once, after all shares have come.

    Guarantees:
        Nothing depends on the contribution before its ledger line is on disk. Of each member this
        node reveals a share of the own mask or of the pairwise key, never both; and only for one
        set of survivors, which `terms.threshold` of the members have signed.
    """

    def __init__(
        self, identity: Identity, number: int, terms: SumTerms, contribution: Contribution
    ) -> None:
        self.terms = terms
        self._identity = identity
        self._number = number
        self._contribution = contribution
        self._due = "terms"
        self._secrets: _Secrets | None = None
        self._keys: KeyList = {}
        self._sharers: list[int] = []
        self._survivors: list[int] = []

    @_stage("terms", "keys")
    def advertise(self) -> bytes:
        """Fresh keys of this round, signed."""
        self._secrets = _Secrets()
        public = self._secrets.keys.public
        signature = self._identity.sign(
            "keys", self.terms.digest, number_bytes(self._number), *public
        )
        return encode({"did": "terms", "keys": [part.hex() for part in (*public, signature)]})

    @_stage("keys", "shares")
    def share(self, message: Mapping[str, Any]) -> bytes:
        """Shares of this node's secrets, one sealed for each member whose keys came.

        Args:
            message: `keys`: number → keys and signature, of all that are there.

        Raises:
            Refused: too few, a wrong signature, or others than this node's own keys under its name.
        """
        keys = parse_keys(message.get("keys"), self.terms)
        check_keys(keys, self.terms)
        secrets = self._known()
        if keys.get(self._number, (b"", b"", b""))[:2] != secrets.keys.public:
            raise Refused("sum: this node's keys are not among the keys; given up")
        self._keys = keys
        secrets.own_mask = os.urandom(KEY_BYTES)
        sealed = {}
        for number, data in self._split(secrets, sorted(keys)).items():
            if number == self._number:
                secrets.own_shares = data
                continue
            try:
                key, name = self._sealing_key(self._number, number)
                secrets.pair_masks[number] = pair_mask(
                    secrets.keys, keys[number][1], self.terms, self._number, number
                )
            except ValueError as error:
                raise Refused(f"sum: a key of member {number} is none; given up") from error
            sealed[str(number)] = seal(key, data, *name).hex()
        return encode({"did": "keys", "sealed": sealed})

    @_stage("shares", "survivors")
    def mask(self, message: Mapping[str, Any]) -> bytes:
        """The node's numbers under all its masks; its ledger line is on disk before.

        Args:
            message: `sealed`: number → the share that this member sealed for this node.

        Raises:
            Refused: too few, or a share that is not the member's; nothing is charged then.
        """
        secrets = self._known()
        sealed = bytes_by_number(message.get("sealed"), self.terms)
        self._sharers = sorted({*sealed, self._number})
        self._enough(self._sharers, of=sorted(self._keys), what="shares")
        if self._number in sealed:
            raise Refused("sum: shares of this node's own secrets came; given up")
        for number, data in sealed.items():
            secrets.shares[number] = self._opened(number, data)
        secrets.shares[self._number] = secrets.own_shares
        values = self._contribution.values()
        if values.shape != (self.terms.grid.size,) or values.dtype != torch.int64:
            raise RuntimeError("the contribution does not fit the terms")
        masked = values.clone()
        self._add_masks(masked, secrets)
        head = self._contribution.write(digest_of([self.terms.digest.hex(), masked]))
        return encode({"did": "shares", "head": head}, {"masked": masked})

    @_stage("survivors", "signatures")
    def confirm(self, message: Mapping[str, Any]) -> bytes:
        """A signature under the set of survivors; this node signs one set in a round.

        Args:
            message: `survivors`: numbers of those whose masked numbers came.

        Raises:
            Refused: too few, this node is not among them, or one that did not share its secrets.
        """
        self._survivors = members_of(message.get("survivors"), self.terms)
        self._enough(self._survivors, of=self._sharers, what="survivors")
        if self._number not in self._survivors:
            raise Refused("sum: this node is not among the survivors; given up")
        signature = self._identity.sign("survivors", self._view())
        return encode({"did": "survivors", "signature": signature.hex()})

    @_stage("signatures", "nothing")
    def reveal(self, message: Mapping[str, Any]) -> bytes:
        """One share of each member: of its own mask if it survived, else of its pairwise key.

        Args:
            message: `signatures`: number → signature under the survivors; `own_masks` and
                `pair_keys`: the members of whom either kind is asked.

        Raises:
            Refused: too few signatures, one that is wrong, or any other kind or number of shares.
        """
        signatures = bytes_by_number(message.get("signatures"), self.terms)
        self._enough(sorted(signatures), of=self._survivors, what="signatures")
        for number, signature in signatures.items():
            if not view_is_signed(self.terms, number, signature, self._view()):
                raise Refused(f"sum: member {number} signed another set of survivors; given up")
        asked = [members_of(message.get(n), self.terms) for n in ("own_masks", "pair_keys")]
        gone = [k for k in self._sharers if k not in self._survivors]
        if asked != [self._survivors, gone]:
            raise Refused("sum: other shares are asked for than the survivors need; given up")
        shares, size = self._known().shares, shamir.SHARE_BYTES
        self._secrets = None
        return encode(
            {
                "did": "signatures",
                "own_masks": {str(k): shares[k][:size].hex() for k in self._survivors},
                "pair_keys": {str(k): shares[k][size:].hex() for k in gone},
            }
        )

    # ---------------------------------------------------------------------------------------------

    def _known(self) -> _Secrets:
        assert self._secrets is not None
        return self._secrets

    def _enough(self, found: Sequence[int], *, of: Sequence[int], what: str) -> None:
        if not set(found) <= set(of):
            raise Refused(f"sum: {what} of members that were not there before; given up")
        if len(found) < self.terms.threshold:
            least = self.terms.threshold
            raise Refused(f"sum: {what} of {len(found)} members, {least} are needed; given up")

    def _view(self) -> bytes:
        return view_digest(self.terms, self._keys, self._sharers, self._survivors)

    def _split(self, secrets: _Secrets, members: Sequence[int]) -> dict[int, bytes]:
        """Shares of own mask and pairwise key by member."""
        points = [number + 1 for number in members]
        both = [
            shamir.split(int.from_bytes(secret, "big"), self.terms.threshold, points)
            for secret in (secrets.own_mask, secrets.keys.mask.private_bytes_raw())
        ]
        return {k: b"".join(shamir.to_bytes(shares[k + 1]) for shares in both) for k in members}

    def _sealing_key(self, source: int, target: int) -> tuple[bytes, tuple[bytes, ...]]:
        """The key for what one member seals for another, and what the sealed data is bound to."""
        name = (self.terms.digest, number_bytes(source), number_bytes(target))
        other = target if source == self._number else source
        return agree(self._known().keys.seal, self._keys[other][0], "share", *name), name

    def _opened(self, number: int, data: bytes) -> bytes:
        key, name = self._sealing_key(number, self._number)
        try:
            opened = unseal(key, data, *name)
            half = shamir.SHARE_BYTES
            for share in (opened[:half], opened[half:]):
                shamir.from_bytes(share)
        except ValueError as error:
            raise Refused(f"sum: the share of member {number} is not its own; given up") from error
        return opened

    def _add_masks(self, masked: Tensor, secrets: _Secrets) -> None:
        words = as_words(masked)
        add_mask(words, secrets.own_mask, sign=1)
        for other in self._sharers:
            if other != self._number:
                seed, sign = secrets.pair_masks[other]
                add_mask(words, seed, sign=sign)


def pair_mask(
    keys: RoundKeys, public: bytes, terms: SumTerms, own: int, other: int
) -> tuple[bytes, int]:
    """Seed of the mask that two members share, and the sign with which `own` adds it.

    Args:
        keys: of `own`.
        public: mask key of `other`.
        terms: of the sum.
        own, other: their numbers.
    """
    ends = [number_bytes(number) for number in sorted((own, other))]
    seed = agree(keys.mask, public, "mask", terms.digest, *ends)
    return seed, 1 if own < other else -1
