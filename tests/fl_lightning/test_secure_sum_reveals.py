"""What is revealed in a secure sum, once and of one kind, and what a node refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fl_lightning.deploy.policy import Refused
from fl_lightning.deploy.secure_sum.messages import view_digest
from fl_lightning.deploy.secure_sum.node import SumActions
from fl_lightning.deploy.secure_sum.policy import SumPolicy
from fl_lightning.deploy.secure_sum.server import GivenUp, SumServer
from fl_lightning.deploy.secure_sum.terms import head_of
from fl_lightning.values.message import decode, encode
from tests.fl_lightning.changed_messages import TERMS, Message, at, fresh, refuses, signed_keys
from tests.fl_lightning.secure_sums import IDENTITIES, Members, Numbers, terms_of

pytest.importorskip("cryptography")


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
