"""Runs of client+secure_sum with nodes behind sockets: the simulation's model, and ledgers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

pytest.importorskip("cryptography")

from fl_lightning.deploy.client_run import Holding
from fl_lightning.deploy.frames import ask
from fl_lightning.deploy.node import Node
from fl_lightning.deploy.secure_sum.federated import RunContribution, with_secure_sums
from fl_lightning.deploy.secure_sum.keys import Identity
from fl_lightning.deploy.secure_sum.node import IDENTITY_FILE
from fl_lightning.deploy.secure_sum.policy import SumPolicy
from fl_lightning.deploy.secure_sum.server import SumServer
from fl_lightning.deploy.service import serve
from fl_lightning.ledger import read, verify
from fl_lightning.release.federation import Federation, SumOutcome, SumProposal
from fl_lightning.release.sum_part import SumPart
from fl_lightning.release.summed import Summed
from fl_lightning.values.message import decode, encode
from tests.fl_lightning.nodes import (
    CLIENTS,
    DELTA,
    federation,
    model,
    module,
    network,
    policy,
    population,
    release,
    say,
    trainer,
)
from tests.fl_lightning.secure_sums import STAGES

SUM = {"setting": "client+secure_sum", "min_survivors": 2, "delta": DELTA, "epsilon": 50.0}
Ask = Callable[[Mapping[int, bytes]], Mapping[int, bytes]]


def summing_nodes(folder: Path, *, corrupt: int = 0, **options: Any) -> list[Node]:
    folders = [folder / f"node{k}" for k in range(CLIENTS)]
    for one in folders:
        one.mkdir(mode=0o700)
    names = [Identity.kept_in(one / IDENTITY_FILE).name for one in folders]
    known = {"settings": ["client+secure_sum"], "epsilon": 50.0, "simulation": True}
    known |= {"rounds": 20} | options
    allowed = policy(secure_sum=SumPolicy(names, corrupt=corrupt), **known)
    return [
        Node(Holding(population().only(k), network(), None, allowed), one, k)
        for k, one in enumerate(folders)
    ]


def run_of(folder: Path, nodes: list[Node] | None, through: Ask | None = None, **options: Any):
    """A run with nodes, or the simulated one."""
    rounds, lr = options.pop("rounds", 3), options.pop("client_lr", 0.1)
    made = module(folder, {"local_steps": 2, "client_lr": lr}, **(SUM | options))
    if nodes is not None:
        plain = federation(nodes)
        made.federation = with_secure_sums(Federation(plain.members, through or plain.ask), 0)
    trainer(rounds).fit(made, population())
    return made


def ledgers(folder: Path) -> list[Path]:
    return [next((folder / f"node{k}" / "runs").iterdir()) for k in range(CLIENTS)]


def alike(one: Any, other: Any, step: float = 1e-6) -> bool:
    pairs = zip(one.network.parameters(), other.network.parameters(), strict=True)
    return all(torch.allclose(a, b, rtol=1e-6, atol=step) for a, b in pairs)


@pytest.mark.parametrize("options", [{"thresholds": "released"}, {"thresholds": "fixed"}, {}])
def test_a_run_of_nodes_is_the_simulated_run_up_to_the_grid(tmp_path: Path, options: dict) -> None:
    nodes = summing_nodes(tmp_path)
    found = run_of(tmp_path / "server", nodes, seed=5, **options)
    wanted = run_of(tmp_path / "simulated", None, seed=5, **options)
    assert alike(found, wanted)
    assert not alike(wanted, run_of(tmp_path / "other", None, seed=6, **options), 1e-3)
    for one in nodes:
        one.close()
    (_, lines), (_, expected) = read(tmp_path / "server"), read(tmp_path / "simulated")
    facts = ("clip_norm", "noise_multiplier", "vote_noise_scale", "tail_delta", "largest_weight")
    for line, other in zip(lines, expected, strict=True):
        known = [name for name in facts if getattr(other, name) is not None]
        assert known == [name for name in facts if getattr(line, name) is not None]
        for name in known:
            assert getattr(line, name) == pytest.approx(getattr(other, name), rel=1e-5)
    assert verify(tmp_path / "server") == []
    for k, ledger in enumerate(ledgers(tmp_path)):
        header, own = read(ledger)
        assert header["member"] == k
        assert verify(ledger, found.run.releases.heads[k]) == []
        assert verify(ledger) == []
        assert [line.noise_multiplier for line in own] == [line.noise_multiplier for line in lines]
        statement = (ledger / "privacy_statement.md").read_text()
        assert "The nodes mask what they send" in statement


class Behind:
    """Nodes behind their sockets; one goes away when a message of some kind comes for it."""

    def __init__(self, folder: Path, nodes: list[Node], leaving: int = -1, at: str = "") -> None:
        self.paths = [folder / f"{k}.sock" for k in range(len(nodes))]
        self.leaving, self.at = leaving, at
        self.ends = [threading.Event() for _ in nodes]
        ready = [threading.Event() for _ in nodes]
        self.threads = []
        for k, node in enumerate(nodes):
            options = {"most": 1 << 24, "ready": ready[k].set, "stopped": self.ends[k].is_set}
            self.threads.append(
                threading.Thread(target=serve, args=(self.paths[k], node.answer), kwargs=options)
            )
            self.threads[k].start()
            assert ready[k].wait(20)

    def end(self, k: int) -> None:
        self.ends[k].set()
        self.threads[k].join()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, *_: object) -> None:
        for k in range(len(self.paths)):
            self.end(k)

    def ask(self, requests: Mapping[int, bytes]) -> dict[int, bytes]:
        if self.leaving in requests and decode(requests[self.leaving])[0]["do"] == self.at:
            self.end(self.leaving)

        def one(k: int) -> bytes | None:
            try:
                return ask(self.paths[k], requests[k], timeout=60)
            except OSError:
                return None

        with ThreadPoolExecutor() as pool:
            answers = dict(zip(requests, pool.map(one, requests), strict=True))
        return {k: data for k, data in answers.items() if data is not None}


@pytest.mark.parametrize("stage", STAGES)
def test_a_node_that_goes_away_at_any_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """The sum over sockets is that of the survivors, to the bit, and the simulation's."""
    held: dict[int, Tensor] = {}
    totals: list[Tensor] = []
    values, total = RunContribution.values, SumServer.total

    def note_values(self: RunContribution) -> Tensor:
        held[self._run.terms.client] = values(self)
        return held[self._run.terms.client]

    def note_total(self: SumServer, answers: Any) -> Tensor:
        totals.append(total(self, answers).clone())
        return totals[-1]

    monkeypatch.setattr(RunContribution, "values", note_values)
    monkeypatch.setattr(SumServer, "total", note_total)
    nodes = summing_nodes(tmp_path)
    with Behind(tmp_path, nodes, 1, stage) as behind:
        found = run_of(tmp_path / "server", nodes, behind.ask, seed=5, rounds=1)
    for one in nodes:
        one.close()
    survivors = [0, 2] if stage in STAGES[:3] else [0, 1, 2]
    assert torch.equal(totals[0], sum(held[k] for k in survivors))
    # Noise of a public seed is bound to the cohort, so the others leave after it was drawn.
    of_all = Summed.release
    monkeypatch.setattr(Summed, "release", lambda s, _, *a: of_all(s, torch.tensor(survivors), *a))
    wanted = run_of(tmp_path / "simulated", None, seed=5, rounds=1)
    assert alike(found, wanted)
    # Whoever was asked for masked numbers is charged in the server's copy.
    (line,) = read(tmp_path / "server")[1]
    charged = [0, 2] if stage in STAGES[:2] else [0, 1, 2]
    assert line.members(3).tolist() == charged
    assert verify(tmp_path / "server") == []
    paid = [len(read(ledger)[1]) for ledger in ledgers(tmp_path)]
    assert paid == [1, int(stage in STAGES[3:]), 1]


