"""What a stop does in one process: who is told, who waits, who is ended, and what is said."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from fl_lightning import ledger as ledgers
from fl_lightning.command import restarts
from fl_lightning.output.checkpoint import CHECKPOINT
from fl_lightning.processes.launching import raise_if_stopped, stop_of, stoppable
from fl_lightning.processes.lifeline import DONE, Lifeline
from fl_lightning.processes.stopping import LOST, Stop, Stopped
from fl_lightning.processes.together import ProcessLost
from tests.fl_lightning.resuming import RECORD, go
from tests.fl_lightning.stop_signals import HUP, INT, TERM, asked_by


@pytest.fixture
def pair() -> Iterator[list[Lifeline]]:
    """Lifelines of processes 0 and 1."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        ends = server.accept()[0], one
    lines = [Lifeline({1 - rank: end}) for rank, end in enumerate(ends)]
    yield lines
    for line in lines:
        line.close()


@pytest.fixture
def hang_up() -> Iterator[None]:
    """SIGHUP as it is in a terminal: under nohup it is ignored, and stays so."""
    before = signal.signal(HUP, signal.SIG_DFL)
    yield
    signal.signal(HUP, before)


# The others -------------------------------------------------------------------------------------


def test_who_leaves_says_why_before_it_is_gone(pair: list[Lifeline]) -> None:
    stop = Stop()
    stop.join(pair[1], 1)
    stop.asked = TERM
    stop.leave()
    assert pair[0].hear() == [(1, TERM)]
    assert pair[0].hear() == [(1, None)]


def test_who_has_no_more_work_is_not_lost(pair: list[Lifeline]) -> None:
    with Stop() as other:
        other.join(pair[0], 0)
        stop = Stop()
        stop.join(pair[1], 1)
        stop.part()
        stop.leave()
        assert asked_by(other, 0.5) is None
        other.leave()


@pytest.mark.usefixtures("hang_up")
def test_the_first_that_is_asked_counts(pair: list[Lifeline]) -> None:
    with Stop() as stop:
        stop.training = True
        stop.join(pair[1], 1)
        for signum in (HUP, TERM):
            os.kill(os.getpid(), signum)
            time.sleep(0.1)
        pair[0].close()  # it has left because of the same stop
        time.sleep(0.1)
        stop.leave()
    assert stop.status == 128 + HUP


def test_news_are_waited_for_after_a_collective_has_failed(pair: list[Lifeline]) -> None:
    with Stop() as stop:
        stop.training = True
        stop.join(pair[1], 1)
        threading.Timer(0.3, pair[0].tell, [TERM]).start()
        stop.settle()
        assert stop.asked == TERM
        stop.leave()


@pytest.mark.parametrize(("rank", "says"), [(0, False), (1, True), (2, False)])
def test_one_process_says_that_the_first_was_lost(
    pair: list[Lifeline], capfd: pytest.CaptureFixture[str], rank: int, says: bool
) -> None:
    with Stop() as stop:
        stop.advice = lambda: "go on"
        stop.join(pair[1], rank)
        pair[0].close()
        assert asked_by(stop, 5.0) == LOST
        stop.finish()
    assert capfd.readouterr().err == "a process of the run was lost; go on\n" * says


# A process that does not leave ------------------------------------------------------------------


def in_fork(work: Callable[[], Any]) -> tuple[int, float]:
    """Exit status of a forked process, and how many seconds it took."""
    start, child = time.monotonic(), os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(7)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, time.monotonic() - start


def stubborn(seconds: float, *signums: int, training: bool = False) -> None:
    """Work that swallows whatever is raised in it."""
    until = time.monotonic() + seconds
    signal.signal(INT, signal.default_int_handler)  # in the background it may be ignored
    with Stop(program=True) as stop:
        stop.training = training
        for number, signum in enumerate(signums, 1):
            threading.Timer(0.4 * number, os.kill, [os.getpid(), signum]).start()
        while time.monotonic() < until:
            with contextlib.suppress(SystemExit):
                time.sleep(0.05)


def test_who_swallows_a_stop_is_ended() -> None:
    status, seconds = in_fork(lambda: stubborn(20.0, TERM))
    assert status == 128 + TERM
    assert seconds < 15


