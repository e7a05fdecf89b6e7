"""Federated engines that take turns: each runs its own loop in a process and stops after a round.

An engine calls its `Turnstile` once a round, at the same point of its loop. There it waits for the
command to go on, so that one process after the other has the machine, and its time for a number of
rounds covers all that the engine does from one such point to the next.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.machine import ROOT

START_LIMIT = 180.0


def first() -> bool:
    """Whether this is the process of an engine that answers."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


class Turnstile:
    """The engine's end.

    Args:
        version: Of the engine.
        share: Hands rank 0's command to the other processes of an engine; None for one process.
        end: Called before the process ends.
    """

    def __init__(
        self,
        version: str,
        share: Callable[[Any], Any] | None = None,
        end: Callable[[], object] | None = None,
    ) -> None:
        self.version, self.share, self.end = version, share, end
        self.left, self.start = -1, 0.0
        self.answers: Any = None

    def __call__(self, model: Callable[[], Mapping[str, Tensor]], **facts: object) -> None:
        """A round ends here and the next begins; returns when it may.

        Args:
            model: Gives the global model as it is now.
            facts: Handed over with the model.
        """
        if self.left > 1:
            self.left -= 1
            return
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        if self.left == 1:
            self._say(seconds=time.perf_counter() - self.start)
        elif self.left == -1:
            self._say(version=self.version)
        self.left = 0
        while True:
            command = self._command()
            if command["do"] == "rounds":
                self.left, self.start = command["count"], time.perf_counter()
                return
            if command["do"] == "model":
                if not first():
                    continue
                state = {name: value.detach().cpu() for name, value in model().items()}
                torch.save(state, command["path"])
                self._say(**facts)
            else:
                if self.end is not None:
                    self.end()
                os._exit(0)

    def _command(self) -> dict[str, Any]:
        line = sys.stdin.readline() if first() else ""
        command = json.loads(line) if line else {"do": "end"}
        return command if self.share is None else self.share(command)

    def _say(self, **answer: object) -> None:
        if not first():
            return
        if self.answers is None:
            self.answers = os.fdopen(int(os.environ["BENCH_ANSWERS"]), "w")
        print(json.dumps(answer), file=self.answers, flush=True)


class Engine:
    """The benchmark's end: an engine in a process of its own.

    Args:
        command: What starts it; the file of the problem comes last.
        problem: What `torch.load` gives the engine.
        environment: Added to this process's environment.

    Raises:
        ImportError: It cannot start.
    """

    def __init__(
        self, command: list[str], problem: dict[str, Any], environment: Mapping[str, str]
    ) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="rounds_")
        path = Path(self.folder.name) / "problem.pt"
        torch.save(problem, path)
        self.log = Path(self.folder.name) / "log"
        read, write = os.pipe()
        self.answers = os.fdopen(read)
        path_list = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = {
            "PYTHONPATH": os.pathsep.join(path_list),
            "BENCH_ANSWERS": str(write),
            **environment,
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, str(path)], stdin=subprocess.PIPE, stdout=log, stderr=log, text=True,
                env={**os.environ, **settings}, pass_fds=(write,), cwd=self.folder.name,
            )  # fmt: skip
        os.close(write)
        timer = threading.Timer(START_LIMIT, self.process.kill)
        timer.start()
        try:
            self.version = str(self._read()["version"])
        except RuntimeError as error:
            self.close()
            raise ImportError(str(error)) from None
        finally:
            timer.cancel()

    def _read(self) -> dict[str, Any]:
        line = self.answers.readline()
        if not line:
            code = self.process.wait(timeout=60)
            said = [s for s in self.log.read_text(errors="replace").splitlines() if s.strip()]
            if os.environ.get("BENCH_LOG"):
                print("\n".join(said))
            raise RuntimeError(f"{said[-1].strip() if said else 'no output'} (exit code {code})")
        return json.loads(line)

    def _ask(self, **command: object) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._read()

    def rounds(self, count: int) -> float:
        """Seconds a round, over `count` rounds."""
        return float(self._ask(do="rounds", count=count)["seconds"]) / count

    def model(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The global model as it is now, and what else the engine tells."""
        path = Path(self.folder.name) / "model.pt"
        facts = self._ask(do="model", path=str(path))
        return torch.load(path), facts

    def peak(self, count: int) -> int | None:
        """Memory of all its processes while `count` rounds run, at the peak, in bytes."""
        found: list[int] = []
        done = threading.Event()

        def watch() -> None:
            while True:
                found.append(proportional_memory(self.process.pid))
                if done.wait(0.02):
                    break

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            self.rounds(count)
        finally:
            done.set()
            watcher.join()
        return max(found, default=0) or None

    def close(self) -> None:
        """End the engine and all that it started."""
        family = descendants(self.process.pid)
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid, born in family.items():
            # A number that was given to another process meanwhile is not ours to end.
            if started(pid) == born:
                os.kill(pid, 9)
        self.answers.close()
        self.folder.cleanup()


def started(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return None


def descendants(pid: int) -> dict[int, int]:
    """Children of a process and theirs, with the time each began."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(stat[1]), []).append(int(entry.name))
    found: dict[int, int] = {}
    waiting = [pid]
    while waiting:
        for child in parents.get(waiting.pop(), []):
            born = started(child)
            if born is not None:
                found[child] = born
                waiting.append(child)
    return found


def proportional_memory(pid: int) -> int:
    """Resident memory of a process and all below it, shared pages once, in bytes."""
    total = 0
    for each in (pid, *descendants(pid)):
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total
