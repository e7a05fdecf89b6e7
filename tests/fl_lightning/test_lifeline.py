"""Sockets between processes, and what a process does when it hears of a stop."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fl_lightning.processes.lifeline import DONE, Lifeline
from fl_lightning.processes.stopping import LOST, Stop, Stopped
from fl_lightning.processes.together import Processes


class Meeting(Processes):
    """Processes that are threads: rank 0's word reaches the others."""

    def __init__(self, rank: int, size: int, box: list[Any], ready: threading.Event) -> None:
        super().__init__(rank, size)
        self.box, self.ready = box, ready

    def first(self, work: Callable[[], Any]) -> Any:
        if self.rank == 0:
            self.box.append(work())
            self.ready.set()
        assert self.ready.wait(10)
        return self.box[0]


@pytest.fixture
def three() -> Iterator[list[Lifeline]]:
    box: list[Any] = []
    ready, lines = threading.Event(), {}

    def connect(rank: int) -> None:
        lines[rank] = Lifeline.connect(Meeting(rank, 3, box, ready), "localhost")

    threads = [threading.Thread(target=connect, args=(rank,)) for rank in range(3)]
    for thread in threads[:2]:
        thread.start()
    assert ready.wait(10)
    with socket.create_connection(("localhost", box[0][0])) as stranger:
        stranger.sendall(bytes(19) + b"\x02")  # a wrong token, and the rank of another
    threads[2].start()
    for thread in threads:
        thread.join(10)
    sockets = [end for line in lines.values() for end in line.sockets]
    yield [lines[rank] for rank in range(3)]
    for end in sockets:
        end.close()


def heard(line: Lifeline) -> list[tuple[int, int | None]]:
    until = time.monotonic() + 10
    while not (found := line.hear()) and time.monotonic() < until:
        time.sleep(0.01)
    return found


def test_a_word_to_process_0_and_from_it_to_all(three: list[Lifeline]) -> None:
    three[2].tell(15)
    assert heard(three[0]) == [(2, 15)]
    three[0].tell(15)
    assert heard(three[1]) == heard(three[2]) == [(0, 15)]
    assert three[1].hear() == []


def test_an_end_is_a_loss_unless_it_was_said(three: list[Lifeline]) -> None:
    three[1].tell(DONE)
    assert heard(three[0]) == [(1, DONE)]
    three[1].close()
    three[2].close()
    assert heard(three[0]) == [(2, None)]
    assert not three[0].sockets


@pytest.mark.parametrize("training", [False, True])
def test_a_stop_reaches_the_others(three: list[Lifeline], training: bool) -> None:
    with Stop() as stop:
        stop.training = training
        stop.join(three[1], 1)
        if training:
            three[0].tell(signal.SIGTERM)
            until = time.monotonic() + 10
            while stop.asked is None and time.monotonic() < until:
                time.sleep(0.01)  # the round goes on
            with pytest.raises(Stopped) as ended:
                stop.check()
        else:
            threading.Timer(0.3, three[0].tell, [signal.SIGTERM]).start()
            with pytest.raises(Stopped) as ended:
                time.sleep(10)
        stop.leave()
    assert ended.value.code == 143
    assert (0, None) not in three[0].hear()


@pytest.fixture
def hang_up() -> Iterator[None]:
    """SIGHUP as it is in a terminal: under nohup it is ignored, and stays so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hang_up")
def test_a_signal_is_told_to_process_0(three: list[Lifeline]) -> None:
    with Stop() as stop:
        stop.training = True
        stop.join(three[1], 1)
        os.kill(os.getpid(), signal.SIGHUP)
        assert heard(three[0])[0] == (1, signal.SIGHUP)
        stop.leave()
    assert stop.status == 129


def test_a_loss_is_told_to_all(three: list[Lifeline]) -> None:
    with Stop() as stop:
        stop.join(three[0], 0)
        three[2].close()
        assert heard(three[1]) == [(0, LOST)]
        stop.leave()
    assert stop.status == 1


def test_signals_are_handed_back_and_those_ignored_stay_so() -> None:
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop, stop:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
            child = os.fork()
            if child == 0:  # its signals are not the run's
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
            time.sleep(0.3)
            assert stop.asked is None
    finally:
        signal.signal(signal.SIGHUP, before)
    assert handlers == {n: signal.getsignal(n) for n in handlers}
    assert signal.set_wakeup_fd(-1) == -1


def test_a_forked_child_answers_signals_as_before() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with Stop() as stop:
            child = os.fork()
            if child == 0:
                time.sleep(10)
                os._exit(0)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
            time.sleep(0.3)
            assert stop.asked is None
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_childs_own_signals_are_not_heard_by_the_run() -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
    try:
        with Stop() as stop:
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
            child = os.fork()
            if child == 0:
                time.sleep(10)
                os._exit(0)
            assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
            time.sleep(0.3)
            assert stop.asked is None
    finally:
        signal.signal(signal.SIGTERM, before)


def test_only_the_outermost_end_hands_signals_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        stop.training = True
        with stop:
            taken = signal.getsignal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == taken != before
        stop.leave()
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_nothing_is_taken_over() -> None:
    found = []

    def work() -> None:
        with Stop():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]