def test_who_is_told_by_another_is_interrupted(pair: list[Lifeline]) -> None:
    def work() -> None:
        with Stop(program=True) as stop:
            stop.join(pair[1], 1)
            try:
                time.sleep(20)
            except Stopped:
                os._exit(9)

    threading.Timer(0.3, pair[0].tell, [TERM]).start()
    assert in_fork(work)[0] == 9


def test_a_round_is_not_waited_for_longer_than_promised() -> None:
    status, seconds = in_fork(lambda: stubborn(25.0, TERM, training=True))
    assert status == 128 + TERM
    assert 5.0 < seconds < 20


def test_a_second_interrupt_ends_a_round_at_once() -> None:
    status, seconds = in_fork(lambda: stubborn(20.0, INT, INT, training=True))
    assert status == 128 + INT
    assert seconds < 4.5


def test_a_child_that_is_sent_a_signal_while_it_is_made_asks_nothing_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.signal(TERM, signal.SIG_DFL)
    try:
        with Stop() as stop:
            forget = stop._forget

            def late() -> None:
                os.kill(os.getpid(), TERM)
                time.sleep(0.2)
                forget()

            monkeypatch.setattr(stop, "_forget", late)
            assert in_fork(lambda: time.sleep(5))[0] == -TERM
            assert asked_by(stop, 0.5) is None
            monkeypatch.undo()
    finally:
        signal.signal(TERM, before)


# Errors -----------------------------------------------------------------------------------------


def test_an_error_of_a_stop_ends_the_run_by_its_status(capfd: pytest.CaptureFixture[str]) -> None:
    stop = Stop()
    stop.asked = TERM
    with pytest.raises(SystemExit) as ended, stoppable(stop):
        raise RuntimeError("a collective failed")
    assert ended.value.code == 128 + TERM
    assert capfd.readouterr().err == "stopped by SIGTERM\n"
    with pytest.raises(SystemExit) as ended, stoppable(Stop()):
        raise ProcessLost("process 1")
    assert ended.value.code == 1


def test_an_error_of_the_run_stays_one(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), stoppable(Stop()):
        raise KeyError("wrong")
    assert capfd.readouterr().err == ""
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    raise_if_stopped(KeyError("wrong"), trainer)
    stop_of(trainer, Stop()).asked = TERM
    with pytest.raises(Stopped):
        raise_if_stopped(KeyError("wrong"), trainer)


def test_who_ends_well_is_no_loss(pair: list[Lifeline]) -> None:
    stop = Stop()
    stop.join(pair[1], 1)
    with stoppable(stop):
        pass
    assert pair[0].hear() == [(1, DONE)]


# Rounds -----------------------------------------------------------------------------------------


class AskInRound(pl.Callback):
    """A signal in the middle of a round."""

    def __init__(self, round: int) -> None:
        self.round = round

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == self.round:
            stop_of(trainer, Stop()).asked = TERM


def test_a_round_that_was_asked_to_stop_is_saved_and_the_last(tmp_path: Path) -> None:
    with pytest.raises(Stopped) as ended:
        go(tmp_path, 4, privacy=RECORD, every=50, callbacks=[AskInRound(1)])
    assert ended.value.code == 128 + TERM
    saved = torch.load(tmp_path / CHECKPOINT, weights_only=False)["aadp_fl"]["releases"]
    assert saved == len(ledgers.read(tmp_path)[1]) == 6


# What a command goes on from --------------------------------------------------------------------


def test_rounds_without_noise_are_not_begun_anew_either(tmp_path: Path) -> None:
    (tmp_path / "rounds.csv").write_text("round\n0\n")
    with pytest.raises(ValueError, match=r"rounds\.csv holds rounds"):
        restarts.settle("auto", str(tmp_path), [])


def test_a_job_that_was_put_back_goes_on_without_being_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / CHECKPOINT).parent.mkdir()
    (tmp_path / CHECKPOINT).touch()
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    for count, path in (("0", None), ("", None), ("1", str(tmp_path / CHECKPOINT))):
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        assert restarts.settle(None, str(tmp_path), [])[0] == path
    assert restarts.settle("other.ckpt", str(tmp_path), [])[0] == "other.ckpt"
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert restarts.settle(None, str(tmp_path), [])[0] is None
