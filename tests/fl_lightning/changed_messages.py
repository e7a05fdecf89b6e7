"""Messages of secure sums that were changed on the way."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fl_lightning.deploy.policy import Refused
from fl_lightning.deploy.secure_sum.messages import number_bytes
from fl_lightning.deploy.secure_sum.server import SumServer
from tests.fl_lightning.secure_sums import IDENTITIES, STAGES, Members, terms_of, up_to

Message = dict[str, Any]
TERMS = terms_of(5, shares=2, corrupt=1)  # 4 of 5 must be there


def at(
    stage: str, silent_at: dict[int, str] | None = None
) -> tuple[Members, SumServer, dict[int, Message]]:
    group, server = Members(TERMS, silent_at), SumServer(TERMS)
    return group, server, up_to(group, server.begin(), server, stage)


def refuses(group: Members, number: int, message: Message, words: str) -> None:
    """The member refuses; nothing was added or written after, and it answers nothing any more."""
    did = list(group.numbers[number].did)
    with pytest.raises(Refused, match=words):
        group.answer(number, message)
    assert group.numbers[number].did == did
    assert group.clients[number]._secrets is None
    for stage in STAGES:
        with pytest.raises(Refused, match="out of turn"):
            group.answer(number, {**message, "do": stage})
    assert group.numbers[number].did == did


def signed_keys(number: int, seal: bytes, mask: bytes, terms: Any = TERMS) -> list[str]:
    signature = IDENTITIES[number].sign("keys", terms.digest, number_bytes(number), seal, mask)
    return [seal.hex(), mask.hex(), signature.hex()]


def fresh() -> bytes:
    return X25519PrivateKey.generate().public_key().public_bytes_raw()
