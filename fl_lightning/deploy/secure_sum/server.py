"""The server's part in one secure sum: who is asked what, and the sum that is left in the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from torch import Tensor

from fl_lightning.deploy.secure_sum import shamir
from fl_lightning.deploy.secure_sum.client import pair_mask
from fl_lightning.deploy.secure_sum.grid import as_words
from fl_lightning.deploy.secure_sum.keys import RoundKeys, public_of
from fl_lightning.deploy.secure_sum.masks import add_mask
from fl_lightning.deploy.secure_sum.messages import (
    KeyList,
    bytes_by_number,
    keys_are_signed,
    parse_keys,
    view_digest,
    view_is_signed,
)
from fl_lightning.deploy.secure_sum.terms import SumTerms, head_of
from fl_lightning.values.message import decode, encode

_LOG = logging.getLogger("fl_lightning.deploy")
# Sends messages by member, and returns the answers that came in time.
Ask = Callable[[Mapping[int, bytes]], Mapping[int, bytes]]


class GivenUp(RuntimeError):
    """A sum that was not finished: the server learnt none. What nodes charged stays charged."""


class SumServer:
    """One sum, from terms to total: `run`, or its stages one by one.

    Each stage takes the answers to the requests of the stage before, and makes the next requests.
    A member whose answer is missing, or wrong as far as the server can tell, has dropped out.

    Args:
        terms: of the sum.
        words, tensors: what else the members need, sent with the terms to each; by member.
    """

    def __init__(
        self,
        terms: SumTerms,
        words: Callable[[int], Mapping[str, Any]] = lambda member: {},
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.terms = terms
        self._words = words
        self._tensors = tensors
        self.survivors: list[int] = []
        self.heads: dict[int, str] = {}  # of the members' ledgers, as they say
        self._keys: KeyList = {}
        self._sharers: list[int] = []
        self._asked = False
        self._total = torch.zeros(terms.grid.size, dtype=torch.int64)

    def run(self, ask: Ask) -> Tensor:
        """The sum of the survivors' numbers: int64 [size].

        Raises:
            GivenUp: fewer than `terms.threshold` members are left at a stage.
        """
        requests = self.begin()
        for stage in (self.keys, self.shares, self.masked, self.signatures):
            requests = stage(ask(requests))
        return self.total(ask(requests))

    @property
    def charged(self) -> list[int]:
        """Members that may have charged the sum: they were asked for masked numbers."""
        return list(self._sharers) if self._asked else []

    def begin(self) -> dict[int, bytes]:
        """The terms, for every member."""
        head = {"do": "sum-terms", "terms": head_of(self.terms)}
        members = range(len(self.terms.members))
        return {k: encode({**head, **self._words(k)}, self._tensors) for k in members}

    def keys(self, answers: Mapping[int, bytes]) -> dict[int, bytes]:
        """Keys of the members, handed on to all of them."""

        def keys_of(number: int, head: dict[str, Any], _: dict[str, Tensor]) -> None:
            (found,) = parse_keys({str(number): head["keys"]}, self.terms).values()
            if not keys_are_signed(self.terms, number, *found):
                raise ValueError("its keys are not signed by it")
            self._keys[number] = found

        self._take(answers, range(len(self.terms.members)), keys_of)
        self._enough(self._keys, "sent keys")
        self._keys = dict(sorted(self._keys.items()))
        keys = {str(k): [part.hex() for part in parts] for k, parts in self._keys.items()}
        return self._requests("sum-keys", self._keys, keys=keys)

    def shares(self, answers: Mapping[int, bytes]) -> dict[int, bytes]:
        """Sealed shares, each handed on to the member it is for."""
        sealed: dict[int, dict[str, str]] = {k: {} for k in self._keys}

        def shares_of(number: int, head: dict[str, Any], _: dict[str, Tensor]) -> None:
            found = bytes_by_number(head["sealed"], self.terms)
            if {*found, number} != set(self._keys):
                raise ValueError("its shares are for others")
            for other, data in found.items():
                sealed[other][str(number)] = data.hex()
            self._sharers.append(number)

        self._take(answers, self._keys, shares_of)
        self._enough(self._sharers, "shared their secrets")
        self._asked = True
        head = {"do": "sum-shares", **self._name()}
        return {k: encode({**head, "sealed": sealed[k]}) for k in self._sharers}

    def masked(self, answers: Mapping[int, bytes]) -> dict[int, bytes]:
        """Masked numbers are added up; the members hear whose."""

        def add(number: int, head: dict[str, Any], tensors: dict[str, Tensor]) -> None:
            found = tensors["masked"]
            if found.dtype != torch.int64 or found.shape != self._total.shape:
                raise ValueError("its numbers do not fit the terms")
            self._total += found
            self.survivors.append(number)
            self.heads[number] = str(head.get("head", ""))[:64]

        self._take(answers, self._sharers, add)
        self._enough(self.survivors, "sent masked numbers")
        return self._requests("sum-survivors", self.survivors, survivors=self.survivors)

    def signatures(self, answers: Mapping[int, bytes]) -> dict[int, bytes]:
        """Signatures under the survivors, handed on with the request for one kind of shares."""
        view = view_digest(self.terms, self._keys, self._sharers, self.survivors)
        signatures: dict[int, str] = {}

        def signature_of(number: int, head: dict[str, Any], _: dict[str, Tensor]) -> None:
            found = bytes.fromhex(head["signature"])
            if not view_is_signed(self.terms, number, found, view):
                raise ValueError("it signed something else")
            signatures[number] = found.hex()

        self._take(answers, self.survivors, signature_of)
        self._enough(signatures, "signed the survivors")
        return self._requests(
            "sum-signatures",
            signatures,
            signatures={str(k): s for k, s in signatures.items()},
            own_masks=self.survivors,
            pair_keys=self._gone,
        )

    def total(self, answers: Mapping[int, bytes]) -> Tensor:
        """Masks are taken off: the sum of the survivors' numbers, int64 [size].

        Raises:
            GivenUp: too few shares, or shares of something else.
        """
        shares: dict[int, dict[int, int]] = {k: {} for k in self._sharers}

        def shares_of(number: int, head: dict[str, Any], _: dict[str, Tensor]) -> None:
            own, pair = (
                bytes_by_number(head[name], self.terms) for name in ("own_masks", "pair_keys")
            )
            if [*own] != self.survivors or [*pair] != self._gone:
                raise ValueError("it revealed other shares")
            found = {k: shamir.from_bytes(data) for k, data in (own | pair).items()}
            for member, share in found.items():
                shares[member][number + 1] = share
            revealed.append(number + 1)

        revealed: list[int] = []
        self._take(answers, self.survivors, shares_of)
        self._enough(revealed, "revealed shares")
        weights = shamir.weights_at_zero(revealed[: self.terms.threshold])
        secrets = {k: shamir.combine(found, weights) for k, found in shares.items()}
        self._unmask({k: _as_seed(secret) for k, secret in secrets.items()})
        if not self.terms.grid.holds(self._total, len(self.survivors)):
            raise GivenUp("the sum cannot be one: a member's numbers or shares were wrong")
        return self._total

    # ---------------------------------------------------------------------------------------------

    @property
    def _gone(self) -> list[int]:
        return [k for k in self._sharers if k not in self.survivors]

    def _unmask(self, secrets: Mapping[int, bytes]) -> None:
        words = as_words(self._total)
        for number in self.survivors:
            add_mask(words, secrets[number], sign=-1)
        for gone in self._gone:
            if public_of(secrets[gone]) != self._keys[gone][1]:
                raise GivenUp(f"the shares of member {gone}'s key are not of its key")
            keys = RoundKeys(mask=X25519PrivateKey.from_private_bytes(secrets[gone]))
            for number in self.survivors:
                seed, sign = pair_mask(keys, self._keys[number][1], self.terms, gone, number)
                # The survivor added it with the other sign.
                add_mask(words, seed, sign=sign)

    def _take(
        self,
        answers: Mapping[int, bytes],
        asked: Any,
        take: Callable[[int, dict[str, Any], dict[str, Tensor]], None],
    ) -> None:
        """Read the answers of those that were asked; who answers wrongly is left out."""
        for number in [k for k in asked if k in answers]:
            try:
                head, tensors = decode(answers[number])
                if "refused" in head:
                    raise ValueError(f"it refuses: {head['refused']}")
                take(number, head, tensors)
            except (ValueError, KeyError, TypeError) as error:
                _LOG.warning("sum %d: member %d drops out: %s", self.terms.round, number, error)

    def _enough(self, found: Any, did: str) -> None:
        if len(found) < self.terms.threshold:
            least = self.terms.threshold
            raise GivenUp(f"{len(found)} members {did}, {least} are needed")

    def _name(self) -> dict[str, Any]:
        return {"run": self.terms.run, "round": self.terms.round}

    def _requests(self, do: str, members: Any, **what: Any) -> dict[int, bytes]:
        return dict.fromkeys(members, encode({"do": do, **self._name(), **what}))


def _as_seed(secret: int) -> bytes:
    if secret >= 2**256:
        raise GivenUp("the shares are of no secret")
    return secret.to_bytes(32, "big")
