"""How a run ends before its end: by a signal to any of its processes, or because one was lost.

A stop is heard by a thread, since the main thread may be in a collective or in a long computation,
where Python runs no signal handler. The thread tells the other processes. While rounds are trained,
the main thread has `PATIENCE` seconds to finish the round and its checkpoint; then, and at once
outside of rounds, `Stopped` is raised in it. A main thread that does not leave is left: the process
ends as if it was killed, which the ledger and the checkpoint are made for.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from fl_lightning.processes import slurm
from fl_lightning.processes.child import outlive_parent, parent
from fl_lightning.processes.departure import leave_with
from fl_lightning.processes.lifeline import DONE, Lifeline

PATIENCE = 5.0  # seconds that a round has to finish after a signal
LAST_CALL = 2.0  # seconds from `Stopped` in the main thread until the process is ended
ALL_GONE = 8.5  # seconds after a signal at which no process of the run is left
GRIEF = 2.0  # seconds that the main thread has to find out itself that a process is lost
LOST = 0  # in place of a signal's number: another process is gone
_TICK = 0.25  # seconds
_NEVER = float("inf")


class Stopped(SystemExit):
    """The run is to stop: by a signal, or since another process is gone.

    Its code is the exit status: 128 + signal; 1 for a lost process.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum if signum else 1)
        self.signum = signum


