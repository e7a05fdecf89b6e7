"""Runs of client+secure_sum with nodes behind sockets: the simulation's model, and ledgers."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from fl_lightning.deploy.frames import ask
from fl_lightning.deploy.node import Node
from fl_lightning.deploy.secure_sum.federated import RunContribution
from fl_lightning.deploy.secure_sum.server import SumServer
from fl_lightning.deploy.service import serve
from fl_lightning.ledger import read, verify
from fl_lightning.release.sum_part import SumPart
from fl_lightning.release.summed import Summed
from fl_lightning.values.message import decode
from tests.fl_lightning.nodes import model, network
from tests.fl_lightning.secure_sums import STAGES
from tests.fl_lightning.summing_nodes import ledgers, run_of, summing_nodes

pytest.importorskip("cryptography")


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
