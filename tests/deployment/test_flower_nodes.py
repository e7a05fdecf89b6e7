"""The server's half on Flower, with a grid that is made up: who is there, and who answers."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr")
from fl_lightning.deploy import flower
from fl_lightning.deploy.flower import FlowerNodes
from fl_lightning.release.agreement import PROTOCOL
from fl_lightning.values.message import decode, encode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]


@pytest.fixture(autouse=True)
def _no_run_of_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    def message(content: Any, node: int, kind: str, ttl: float) -> SimpleNamespace:
        assert kind == "train"
        assert ttl > 0
        return SimpleNamespace(content=content, node=node)

    monkeypatch.setattr(flower, "Message", message)


class Grid:
    """SuperNodes by id; each answers with the name of the node service behind it."""

    def __init__(self, **names: str) -> None:
        self.names = {int(k[1:]): name for k, name in names.items()}
        self.silent: set[int] = set()
        self.protocol = PROTOCOL
        self._sent: dict[str, Any] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.names)

    def push_messages(self, messages: list[Any]) -> list[str]:
        ids = [f"m{len(self._sent) + i}" for i in range(len(messages))]
        self._sent |= dict(zip(ids, messages, strict=True))
        return ids

    def pull_messages(self, ids: set[str]) -> list[Any]:
        return [self._answer(i) for i in ids if self._sent[i].node not in self.silent]

    def _answer(self, message_id: str) -> Any:
        message = self._sent[message_id]
        node = message.node
        head, _ = decode(message.content["message"]["bytes"].data)
        answer = {"name": self.names[node] * 64, "heard": head["do"], "protocol": self.protocol}
        answer |= {"epsilon": 8.0, "delta": 1e-5, "records": 10, "number": None}
        block = SimpleNamespace(data=encode(answer))
        metadata = SimpleNamespace(reply_to_message_id=message_id, src_node_id=node)
        content = {"message": {"bytes": block}}
        return SimpleNamespace(metadata=metadata, content=content, has_content=lambda: True)


@pytest.fixture
def _environment_as_before() -> Iterator[None]:
    before = dict(os.environ)
    os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # Lightning uses what is deprecated
    yield
    os.environ.clear()
    os.environ.update(before)


NAMES = ["a" * 64, "b" * 64]
BOTH = dict.fromkeys(range(2), encode({"do": "release"}))


def heard(found: dict[int, bytes]) -> dict[int, str]:
    return {k: decode(data)[0]["heard"] for k, data in found.items()}


def test_a_node_is_asked_by_its_own_name_wherever_it_comes_back() -> None:
    grid = Grid(n7="a", n8="b")
    nodes = FlowerNodes(grid, 5.0, 5.0)
    assert sorted(m.name for m in nodes.wait_for(2)) == NAMES
    assert heard(nodes.ask(NAMES, BOTH)) == {0: "release", 1: "release"}
    grid.names = {9: "b", 7: "a"}
    found = nodes.ask(NAMES, {1: BOTH[1]})
    assert decode(found[1])[0]["name"] == NAMES[1]


def test_who_is_silent_or_away_is_left_out_of_the_round() -> None:
    grid = Grid(n7="a", n8="b")
    nodes = FlowerNodes(grid, 0.5, 5.0)
    nodes.wait_for(2)
    grid.silent = {8}
    assert heard(nodes.ask(NAMES, BOTH)) == {0: "release"}
    grid.silent = set()
    del grid.names[7]
    assert heard(nodes.ask(NAMES, BOTH)) == {1: "release"}


def test_no_round_goes_by_while_nobody_is_there() -> None:
    grid = Grid(n7="a", n8="b")
    nodes = FlowerNodes(grid, 5.0, 20.0)
    nodes.wait_for(2)
    grid.names = {3: "c"}  # a stranger is nobody
    threading.Timer(1.5, lambda: grid.names.update({4: "b"})).start()
    assert heard(nodes.ask(NAMES, BOTH)) == {1: "release"}
    grid.names = {3: "c"}
    nodes = FlowerNodes(grid, 5.0, 0.5)
    with pytest.raises(ValueError, match=r"nodes=1: only 0 came within patience=0.5 seconds"):
        nodes.ask(NAMES, BOTH)


def test_a_node_of_another_protocol_is_none() -> None:
    grid = Grid(n7="a")
    grid.protocol = PROTOCOL + 1
    with pytest.raises(ValueError, match="only 0 came"):
        FlowerNodes(grid, 5.0, 0.5).wait_for(1)


@pytest.mark.usefixtures("_environment_as_before")
def test_why_a_run_is_refused_reaches_the_log_of_flower(tmp_path: Path) -> None:
    """Flower logs an exception; a SystemExit ends its process before the log is sent."""
    options = {"run-dir": str(tmp_path / "run"), "nodes": 2, "patience": 5.0, "corrupt": 0}
    options |= {"round-timeout": 5.0, "config": "", "arguments": "--trainer.max_epochs=-7"}
    with pytest.raises(Exception, match="max_epochs"):
        flower.fit(Grid(n7="a", n8="b"), options)