class Stop:
    """Whether this process was asked to stop. As a context, which can be reused, it takes signals.

    SIGTERM, SIGINT and SIGHUP stop a run, under SLURM SIGUSR1 as well. A signal that was ignored
    when the process began (nohup) stays so. Without the context, or outside the main thread, it
    hears of nothing.

    Args:
        program: whether the process is the run: it must then be gone in time after a stop,
            whatever is done at its exit.

    Attributes:
        asked: number of the signal, LOST, or None.
        training: whether rounds are trained, which may finish.
        advice: says in words how to go on, for the line at the end.
        rank: of this process; the line comes from rank 0, or from 1 if 0 is lost.
    """

    def __init__(self, program: bool = False) -> None:
        self.asked: int | None = None
        self.training = False
        self.advice: Callable[[], str] | None = None
        self.rank = _rank()
        self._main = threading.main_thread().ident
        self._children: list[subprocess.Popen[Any]] = []
        self._parent = parent()
        self._line: Lifeline | None = None
        self._gone: list[int] = []
        self._since = self._interrupt_at = self._end_at = _NEVER
        self._leaving = self._starting = self._said = self._told = False
        self._program = program
        self._depth = 0
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None

    # Signals ------------------------------------------------------------------------------------

    def __enter__(self) -> Stop:
        self._depth += 1
        if self._depth == 1 and threading.get_ident() == self._main:
            self._take_over()
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0 and not (self._program and self.asked is not None):
            self._hand_back()

    def _take_over(self) -> None:
        # The pipe is read by the thread: this one may not come to Python for a long time.
        reading, writing = os.pipe()
        for end in (reading, writing):
            os.set_blocking(end, False)
        self._pipe = (reading, writing)
        self._wakeup_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for signum in _signals():
            if signal.getsignal(signum) is not signal.SIG_IGN or signum == signal.SIGTERM:
                self._before[signum] = signal.signal(signum, self._on_signal)
        _ACTIVE.add(self)
        self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)
        self._thread.start()
        if self._parent:
            outlive_parent()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _signals())

    def _hand_back(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None or self._pipe is None:
            return
        _ACTIVE.discard(self)
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._before = {}
        os.write(self._pipe[1], b"\0")
        thread.join(1.0)
        for end in self._pipe:
            os.close(end)
        self._pipe = None

    def _forget(self) -> None:
        """In a forked child: its signals are none of the run's."""
        self._thread = None
        signal.set_wakeup_fd(-1)
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        """In the main thread, between two operations of Python."""
        self._ask(signum)
        waits = self._leaving or self._starting
        if not waits and time.monotonic() >= self._interrupt_at:
            self._interrupt_at = time.monotonic() + 1.0  # should something swallow the exception
            raise Stopped(self.asked or LOST)

    # The others ---------------------------------------------------------------------------------

    def join(self, line: Lifeline, rank: int) -> None:
        """Hear what the other processes are told, and tell them."""
        self._line, self.rank = line, rank
        atexit.register(self.part)

    def part(self) -> None:
        """This process has no more work: its end is no loss to the others."""
        if self._line is not None:
            self._line.tell(DONE)

    def watch_over(self, children: list[subprocess.Popen[Any]]) -> None:
        """Take processes that this one starts: they end with it, and it ends if one fails."""
        self._children = children

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """While processes are started: `Stopped` waits until each of them is known.

        Raises:
            Stopped: at the end, a stop was asked for meanwhile.
        """
        self._starting = True
        try:
            yield
        finally:
            self._starting = False
        if self.asked is not None and time.monotonic() >= self._interrupt_at:
            raise Stopped(self.asked)

    def settle(self) -> None:
        """Wait a moment for news of the others: after a failed collective, why it failed."""
        until = time.monotonic() + 1.0
        while self._line is not None and self._thread and self.asked is None:
            if time.monotonic() > until:
                return
            time.sleep(0.01)

    def check(self) -> None:
        """The place between two rounds.

        Raises:
            Stopped: a signal came to a process of the run.
        """
        if self.asked:
            raise Stopped(self.asked)

    # The thread ---------------------------------------------------------------------------------

    def _watch(self) -> None:
        assert self._pipe is not None
        interrupts = 0
        press_at = 0.0
        while self._thread is not None:
            line = self._line
            with contextlib.suppress(OSError, ValueError):  # a socket that was just closed
                select.select([self._pipe[0], *(line.sockets if line else [])], [], [], _TICK)
            if self._thread is None:
                return
            with contextlib.suppress(BlockingIOError):
                for signum in os.read(self._pipe[0], 64):
                    interrupts += signum == signal.SIGINT
                    self._ask(signum)
            self._hear(line)
            self._tell()
            now = time.monotonic()
            if now >= self._end_at or interrupts > 1:  # a second Ctrl-C
                self._end()
            if now >= max(self._interrupt_at, press_at) and not self._leaving:
                press_at = now + 2 * _TICK  # what is sent comes back through the pipe
                assert self._main is not None
                signal.pthread_kill(self._main, signal.SIGTERM)

    def _hear(self, line: Lifeline | None) -> None:
        for rank, word in line.hear() if line else []:
            if word == DONE:
                self._parent = 0 if rank == 0 else self._parent
            elif word is not None:
                self._ask(word)
            elif self.asked is None:
                self._gone.append(rank)
                self._ask(LOST)
            else:
                # A process that has left takes part in no round any more.
                self._hurry(1.0)
        self._look_after_family()

    def _look_after_family(self) -> None:
        """Note that a process ended that this one started, or the one that started it."""
        failed = [status for child in self._children if (status := child.poll())]
        if self.asked is not None:
            return
        if failed:
            self._ask(max(map(_cause, failed)))
        elif self._parent and os.getppid() != self._parent:
            self._gone.append(0)
            self._ask(LOST)

    def _ask(self, signum: int) -> None:
        """Note what is asked and until when it must be done; the first counts."""
        if self.asked is not None or signum not in (*_signals(), LOST):
            return
        if signum == LOST and (self._leaving or self._thread is None):
            return
        now = time.monotonic()
        wait = GRIEF if signum == LOST else PATIENCE if self.training else 0.0
        self._since = now
        self._interrupt_at = now + wait
        self._end_at = now + wait + LAST_CALL
        self.asked = signum
        if self._leaving:
            self.leave()

    def _hurry(self, seconds: float) -> None:
        now = time.monotonic()
        if not self._leaving:
            self._interrupt_at = min(self._interrupt_at, now + seconds)
            self._end_at = min(self._end_at, now + seconds + LAST_CALL)

    def _tell(self) -> None:
        """Let the others hear what was asked, once."""
        if self.asked is None or self._told:
            return
        self._told = True
        if self._line is not None:
            self._line.tell(self.asked)
        else:
            self._end_unconnected()

    def _end_unconnected(self) -> None:
        """Let processes know that cannot hear yet; one that just began may have been missed."""
        for child in self._children if self._line is None else []:
            child.terminate()

    def _end(self) -> None:
        """End the process from here, as if it was killed."""
        for child in self._children:
            child.kill()
        self._say()
        os._exit(self.status)

    # The end ------------------------------------------------------------------------------------

    def leave(self) -> None:
        """The main thread is on its way out: it is not interrupted, but must be gone in time."""
        self._leaving = True
        if self.asked is not None:
            self._end_at = max(time.monotonic() + 1.0, self._since + ALL_GONE)
            self._tell()
        if self._line is not None:
            self._line.close()  # so that nobody waits for this process

    def fail(self) -> None:
        """The run ends by an error of its own, which is explained elsewhere."""
        self._said = True
        self.leave()
        self.end_children()

    def finish(self) -> int:
        """Say how to go on, when the processes that this one started have ended; exit status."""
        self.leave()
        self.end_children()
        self._say()
        if self._program:
            leave_with(self.status)
        return self.status

    def end_children(self) -> None:
        """Wait for the processes that this one started; kill those that do not end."""
        self._end_unconnected()
        until = min(time.monotonic() + PATIENCE, self._end_at - 1.0)
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, until - time.monotonic()))
            child.kill()

    @property
    def status(self) -> int:
        """Exit status of a run that was stopped."""
        return Stopped(self.asked or LOST).code  # pyright: ignore[reportReturnType]

    def _say(self) -> None:
        """One line from one process; under SLURM, the job is put back into the queue."""
        speaks = self.rank == (1 if 0 in self._gone else 0) and not self._said
        self._said = True
        if not speaks:
            return
        words, waits = ["a process of the run was lost"], False
        if self.asked:
            words = [f"stopped by {signal.Signals(self.asked).name}"]
        if self.asked == signal.SIGUSR1:
            failed = slurm.requeue()
            words.append(failed or f"job {slurm.job()} is requeued and goes on by itself")
            waits = failed is None
        if self.advice is not None and not waits:
            words.append(self.advice())
        if sys.stdout.isatty():
            _write(1, "\x1b[?25h")  # a progress bar hides the cursor
        _write(2, "; ".join(words) + "\n")


_ACTIVE: weakref.WeakSet[Stop] = weakref.WeakSet()
_FORKING = threading.local()


def _hold_signals() -> None:
    # A child that is sent a signal before it has forgotten would write it into the run's pipe.
    _FORKING.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _signals() if len(_ACTIVE) else [])


def _let_go_of_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _FORKING.mask)


def _forget_in_child() -> None:
    for stop in list(_ACTIVE):
        stop._forget()
    _let_go_of_signals()


os.register_at_fork(
    before=_hold_signals,
    after_in_parent=_let_go_of_signals,
    after_in_child=_forget_in_child,
)


def _signals() -> list[int]:
    """Signals that stop a run."""
    known = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    return [*known, signal.SIGUSR1] if slurm.in_batch() else [*known]


def _cause(status: int) -> int:
    """Why a process failed: the number of the signal that stopped it, else LOST."""
    signum = -status if status < 0 else status - 128
    return signum if signum in _signals() else LOST


def _rank() -> int:
    """This process's number before the processes are connected."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return int(next((os.environ[name] for name in names if os.environ.get(name)), 0))


def _write(descriptor: int, text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal is gone
        os.write(descriptor, text.encode())
