"""SIGKILL of a node service wherever it can be: nothing is released unpaid, lost or paid twice."""

from __future__ import annotations

import contextlib
import os
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


class Service:
    """The process of client 0's node, started again whenever it has died."""

    def __init__(self, folder: Path, simulation: bool) -> None:
        self.folder, self.simulation, self.deaths = folder, simulation, 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, place: str = "", number: int = 1) -> None:
        """Start it, to die at a place."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.deployment.dying_node", str(self.folder), place,
             str(number), str(int(self.simulation))],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def ask(self, request: bytes) -> bytes | None:
        """Its answer; None if it died over the question, and is up again."""
        assert self.process is not None
        end = time.monotonic() + 120
        while self.process.poll() is None and time.monotonic() < end:
            try:
                return ask(self.folder / "node.sock", request, timeout=60)
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.05)
            except OSError:
                break
        assert self.process.wait(60) == -9
        self.deaths += 1
        self.start()
        return None

    def stop(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


@contextlib.contextmanager
def federation(
    folder: Path, simulation: bool, patient: bool
) -> Iterator[tuple[Service, Federation]]:
    """Client 0 is a process that can die, the others live here.

    `patient`: who asks does so again where the node died, as a server does that has died too.
    """
    service = Service(folder / "holder0", simulation)
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


def run(folder: Path, place: str, *, simulation: bool, patient: bool):
    """A run whose first node dies once."""
    with federation(folder, simulation, patient) as (service, found):
        service.start(place, LATER.get(place, 1))
        hello = encode({"do": "hello"})
        heads = [decode(found.ask({k: hello}).get(k) or found.ask({k: hello})[k])[0]
                 for k in range(n.CLIENTS)]  # fmt: skip
        made = n.module(folder / "run", **({"seed": 5} if simulation else {}))
        made.federation = Federation(number_members([parse_member(h) for h in heads]), found.ask)
        n.trainer(ROUNDS).fit(made, n.population())
        made.federation.end()
        return made, service.deaths


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("undisturbed")
    made, deaths = run(folder, "", simulation=True, patient=True)
    assert deaths == 0
    return made, lines_of(folder / "holder0", 0)


@pytest.mark.parametrize("place", PLACES)
def test_a_service_killed_and_asked_again_says_the_same_for_nothing(
    place: str, undisturbed, tmp_path: Path
) -> None:
    made, deaths = run(tmp_path, place, simulation=True, patient=True)
    assert deaths == 1
    check_books(tmp_path / "run", [tmp_path / f"holder{k}" for k in range(3)], n.EPSILON)
    assert lines_of(tmp_path / "holder0", 0) == undisturbed[1]
    want = undisturbed[0].network.state_dict()
    for name, value in made.network.state_dict().items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("place", PLACES)
def test_a_service_killed_and_not_asked_again_loses_a_round_and_no_line(
    place: str, tmp_path: Path
) -> None:
    """Noise is secret; what was written and never answered comes to the server's copy later."""
    if place in ("before a run is begun", "ledger begun, terms not kept", "joined, not answered"):
        with pytest.raises(ValueError, match=r"client 0 .* does not answer"):
            run(tmp_path, place, simulation=False, patient=False)
        assert lines_of(tmp_path / "holder0", 0) == []
        return
    made, deaths = run(tmp_path, place, simulation=False, patient=False)
    assert deaths == 1
    check_books(tmp_path / "run", [tmp_path / f"holder{k}" for k in range(3)], n.EPSILON)
    own = lines_of(tmp_path / "holder0", 0)
    assert {repr(line) for line in made.ledger.releases if line.client == 0} == set(map(repr, own))
    lost = place in ("before training", "before the ledger line", "half a ledger line")
    assert len(own) == ROUNDS - lost