def test_a_sum_that_is_given_up_is_charged_and_moves_nothing(tmp_path: Path) -> None:
    nodes = summing_nodes(tmp_path)

    def few(requests: Mapping[int, bytes]) -> dict[int, bytes]:
        late = decode(next(iter(requests.values())))[0]["do"] == "sum-survivors"
        return {k: nodes[k].answer(data) for k, data in requests.items() if not (late and k)}

    made = run_of(tmp_path / "server", nodes, few, seed=5, rounds=2)
    start = network().state_dict()
    assert all(torch.equal(v, start[n]) for n, v in made.network.state_dict().items())
    assert [line.members(3).tolist() for line in read(tmp_path / "server")[1]] == [[0, 1, 2]] * 2
    assert [len(read(ledger)[1]) for ledger in ledgers(tmp_path)] == [2, 2, 2]
    for one in nodes:
        one.close()


def test_secret_noise_is_new_in_every_part_and_nodes_go_on_after_a_restart(tmp_path: Path) -> None:
    nodes = summing_nodes(tmp_path)
    rounds: list[int] = []

    def through(requests: Mapping[int, bytes]) -> dict[int, bytes]:
        head, _ = decode(next(iter(requests.values())))
        if head["do"] == "sum-terms" and head["terms"]["round"] == 1:
            nodes[2].close()
            holding = nodes[2]._holding
            nodes[2] = Node(holding, tmp_path / "node2", 2)
            rounds.append(1)
            same_round_again(nodes[0])
        return {k: nodes[k].answer(data) for k, data in requests.items()}

    run_of(tmp_path / "server", nodes, through)
    assert rounds == [1]
    for one in nodes:
        one.close()
    names = {line.binding for ledger in ledgers(tmp_path) for line in read(ledger)[1]}
    assert len(names) == 9
    assert [verify(ledger) for ledger in ledgers(tmp_path)] == [[], [], []]


