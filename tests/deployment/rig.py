"""A federation on this machine whose parts are killed and started again, as supervisors do it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from fl_lightning.deploy.loopback import Loopback, demonstration, server_arguments
from fl_lightning.output.checkpoint import CHECKPOINT
from tests.deployment.books import ledgers_of, processes_of, raw_lines

# A SuperNode that comes back earlier is sent away: the SuperLink still takes it for online.
SUPERNODE_REST = 62.0
NODES, EPSILON = 2, 8.0


class Rig:
    """The federation, its run and what was seen of the ledgers so far."""

    def __init__(self, folder: Path, rounds: int) -> None:
        node, policy = demonstration(NODES, rounds, "digits")
        self.federation = Loopback(folder, NODES, node, policy)
        self.folder, self.rounds, self.run = folder, rounds, folder / "run"
        self.holders = [folder / f"holder{k}" for k in range(NODES)]
        self.submitted = 0
        self.told: list[str] = []
        self._seen: dict[Path, list[bytes]] = {}
        self._base: dict[str, float] = {}
        self._random = random.Random(1)

    # What can be seen from outside ---------------------------------------------------------------

    def serverapps(self) -> list[int]:
        """Process ids of the ServerApp."""
        return [p for p, name in processes_of(self.folder).items() if "flwr-serverapp" in name]

    def clientapps(self) -> list[int]:
        """Process ids of messengers."""
        return [p for p, name in processes_of(self.folder).items() if "flwr-clientapp" in name]

    def rounds_done(self) -> int:
        """Rows of the run's table."""
        path = self.run / "rounds.csv"
        return path.read_bytes().count(b"\n") - 1 if path.exists() else 0

    def holder_lines(self) -> int:
        """Lines of all holders' ledgers."""
        return sum(len(raw_lines(f)) for holder in self.holders for f in ledgers_of(holder))

    def facts(self) -> dict[str, float]:
        """How far everything is."""
        checkpoint = self.run / CHECKPOINT
        return {
            "folder": float(self.run.exists()),
            "begun": float(sum(len(ledgers_of(holder)) for holder in self.holders)),
            "copied": float(len(raw_lines(self.run))),
            "paid": float(self.holder_lines()),
            "kept": checkpoint.stat().st_mtime if checkpoint.exists() else 0.0,
            "rounds": float(self.rounds_done()),
        }

    def ended(self) -> bool:
        """Whether the run has done all its rounds and left nothing behind."""
        return (self.run / "summary.json").exists() and not self.serverapps()

    # Places -----------------------------------------------------------------------------------

    def mark(self) -> None:
        """What is new is new from here."""
        self._base = self.facts()

    def grew(self, fact: str) -> Callable[[], bool]:
        """Whether something has grown since the mark."""
        return lambda: self.facts()[fact] > self._base.get(fact, 0.0)

    def later(self, fact: str, most: float) -> Callable[[], bool]:
        """The same, and up to so many seconds after that."""
        grew, delay = self.grew(fact), self._random.uniform(0.0, most)
        since: list[float] = []

        def there() -> bool:
            if not since and grew():
                since.append(time.monotonic())
            return bool(since) and time.monotonic() >= since[0] + delay

        return there

    def after(self, most: float) -> Callable[[], bool]:
        """Up to so many seconds from now."""
        end = time.monotonic() + self._random.uniform(0.0, most)
        return lambda: time.monotonic() >= end

    def until(self, there: Callable[[], bool], seconds: float = 240.0) -> bool:
        """Wait for something; whether it came."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if there():
                return True
            time.sleep(0.005)
        return False

    # Parts -------------------------------------------------------------------------------------

    def submit(self) -> None:
        """Start the ServerApp; a run that has begun goes on from its own checkpoint."""
        assert self.until(lambda: not self.serverapps(), 60)
        options = {"run-dir": str(self.run), "nodes": NODES, "round-timeout": 120.0}
        options["arguments"] = server_arguments(self.rounds, "digits")
        self.federation.submit(options, stream=False)
        self.submitted += 1

    def kill_serverapp(self) -> None:
        """As if the memory had run out."""
        for pid in self.serverapps():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def restart_superlink(self) -> None:
        """Start it again on its database."""
        self.federation.start_superlink()
        self.federation.wait("superlink", self.federation._healthy)

    # Books -------------------------------------------------------------------------------------

    def look(self) -> None:
        """No line that stood in a ledger may be gone or changed; ledgers without releases may."""
        for path, lines in self._seen.items():
            if len(lines) > 1:
                assert raw_lines(path)[: len(lines)] == lines, f"{path} lost lines"
        folders = [f for holder in self.holders for f in ledgers_of(holder)] + [self.run]
        self._seen = {path: raw_lines(path) for path in folders}

    def go_on(self, seconds: float = 600.0) -> str:
        """Wait for another round, with a new ServerApp wherever there is none; how it went."""
        done, began, times = self.rounds_done(), time.monotonic(), 0
        while not self.ended() and self.rounds_done() <= done:
            assert time.monotonic() < began + seconds, self.log()[-3000:]
            if not self.serverapps() and not self.until(lambda: bool(self.serverapps()), 15):
                if self.ended():
                    break
                self.submit()
                times += 1
            time.sleep(0.2)
        self.look()
        again = f", submitted {times} times" if times else ""
        return f"next round after {time.monotonic() - began:.0f} s{again}"

    def log(self) -> str:
        """What SuperLink and ServerApp said."""
        return self.federation.log("superlink").read_text(encoding="utf-8", errors="replace")

    def tell(self, what: str) -> None:
        """Keep a line of the protocol of the test."""
        facts = self.facts()
        self.told.append(
            f"{what} (rounds {facts['rounds']:.0f}, lines paid {facts['paid']:.0f}, "
            f"copied {facts['copied']:.0f})"
        )
        print(time.strftime("%H:%M:%S"), self.told[-1], flush=True)
