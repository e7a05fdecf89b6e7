"""Started processes: whose loss is noticed, and that none outlives its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_lightning.processes.child import PARENT, behind
from fl_lightning.processes.stopping import LOST, Stop, Stopped
from tests.fl_lightning.stop_signals import HUP, TERM, asked_by


def test_a_signal_before_all_are_connected_ends_the_processes_that_were_started() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        with Stop() as stop:
            stop.training = True
            stop.watch_over([child])
            os.kill(os.getpid(), TERM)
            assert child.wait(5) == -TERM
            stop.leave()
    finally:
        child.kill()


def test_a_process_that_begins_while_a_signal_comes_is_ended() -> None:
    children: list[subprocess.Popen[bytes]] = []
    with Stop() as stop:
        stop.training = True
        stop.watch_over(children)
        os.kill(os.getpid(), TERM)
        assert asked_by(stop, 5.0) == TERM
        time.sleep(0.3)
        children.append(subprocess.Popen(["sleep", "60"]))
        stop.finish()
    assert children[0].wait(5) == -TERM


def test_a_process_that_is_started_while_a_signal_comes_is_known() -> None:
    children: list[subprocess.Popen[bytes]] = []
    stopped = False
    with Stop() as stop:
        stop.watch_over(children)
        try:
            with stop.starting():
                os.kill(os.getpid(), TERM)
                assert asked_by(stop, 5.0) == TERM
                time.sleep(1.0)  # the main thread is pressed again and again
                children.append(subprocess.Popen(["sleep", "60"]))
        except Stopped:
            stopped = True
        stop.finish()
    assert stopped
    assert [child.poll() for child in children] == [-TERM]  # waited for: not even a zombie is left


@pytest.mark.parametrize(("command", "asked"), [("false", LOST), ("true", None)])
def test_a_started_process_that_fails_is_a_loss(command: str, asked: int | None) -> None:
    child = subprocess.Popen([command])
    child.wait()
    with Stop() as stop:
        stop.watch_over([child])
        assert asked_by(stop, 5.0 if command == "false" else 0.8) == asked
        stop.leave()
        assert stop.status == 1


@pytest.mark.parametrize("there", [True, False])
def test_a_started_process_ends_when_its_parent_is_gone(
    monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    monkeypatch.setenv(PARENT, f"{os.getppid() if there else 1}:{os.getpid()}")
    with Stop() as stop:
        assert asked_by(stop, 0.8 if there else 5.0) == (None if there else LOST)
        stop.leave()


def test_a_process_that_a_started_process_starts_has_another_parent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(PARENT, "1:1")
    with Stop() as stop:
        assert asked_by(stop, 0.8) is None
        stop.leave()


@pytest.mark.parametrize(
    ("sent", "status", "asked"),
    [("TERM", -TERM, TERM), ("HUP", 128 + HUP, HUP), ("KILL", -9, LOST)],
)
def test_a_started_process_that_was_stopped_is_a_stop(sent: str, status: int, asked: int) -> None:
    ways = {True: f"kill -{sent} $$; sleep 60", False: f"exit {status}"}
    child = subprocess.Popen(["sh", "-c", ways[status < 0]])
    assert child.wait(5) == status
    with Stop() as stop:
        stop.training = True  # there is time to look
        stop.watch_over([child])
        assert asked_by(stop, 5.0) == asked
        stop.leave()


LONG_EXIT = """
import atexit, os, signal, sys, time
from fl_lightning.processes.stopping import Stop, Stopped
from fl_lightning.processes.launching import stoppable

class Slow:
    def __del__(self):
        time.sleep(600)

kept = Slow()
atexit.register(print, "done at exit", end="")
stop = Stop(program=True)
try:
    with stoppable(stop):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
finally:
    print("done by the script")
"""


def test_a_run_that_was_stopped_is_not_taken_apart() -> None:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    env.pop("PYTHONUNBUFFERED", None)
    done = subprocess.run(
        [sys.executable, "-c", LONG_EXIT], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 128 + TERM, done.stderr
    assert done.stdout == "done by the script\ndone at exit"
    assert done.stderr == "stopped by SIGTERM\n"


# A process that still imports --------------------------------------------------------------------

BOTH = """
import subprocess, sys
from fl_lightning.processes.child import behind
child = subprocess.Popen(behind([sys.executable, "-c", {command!r}]))
print(child.pid, flush=True)
child.wait()
"""
BUSY = "import time; {first}; open('there', 'w').close(); time.sleep(60)"


def orphaned(folder: Path, first: str) -> Iterator[int]:
    """Number of a process behind `child`, and again when its parent was killed."""
    script = BOTH.format(command=BUSY.format(first=first))
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    starter = subprocess.Popen(
        [sys.executable, "-c", script], cwd=folder, env=env, stdout=subprocess.PIPE, text=True
    )
    with starter:
        assert starter.stdout is not None
        child = int(starter.stdout.readline())
        until = time.monotonic() + 30
        while not (folder / "there").exists() and time.monotonic() < until:
            time.sleep(0.01)
        yield child
        starter.kill()
        starter.wait()
        yield child


def is_there(process: int, seconds: float) -> bool:
    """Whether a process is there after some seconds, or until then."""
    stat = Path(f"/proc/{process}/stat")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
                time.sleep(0.01)
                continue
        return False
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can do it")
@pytest.mark.parametrize("watches", [False, True])
def test_a_process_that_imports_ends_with_its_parent(tmp_path: Path, watches: bool) -> None:
    first = "from fl_lightning.processes.child import *; assert parent(); "
    first += "outlive_parent()" if watches else "pass"
    before, after = orphaned(tmp_path, first), 5.0
    child = next(before)
    assert is_there(child, 0.3)
    next(before)
    try:
        assert is_there(child, 0.5 if watches else after) == watches
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_a_process_whose_parent_is_gone_before_it_begins_ends() -> None:
    command = behind([sys.executable, "-c", "raise SystemExit(7)"])
    assert subprocess.run(command, check=False).returncode == 7
    command[command.index(str(os.getpid()))] = "1"
    assert subprocess.run(command, check=False).returncode == 1


def test_a_stop_notices_itself_that_its_parent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("fl_lightning.processes.stopping.outlive_parent", lambda: calls.append(1))
    for own in (1, os.getpid()):
        monkeypatch.setenv(PARENT, f"{os.getppid()}:{own}")
        with Stop() as stop:
            assert stop.asked is None
    assert calls == [1]