def test_the_shares_of_as_many_as_are_needed_have_the_noise_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Secret noise of nodes that learn nothing: accepted at its scale, not at 2/3 or 3/2 of it."""
    seen: list[Tensor] = []
    values = SumPart.values

    def note(self: SumPart) -> list[Tensor]:
        found = values(self)
        scales = [scale for _, _, scale in self.blocks()]
        numbers = [v.reshape(-1) / s for v, s in zip(found, scales, strict=True)]
        seen.append(torch.cat(numbers))
        return found

    monkeypatch.setattr(SumPart, "values", note)
    nodes = summing_nodes(tmp_path)
    run_of(tmp_path / "server", nodes, rounds=20, client_lr=1e-9, thresholds="fixed")
    for one in nodes:
        one.close()
    assert len(seen) == 60
    pairs = torch.cat([a + b for a, b in zip(seen[::3], seen[1::3], strict=True)]).numpy()
    fits = [stats.kstest(pairs, stats.norm(scale=s).cdf).pvalue for s in (1.0, 2 / 3, 3 / 2)]
    assert fits[0] > 1e-4
    assert max(fits[1:]) < 1e-4


def test_a_node_that_forgot_the_run_is_reminded(tmp_path: Path) -> None:
    nodes = summing_nodes(tmp_path)

    def through(requests: Mapping[int, bytes]) -> dict[int, bytes]:
        head, _ = decode(next(iter(requests.values())))
        if head["do"] == "sum-terms" and head["terms"]["round"] == 0:
            nodes[1]._forget_unused()
        return {k: nodes[k].answer(data) for k, data in requests.items()}

    run_of(tmp_path / "server", nodes, through)
    for one in nodes:
        one.close()
    assert [[line.round for line in read(one)[1]] for one in ledgers(tmp_path)] == [
        [0, 1, 2],
        [1, 2],
        [0, 1, 2],
    ]
    assert [line.members(3).tolist() for line in read(tmp_path / "server")[1]] == [
        [0, 2],
        [0, 1, 2],
        [0, 1, 2],
    ]


def same_round_again(node: Node) -> None:
    """Should a round ever begin twice, its noise is other noise."""
    (run,) = node._open.values()
    rows = run.run.history.rows(torch.tensor([0]))
    options = {"round": 7, "multiplier": 1.0, "asked": 1.0, "context": ""}
    parts = [run.sum_part(model(), rows, **options).values() for _ in range(2)]
    assert not any(torch.equal(a, b) for a, b in zip(*parts, strict=True))


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


# --- what a node refuses of a server ---


def asked(tmp_path: Path, change: Callable[[dict, dict], None], **options: Any) -> list[str]:
    """Why nodes refuse the first terms of a run, changed by the server."""
    nodes = summing_nodes(tmp_path, **options)
    reasons: list[str] = []

    def through(requests: Mapping[int, bytes]) -> dict[int, bytes]:
        answers = {}
        for k, data in requests.items():
            head, tensors = decode(data)
            if head["do"] == "sum-terms":
                change(head, tensors)
            answers[k] = nodes[k].answer(encode(head, tensors))
            reasons.append(decode(answers[k])[0].get("refused", ""))
        return answers

    run_of(tmp_path / "server", nodes, through, rounds=1)
    assert all(len(read(ledger)[1]) == 0 for ledger in ledgers(tmp_path))
    for one in nodes:
        one.close()
    return [reason for reason in reasons if reason]


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
