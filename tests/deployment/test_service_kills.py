"""SIGKILL of a node service wherever it can be: nothing is released unpaid, lost or paid twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from fl_lightning.deploy.frames import ask
from fl_lightning.release.federation import Federation, number_members, parse_member
from fl_lightning.values.message import decode, encode
from tests.deployment.books import check_books, lines_of
from tests.deployment.dying_node import PLACES
from tests.fl_lightning import nodes as n

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
ROUNDS = 4
# Places that a service passes in its first moments as well as in a round die later.
LATER = {"half a ledger line": 3, "line in the file, head old": 3, "half a checkpoint": 3,
         "after the checkpoint": 3, "before the answer": 4, "half the answer": 4,
         "after the answer": 4, "before training": 2, "before the ledger line": 2,
         "after the ledger line": 2}  # fmt: skip


class Zygote:
    """Where node services are forked from."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.deployment.dying_node"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )

    def fork(self, **order: object) -> int:
        """Process id of a new service."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def hear(self) -> int:
        """The next number that it says: of a service that ended, its exit code."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.process.communicate(timeout=60)


class Service:
    """The process of client 0's node, started again whenever it has died."""

    def __init__(self, zygote: Zygote, folder: Path, simulation: bool, place: str) -> None:
        self.zygote, self.folder, self.simulation, self.deaths = zygote, folder, simulation, 0
        self.start(place, LATER.get(place, 1))

    def start(self, place: str = "", number: int = 1) -> None:
        """Start it, to die at a place."""
        self.pid = self.zygote.fork(
            folder=str(self.folder), place=place, number=number, simulation=self.simulation
        )

    def ask(self, request: bytes) -> bytes | None:
        """Its answer; None if it died over the question, and is up again."""
        path = self.folder / "node.sock"
        end = time.monotonic() + 120
        while time.monotonic() < end:
            try:
                return ask(path, request, timeout=60)
            except (FileNotFoundError, ConnectionRefusedError):
                if self.died():
                    break
                time.sleep(0.01)
            except OSError:
                break
        assert self.zygote.hear() == -signal.SIGKILL
        self.deaths += 1
        self.start()
        return None

    def died(self) -> bool:
        """Whether it has."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def stop(self) -> None:
        """End it."""
        if not self.died():
            os.kill(self.pid, signal.SIGKILL)
        assert self.zygote.hear() == -signal.SIGKILL


@contextlib.contextmanager
def federation(
    zygote: Zygote, folder: Path, place: str, simulation: bool, patient: bool
) -> Iterator[tuple[Service, Federation]]:
    """Client 0 is a process that can die, the others live here.

    `patient`: who asks does so again where the node died, as a server does that has died too.
    """
    service = Service(zygote, folder / "holder0", simulation, place)
    others = [n.node(folder / f"holder{k}", k, simulation=simulation) for k in (1, 2)]

    def first(request: bytes) -> dict[int, bytes]:
        answer = service.ask(request)
        if answer is None and patient:
            answer = service.ask(request)
        return {} if answer is None else {0: answer}

    def asked(requests: Mapping[int, bytes]) -> dict[int, bytes]:
        found = {k: others[k - 1].answer(m) for k, m in requests.items() if k}
        return found | (first(requests[0]) if 0 in requests else {})

    try:
        yield service, Federation([], asked)
    finally:
        service.stop()
        for one in others:
            one.close()


def run(zygote: Zygote, folder: Path, place: str, *, simulation: bool, patient: bool):
    """A run whose first node dies once."""
    with federation(zygote, folder, place, simulation, patient) as (service, found):
        hello = encode({"do": "hello"})
        heads = [decode(found.ask({k: hello}).get(k) or found.ask({k: hello})[k])[0]
                 for k in range(n.CLIENTS)]  # fmt: skip
        made = n.module(folder / "run", **({"seed": 5} if simulation else {}))
        made.federation = Federation(number_members([parse_member(h) for h in heads]), found.ask)
        n.trainer(ROUNDS).fit(made, n.population())
        made.federation.end()
        return made, service.deaths


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("undisturbed")
    made, deaths = run(zygote, folder, "", simulation=True, patient=True)
    assert deaths == 0
    return made, lines_of(folder / "holder0", 0)


@pytest.mark.parametrize("place", PLACES)
def test_a_service_killed_and_asked_again_says_the_same_for_nothing(
    place: str, zygote: Zygote, undisturbed, tmp_path: Path
) -> None:
    made, deaths = run(zygote, tmp_path, place, simulation=True, patient=True)
    assert deaths == 1
    check_books(tmp_path / "run", [tmp_path / f"holder{k}" for k in range(3)], n.EPSILON)
    assert lines_of(tmp_path / "holder0", 0) == undisturbed[1]
    want = undisturbed[0].network.state_dict()
    for name, value in made.network.state_dict().items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("place", PLACES)
def test_a_service_killed_and_not_asked_again_loses_a_round_and_no_line(
    place: str, zygote: Zygote, tmp_path: Path
) -> None:
    """Noise is secret; what was written and never answered comes to the server's copy later."""
    if place in ("before a run is begun", "ledger begun, terms not kept", "joined, not answered"):
        with pytest.raises(ValueError, match=r"client 0 .* does not answer"):
            run(zygote, tmp_path, place, simulation=False, patient=False)
        assert lines_of(tmp_path / "holder0", 0) == []
        return
    made, deaths = run(zygote, tmp_path, place, simulation=False, patient=False)
    assert deaths == 1
    check_books(tmp_path / "run", [tmp_path / f"holder{k}" for k in range(3)], n.EPSILON)
    own = lines_of(tmp_path / "holder0", 0)
    assert {repr(line) for line in made.ledger.releases if line.client == 0} == set(map(repr, own))
    unpaid = ("before training", "before the ledger line", "half a ledger line")
    lost = place in (*unpaid, "after the answer")  # the next question finds nobody
    assert len(own) == ROUNDS - lost
