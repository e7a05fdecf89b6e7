"""What a node of client+secure_sum refuses of a server that lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fl_lightning.deploy.secure_sum.federated import with_secure_sums
from fl_lightning.deploy.secure_sum.keys import Identity
from fl_lightning.deploy.secure_sum.node import IDENTITY_FILE
from fl_lightning.ledger import read, verify
from fl_lightning.release.federation import Federation, SumOutcome, SumProposal
from tests.fl_lightning.nodes import federation, module, population, release, say, trainer
from tests.fl_lightning.summing_nodes import SUM, asked, ledgers, run_of, summing_nodes

pytest.importorskip("cryptography")


def test_a_server_that_asks_for_more_rounds_gets_no_more_than_was_promised(tmp_path: Path) -> None:
    nodes = summing_nodes(tmp_path)
    proposals: list[SumProposal] = []
    made = module(tmp_path / "server", {"local_steps": 2}, **SUM)
    plain = with_secure_sums(federation(nodes), 0)
    assert plain.sum is not None
    of_nodes = plain.sum

    def note(proposal: SumProposal) -> SumOutcome:
        proposals.append(proposal)
        return of_nodes(proposal)

    made.federation = Federation(plain.members, plain.ask, note)
    trainer(2).fit(made, population())
    more = [of_nodes(replace(proposals[-1], round=2 + k)) for k in range(4)]
    assert more[-1].sums is None
    for one in nodes:
        one.close()
    for ledger in ledgers(tmp_path):
        header, lines = read(ledger)
        assert len(lines) <= header["affordable_steps"]
        assert verify(ledger) == []
        assert (
            '"reason":"spent: nothing is left'
            in (ledger.parent.parent / "refusals.jsonl").read_text()
        )


def less_noise(head: dict, tensors: dict) -> None:
    head["terms"]["blocks"][0]["scale"] *= 0.5


def wider_clip(head: dict, tensors: dict) -> None:
    head["terms"]["blocks"][1]["reach"] *= 2


def smaller_multiplier(head: dict, tensors: dict) -> None:
    head["multiplier"] *= 0.5


def another_model(head: dict, tensors: dict) -> None:
    tensors["params.0.bias"] += 1


def another_history(head: dict, tensors: dict) -> None:
    tensors["history.l1_norm"] *= 2


def more_shares(head: dict, tensors: dict) -> None:
    head["terms"]["shares"] = 3


def no_multiplier(head: dict, tensors: dict) -> None:
    head["multiplier"] = -1


def heavy(head: dict, tensors: dict) -> None:
    head["asked"] = 1.5


def long_context(head: dict, tensors: dict) -> None:
    head["context"] = "x" * 1000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (less_noise, "clip norms or noise are not those"),
        (wider_clip, "clip norms or noise are not those"),
        (smaller_multiplier, "another model or history"),
        (another_model, "another model or history"),
        (another_history, "another model or history"),
        (more_shares, "shares=3, agreed were 2"),
        (no_multiplier, "must be positive numbers"),
        (heavy, "asked must be at most 1"),
        (long_context, "short text"),
    ],
)
def test_terms_of_a_lying_server_are_refused(
    tmp_path: Path, change: Callable[[dict, dict], None], words: str
) -> None:
    reasons = asked(tmp_path, change)
    assert len(reasons) == 3
    assert all(words in reason for reason in reasons)


def test_a_holder_that_fears_more_refuses(tmp_path: Path) -> None:
    reasons = asked(tmp_path, lambda *_: None, corrupt=1)
    assert all("corrupt=0, the holder allows for 1" in reason for reason in reasons)


def test_a_part_is_never_released_alone(tmp_path: Path) -> None:
    nodes = summing_nodes(tmp_path)
    run = run_of(tmp_path / "server", nodes, seed=5, rounds=1).run
    reason = release(nodes[0], 1, known=1, run=run.run_id)[0]["refused"]
    assert "never released alone" in reason
    assert (
        say(nodes[0], {"do": "hello"})[0]["name"]
        == Identity.kept_in(tmp_path / "node0" / IDENTITY_FILE).name
    )
    for one in nodes:
        one.close()
