"""What a member of a secure sum refuses: each ends its part before anything is revealed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("cryptography")

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fl_lightning.deploy.policy import Refused
from fl_lightning.deploy.secure_sum.messages import number_bytes, view_digest
from fl_lightning.deploy.secure_sum.node import SumActions
from fl_lightning.deploy.secure_sum.policy import SumPolicy
from fl_lightning.deploy.secure_sum.server import GivenUp, SumServer
from fl_lightning.deploy.secure_sum.terms import head_of
from fl_lightning.keys.digests import digest as digest_of
from fl_lightning.ledger import LedgerError
from fl_lightning.values.message import decode, encode
from tests.fl_lightning.secure_sums import IDENTITIES, STAGES, Members, Numbers, terms_of, up_to

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


# --- signatures, and what is asked ---


def at_reveal() -> tuple[Members, Message]:
    """Member 4 shared its secrets and sent no numbers."""
    group, _, requests = at("sum-signatures", {4: "sum-shares"})
    assert requests[0]["own_masks"] == [0, 1, 2, 3]
    assert requests[0]["pair_keys"] == [4]
    return group, requests[0]


@pytest.mark.parametrize(
    ("own_masks", "pair_keys"),
    [
        ([0, 1, 2, 3], [3, 4]),
        ([0, 1, 2, 3, 4], [4]),
        ([0, 1, 2, 3, 4], []),
        ([0, 1, 2], [3, 4]),
        ([0, 1, 2], [4]),
        ([0, 1, 2, 3], []),
        ([], [0, 1, 2, 3, 4]),
        ([4], [0, 1, 2, 3]),
    ],
)
def test_other_kinds_of_shares_are_not_revealed(own_masks: list[int], pair_keys: list[int]) -> None:
    group, message = at_reveal()
    asked = {"own_masks": own_masks, "pair_keys": pair_keys}
    refuses(group, 0, message | asked, "other shares are asked for")


def test_signatures_that_are_refused() -> None:
    group, message = at_reveal()
    del message["signatures"]["1"]
    refuses(group, 0, message, "signatures of 3 members, 4 are needed")
    group, message = at_reveal()
    message["signatures"]["1"] = message["signatures"]["2"]
    refuses(group, 0, message, "member 1 signed another set of survivors")
    group, message = at_reveal()
    message["signatures"]["1"] = (b"\0" * 64).hex()
    refuses(group, 0, message, "member 1 signed another set of survivors")


@pytest.mark.parametrize("what", ["terms", "keys", "sharers", "survivors"])
def test_survivors_sign_everything_that_a_server_could_show_differently(what: str) -> None:
    group, _, _ = at("sum-signatures")
    client = group.clients[0]
    seen = [client.terms, client._keys, client._sharers, client._survivors]
    other = [
        terms_of(5, shares=2, corrupt=1, round=9),
        {**client._keys, 1: (b"x" * 32, *client._keys[1][1:])},
        [0, 1, 2, 3],
        [0, 1, 2, 4],
    ]
    changed = list(seen)
    place = ["terms", "keys", "sharers", "survivors"].index(what)
    changed[place] = other[place]
    assert view_digest(*changed) != view_digest(*seen)


def test_shares_are_revealed_once_and_of_one_kind() -> None:
    group, message = at_reveal()
    head, tensors = decode(group.answer(0, message))
    assert not tensors
    assert {*head["own_masks"]} == {"0", "1", "2", "3"}
    assert {*head["pair_keys"]} == {"4"}
    assert all(len(share) == 66 for share in [*head["own_masks"].values(), head["pair_keys"]["4"]])
    refuses(group, 0, message, "out of turn")


# --- the server ---


def test_the_server_leaves_out_who_answers_wrongly() -> None:
    """Each lie is of member 4, whom the sum can do without, and is found by the server."""
    honest = Members(TERMS)
    for stage, lie in {
        "sum-terms": {"keys": signed_by_list()},
        "sum-keys": {"sealed": {"0": "00"}},
        "sum-shares": {},
        "sum-survivors": {"signature": "00"},
        "sum-signatures": {"own_masks": {}, "pair_keys": {}},
    }.items():
        group, server = Members(TERMS), SumServer(TERMS)

        def ask(requests: Any, group: Any = group, stage: str = stage, lie: Any = lie) -> Any:
            answers = group.ask(requests)
            if 4 in answers and decode(requests[4])[0]["do"] == stage:
                answers[4] = encode(lie, {"masked": torch.zeros(3, dtype=torch.int64)})
            return {**answers, 77: b"of nobody"}

        total = server.run(ask)
        assert torch.equal(total, honest.plain_sum(server.survivors))
        assert (4 in server.survivors) == (stage in ("sum-survivors", "sum-signatures"))


def signed_by_list() -> list[str]:
    keys = signed_keys(4, fresh(), fresh())
    return [fresh().hex(), *keys[1:]]


@pytest.mark.parametrize("kind", ["own_masks", "pair_keys"])
def test_wrong_shares_give_no_sum(kind: str) -> None:
    group, server = Members(TERMS, {4: "sum-shares"}), SumServer(TERMS)

    def ask(requests: Any) -> Any:
        answers = group.ask(requests)
        if decode(requests[0])[0]["do"] == "sum-signatures":
            head, _ = decode(answers[1])
            head[kind] = {k: "00" * 32 + "01" for k in head[kind]}
            answers[1] = encode(head)
        return answers

    words = "cannot be one|of no secret" if kind == "own_masks" else "not of its key|of no secret"
    with pytest.raises(GivenUp, match=words):
        server.run(ask)


# --- a node ---


def node(tmp_path: Path) -> SumActions:
    names = [identity.name for identity in IDENTITIES[:5]]
    numbers = Numbers(torch.zeros(11, dtype=torch.int64))
    return SumActions(IDENTITIES[0], SumPolicy(names, 1), tmp_path, lambda *_: numbers)


def said(node: SumActions, do: str, **words: Any) -> dict[str, Any]:
    try:
        return decode(node.answer(do, words))[0]
    except Refused as refusal:
        return {"refused": str(refusal)}


def test_a_node_takes_part_in_a_round_once(tmp_path: Path) -> None:
    first = node(tmp_path)
    assert "keys" in said(first, "sum-terms", terms=head_of(TERMS))
    assert "begun before" in said(first, "sum-terms", terms=head_of(TERMS))["refused"]
    other = head_of(terms_of(5, shares=2, corrupt=1, context="e" * 64))
    assert "begun before" in said(first, "sum-terms", terms=other)["refused"]
    again = node(tmp_path)
    assert "begun before" in said(again, "sum-terms", terms=head_of(TERMS))["refused"]
    later = head_of(terms_of(5, shares=2, corrupt=1, round=1))
    keys = said(again, "sum-terms", terms=later)["keys"]
    assert "keys" in said(again, "sum-terms", terms={**later, "round": 2})
    assert said(again, "sum-terms", terms={**later, "round": 3})["keys"] != keys


def test_what_a_node_refuses(tmp_path: Path) -> None:
    at_work = node(tmp_path)
    words = [
        said(at_work, "sum-terms")["refused"],
        said(at_work, "sum-terms", terms=head_of(terms_of(6)))["refused"],
        said(at_work, "sum-terms", terms=head_of(terms_of(5)))["refused"],
        said(at_work, "sum-keys", run="a" * 64, round=0)["refused"],
        said(at_work, "release")["refused"],
    ]
    parts = ("terms must", "1 members", "corrupt=0", "no such sum", "no such sum")
    assert all(part in word for part, word in zip(parts, words, strict=True))
    assert "keys" in said(at_work, "sum-terms", terms=head_of(TERMS))
    assert "no such sum" in said(at_work, "sum-keys", run="a" * 64, round=1)["refused"]
    assert "no message" in said(at_work, "sum-else", run="a" * 64, round=0)["refused"]
