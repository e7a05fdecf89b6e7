"""What a member of a secure sum refuses: each ends its part before anything is revealed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fl_lightning.deploy.policy import Refused
from fl_lightning.deploy.secure_sum.messages import number_bytes
from fl_lightning.deploy.secure_sum.server import SumServer
from fl_lightning.keys.digests import digest as digest_of
from fl_lightning.ledger import LedgerError
from fl_lightning.values.message import decode
from tests.fl_lightning.changed_messages import TERMS, at, fresh, refuses, signed_keys
from tests.fl_lightning.secure_sums import IDENTITIES, Members, terms_of, up_to

pytest.importorskip("cryptography")


# --- keys ---


def swapped(keys: dict[str, list[str]]) -> None:
    keys["1"] = [fresh().hex(), *keys["1"][1:]]


def changed_mask_key(keys: dict[str, list[str]]) -> None:
    keys["1"][1] = fresh().hex()


def signed_by_another(keys: dict[str, list[str]]) -> None:
    seal, mask = fresh(), fresh()
    signature = IDENTITIES[7].sign("keys", TERMS.digest, number_bytes(1), seal, mask)
    keys["1"] = [seal.hex(), mask.hex(), signature.hex()]


def of_another_round(keys: dict[str, list[str]]) -> None:
    keys["1"] = signed_keys(1, fresh(), fresh(), terms_of(5, shares=2, corrupt=1, round=1))


def of_another_member(keys: dict[str, list[str]]) -> None:
    keys["1"] = keys["2"]


def own_keys_changed(keys: dict[str, list[str]]) -> None:
    keys["0"] = signed_keys(0, fresh(), fresh())


def own_keys_left_out(keys: dict[str, list[str]]) -> None:
    del keys["0"]


def too_few(keys: dict[str, list[str]]) -> None:
    del keys["1"], keys["2"]


def equal_keys(keys: dict[str, list[str]]) -> None:
    keys["1"] = signed_keys(1, bytes.fromhex(keys["2"][0]), fresh())


def key_that_is_none(keys: dict[str, list[str]]) -> None:
    keys["1"] = signed_keys(1, fresh(), bytes(32))


def sealing_key_that_is_none(keys: dict[str, list[str]]) -> None:
    keys["1"] = signed_keys(1, bytes(32), fresh())


def short_key(keys: dict[str, list[str]]) -> None:
    keys["1"] = signed_keys(1, fresh()[:31], fresh())


def stranger(keys: dict[str, list[str]]) -> None:
    keys["5"] = keys["1"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swapped, "keys of member 1 are not signed by it"),
        (changed_mask_key, "keys of member 1 are not signed by it"),
        (signed_by_another, "keys of member 1 are not signed by it"),
        (of_another_round, "keys of member 1 are not signed by it"),
        (of_another_member, "keys of member 1 are not signed by it"),
        (short_key, "keys of member 1 are not signed by it"),
        (own_keys_changed, "this node's keys are not among the keys"),
        (own_keys_left_out, "this node's keys are not among the keys"),
        (too_few, "keys of 3 members, 4 are needed"),
        (equal_keys, "two keys are equal"),
        (key_that_is_none, "a key of member 1 is none"),
        (sealing_key_that_is_none, "a key of member 1 is none"),
        (stranger, "others than members"),
    ],
)
def test_keys_that_are_refused(change: Callable[[dict], None], words: str) -> None:
    group, _, requests = at("sum-keys")
    change(requests[0]["keys"])
    refuses(group, 0, requests[0], words)
    assert group.numbers[0].did == []


# --- shares ---


def test_shares_that_were_changed_or_are_of_others_are_refused_before_anything_is_charged() -> None:
    for change in ("bit", "swap", "self", "few", "stranger", "silent"):
        group, _, requests = at("sum-shares", {4: "sum-keys"} if change == "silent" else None)
        sealed = requests[0]["sealed"]
        words = "the share of member 1 is not its own"
        if change == "bit":
            sealed["1"] = f"{int(sealed['1'][0], 16) ^ 1:x}" + sealed["1"][1:]
        elif change == "swap":
            sealed["1"], sealed["2"] = sealed["2"], sealed["1"]
        elif change == "self":
            sealed["0"], words = sealed["1"], "shares of this node's own secrets"
        elif change == "few":
            del sealed["1"], sealed["2"]
            words = "shares of 3 members, 4 are needed"
        elif change == "stranger":
            sealed["9"], words = sealed["1"], "others than members"
        else:
            # One that never sent keys cannot have shared.
            group, server = Members(TERMS, {4: "sum-terms"}), SumServer(TERMS)
            requests = up_to(group, server.begin(), server, "sum-shares")
            requests[0]["sealed"]["4"] = requests[0]["sealed"]["1"]
            words = "shares of members that were not there before"
        refuses(group, 0, requests[0], words)
        assert group.numbers[0].did == []


def test_a_line_that_cannot_be_written_keeps_the_numbers_back() -> None:
    group, _, requests = at("sum-shares")

    def write(digest: str) -> None:
        raise LedgerError("full")

    group.numbers[0].write = write
    with pytest.raises(LedgerError):
        group.answer(0, requests[0])
    with pytest.raises(Refused, match="out of turn"):
        group.answer(0, requests[0])


def test_the_line_names_what_leaves() -> None:
    group, _, requests = at("sum-shares")
    one, other = (group.answer(k, requests[k]) for k in (0, 1))
    lines = [group.numbers[k].did for k in (0, 1)]
    assert [did[0] for did in lines] == ["values", "values"]
    assert len(lines[0]) == 2
    for did, answer in zip(lines, (one, other), strict=True):
        masked = decode(answer)[1]["masked"]
        assert did[1] == f"write {digest_of([TERMS.digest.hex(), masked])}"


# --- survivors ---


@pytest.mark.parametrize(
    ("survivors", "words"),
    [
        ([0, 1, 2], "survivors of 3 members, 4 are needed"),
        ([1, 2, 3, 4], "this node is not among the survivors"),
        ([0, 1, 2, 3, 5], "others than members"),
        ([0, 1, 2, 3, 3], "not ascending"),
        ([1, 0, 2, 3], "not ascending"),
        ([0, 1, 2, True], "cannot be read"),
        ("0123", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_survivors_that_are_refused(survivors: Any, words: str) -> None:
    group, _, requests = at("sum-survivors")
    refuses(group, 0, {**requests[0], "survivors": survivors}, words)


def test_a_survivor_that_shared_nothing_is_refused() -> None:
    group, _, requests = at("sum-survivors", {4: "sum-keys"})
    refuses(group, 0, {**requests[0], "survivors": [0, 1, 2, 3, 4]}, "were not there before")


def test_a_second_set_of_survivors_is_refused() -> None:
    group, _, requests = at("sum-survivors")
    group.answer(0, requests[0])
    refuses(group, 0, {**requests[0], "survivors": [0, 1, 2, 3]}, "out of turn")


def test_survivors_shown_differently_to_two_members_are_found_before_anything_is_revealed() -> None:
    """The attack on one round of consent: member 3 is alive to some and gone to others."""
    group, _, requests = at("sum-survivors")
    whole, without = [0, 1, 2, 3, 4], [0, 1, 2, 4]
    shown = {0: whole, 1: whole, 2: without, 3: whole, 4: whole}
    signatures = {
        str(k): decode(group.answer(k, {**requests[k], "survivors": shown[k]}))[0]["signature"]
        for k in range(5)
    }
    message = {"do": "sum-signatures", "signatures": signatures}
    message |= {"own_masks": whole, "pair_keys": []}
    refuses(group, 0, message, "member 2 signed another set of survivors")
    message |= {"own_masks": without, "pair_keys": [3]}
    refuses(group, 2, message, "signatures of members that were not there before")
    del message["signatures"]["3"]
    group, _, requests = at("sum-survivors")
    group.answer(2, {**requests[2], "survivors": without})
    refuses(group, 2, message, "member 0 signed another set of survivors")
