"""SIGKILL of SuperNodes, of the SuperLink and of the ServerApp at ten places each, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deployment.books import check_books, lines_of, processes_of

pytest.importorskip("flwr")
rigs = pytest.importorskip("tests.deployment.rig")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROUNDS = 16
Places = list[tuple[str, Callable[[], bool]]]


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = rigs.Rig(tmp_path / "f", ROUNDS)
    made.federation.prepare()
    try:
        made.federation.start_all()
        yield made
    finally:
        made.federation.stop_all()
    assert processes_of(made.folder) == {}


def at_last(rig) -> None:
    """The run ends, with all its rounds and with whole books."""
    while not rig.ended():
        rig.go_on()
    assert rig.rounds_done() == ROUNDS
    rig.look()
    check_books(rig.run, rig.holders, rigs.EPSILON)
    lines = [len(lines_of(holder, k)) for k, holder in enumerate(rig.holders)]
    rig.tell(f"end: {lines} releases, {rig.submitted} ServerApps")


def places_in_a_round(rig) -> Places:
    return [
        ("a node has paid, its answer is on the way", rig.grew("paid")),
        ("the server has copied lines", rig.grew("copied")),
        ("the server has kept a round", rig.grew("kept")),
        ("the server has written its table", rig.grew("rounds")),
        *((f"some seconds into a round, {i}", rig.later("rounds", 12.0)) for i in range(3)),
    ]


def test_a_killed_serverapp_goes_on_when_it_is_submitted_again(rig) -> None:
    early: Places = [
        ("it starts", lambda: bool(rig.serverapps())),
        ("it has its folder", rig.grew("folder")),
        ("it has its ledger", rig.grew("copied")),
    ]
    for name, there in [*early, *places_in_a_round(rig)]:
        rig.mark()
        rig.submit()
        assert rig.until(there), name
        rig.kill_serverapp()
        rig.look()
        rig.tell(f"ServerApp killed: {name}")
    at_last(rig)


def test_a_killed_superlink_goes_on_from_its_database(rig) -> None:
    early: Places = [
        ("nothing runs", lambda: True),
        ("a run was submitted", lambda: rig.submitted > 0),
        ("the ServerApp starts", lambda: bool(rig.serverapps())),
    ]
    for name, there in [*early, *places_in_a_round(rig)]:
        rig.mark()
        if name != "nothing runs":
            rig.submit()
        assert rig.until(there), name
        rig.federation.kill("superlink")
        rig.look()
        rig.tell(f"SuperLink killed: {name}")
        rig.restart_superlink()
    at_last(rig)


def test_killed_supernodes_come_back_to_the_run(rig) -> None:
    """Each rests for as long as a supervisor has to let it; no round goes by without any node."""
    first: Places = [
        ("nothing runs", lambda: True),
        ("a node has begun the run", rig.grew("begun")),
        ("a node has paid, its answer is on the way", rig.grew("paid")),
        ("the server has copied lines", rig.grew("copied")),
        ("the server has written its table", rig.grew("rounds")),
    ]
    for name, there in first:
        rig.mark()
        if name != "nothing runs" and not rig.serverapps():
            rig.submit()
        assert rig.until(there), name
        rig.federation.kill("supernode0")
        killed = [time.monotonic()]
        rig.tell(f"SuperNode 0 killed: {name}")
        if name == "nothing runs":
            rig.submit()
            second, then = "a messenger starts", lambda: bool(rig.clientapps())
        else:
            second, then = "some seconds later", rig.after(10.0)
        assert rig.until(then), second
        rig.federation.kill("supernode1")
        killed.append(time.monotonic())
        rig.tell(f"SuperNode 1 killed: {second}")
        for node, since in enumerate(killed):
            time.sleep(max(0.0, since + rigs.SUPERNODE_REST - time.monotonic()))
            rig.federation.start_supernode(node)
        rig.look()
        if name != "nothing runs":
            rig.tell(rig.go_on())
    at_last(rig)
