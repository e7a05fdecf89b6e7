"""Every way of stopping a run ends all its processes, says how to go on, and loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_lightning import ledger as ledgers
from fl_lightning.command import restarts
from fl_lightning.output.checkpoint import CHECKPOINT
from fl_lightning.processes import slurm as jobs
from tests.fl_lightning.killing import assert_same_end
from tests.fl_lightning.stopped_runs import BOUND, COMMAND, GO_ON, Nursery, go_on, stop


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.process.kill()  # it holds nothing, and would take its time
    made.process.communicate()


Undisturbed = Callable[[int], Path]


@pytest.fixture(scope="module")
def undisturbed(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Runs of one or of two processes that nobody stopped."""

    @cache
    def run(processes: int) -> Path:
        folder = tmp_path_factory.mktemp(f"whole{processes}")
        answer = nursery(folder, processes=processes)
        assert answer["statuses"] == [0] * processes, answer["said"]
        return folder

    return run


TERM, INT, HUP, KILL, USR1 = (
    signal.Signals[f"SIG{name}"] for name in ("TERM", "INT", "HUP", "KILL", "USR1")
)
WAYS = [(way, to) for way in (TERM, INT) for to in ([0, 1], [0], [1])]
WAYS += [(HUP, [0, 1]), (KILL, [0]), (KILL, [1])]


def named(value: Any) -> str:
    return value.name if isinstance(value, signal.Signals) else str(value)


@pytest.mark.slow
def test_a_run_of_two_processes_that_is_stopped_again_and_again(
    nursery: Nursery, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    # One process is busy for too long, then for a second, then until it is killed.
    stops = [(TERM, [0, 1], {}), (INT, [0, 1], {"stay": 1.0}), (KILL, [0], {})]
    for number, (way, to, more) in enumerate(stops):
        again = ["--ckpt_path", "last"] if number else []
        order = {"place": "training", "call": 2, "signal": way, "to": to, "slow": [1], **more}
        check_words(stop(nursery, tmp_path, *again, processes=2, **order), way, to, GO_ON)
    assert 3 <= len({r.round for r in ledgers.read(tmp_path / "run")[1]}) < 6
    go_on(nursery, tmp_path, undisturbed(2), 2)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["training", "evaluation", "checkpointing"])
@pytest.mark.parametrize(("way", "to"), WAYS, ids=named)
def test_a_round_of_two_processes_that_takes_too_long(
    nursery: Nursery,
    tmp_path: Path,
    undisturbed: Undisturbed,
    place: str,
    way: signal.Signals,
    to: list[int],
) -> None:
    # One process is busy for ten minutes; the other one waits for it in a collective.
    busy = [0] if place == "checkpointing" else [1]
    answer = stop(nursery, tmp_path, processes=2, place=place, signal=way, to=to, slow=busy)
    check_words(answer, way, to, GO_ON)
    go_on(nursery, tmp_path, undisturbed(2), 2)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["training", "writing", "evaluation", "checkpointing"])
@pytest.mark.parametrize(("way", "to"), [(TERM, [0]), (TERM, [1]), (INT, [0, 1])], ids=named)
def test_a_round_of_two_processes_that_ends_in_time_is_kept(
    nursery: Nursery,
    tmp_path: Path,
    undisturbed: Undisturbed,
    place: str,
    way: signal.Signals,
    to: list[int],
) -> None:
    order = {"processes": 2, "place": place, "signal": way, "to": to, "stay": 1.5}
    check_words(stop(nursery, tmp_path, **order), way, to, GO_ON)
    saved = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=False)["aadp_fl"]["releases"]
    assert saved == len(ledgers.read(tmp_path / "run")[1]) > 0
    go_on(nursery, tmp_path, undisturbed(2), 2)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["calibration", "writing", "testing", "pictures"])
@pytest.mark.parametrize(("way", "to"), [(TERM, [0]), (TERM, [1]), (INT, [0, 1])], ids=named)
def test_two_processes_outside_of_training(
    nursery: Nursery,
    tmp_path: Path,
    undisturbed: Undisturbed,
    place: str,
    way: signal.Signals,
    to: list[int],
) -> None:
    if place == "pictures" and to == [1]:
        pytest.skip("process 1 has ended when pictures are drawn")
    to = [0] if place == "pictures" else to
    answer = stop(nursery, tmp_path, processes=2, place=place, signal=way, to=to, slow=[0])
    if place == "pictures":
        assert answer["statuses"] == [128 + way, 0]
    else:
        check_words(answer, way, to, "start again" if place == "calibration" else GO_ON)
    go_on(nursery, tmp_path, undisturbed(2), 2)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["training", "testing"])
@pytest.mark.parametrize(("way", "to"), [(TERM, [0, 1]), (TERM, [0]), (KILL, [1])], ids=named)
def test_two_processes_that_never_come_back_to_python(
    nursery: Nursery,
    tmp_path: Path,
    undisturbed: Undisturbed,
    place: str,
    way: signal.Signals,
    to: list[int],
) -> None:
    order = {"processes": 2, "place": place, "signal": way, "to": to, "deaf": True, "slow": [0]}
    check_words(stop(nursery, tmp_path, **order), way, to, GO_ON)
    go_on(nursery, tmp_path, undisturbed(2), 2)


def check_words(answer: dict[str, Any], way: signal.Signals, to: list[int], advice: str) -> None:
    """One line that says what happened and how to go on; exit statuses."""
    words = "a process of the run was lost" if way == KILL else f"stopped by {way.name}"
    assert answer["said"].count(f"{words}; ") == answer["said"].count("; ") == 1, answer["said"]
    assert advice in answer["said"].splitlines()[-1] or advice in answer["said"]
    status = 1 if way == KILL else 128 + way
    wanted = [-KILL if way == KILL and rank in to else status for rank in (0, 1)]
    assert answer["statuses"] == wanted, answer["said"]


PLACES = ["preflight", "calibration", "training", "writing", "evaluation", "checkpointing"]


@pytest.mark.slow
@pytest.mark.parametrize("place", [*PLACES, "testing", "pictures"])
@pytest.mark.parametrize("way", [TERM, INT, HUP], ids=named)
def test_one_process(
    nursery: Nursery,
    tmp_path: Path,
    undisturbed: Undisturbed,
    place: str,
    way: signal.Signals,
) -> None:
    answer = stop(nursery, tmp_path, place=place, signal=way, to=[0])
    assert answer["statuses"] == [128 + way]
    assert answer["said"].count("stopped by") == 1
    saved = (tmp_path / "run" / CHECKPOINT).exists()
    assert saved == (place not in ("preflight", "calibration"))
    advice = GO_ON if saved else "nothing was released: start again by the same command"
    assert f"stopped by {way.name}; {advice}" in answer["said"]
    go_on(nursery, tmp_path, undisturbed(1), 1)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["calibration", "training", "checkpointing", "testing"])
def test_one_process_that_never_comes_back_to_python(
    nursery: Nursery, tmp_path: Path, undisturbed: Undisturbed, place: str
) -> None:
    answer = stop(nursery, tmp_path, place=place, signal=TERM, to=[0], deaf=True)
    assert answer["statuses"] == [128 + TERM]
    assert answer["said"].count("stopped by SIGTERM; ") == 1
    go_on(nursery, tmp_path, undisturbed(1), 1)


@pytest.mark.slow
def test_rare_checkpoints_have_one_at_a_stop(
    nursery: Nursery, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    order = {"processes": 2, "place": "training", "signal": TERM, "to": [1], "stay": 1}
    check_words(
        stop(nursery, tmp_path, "--checkpoint.every_n_rounds", "50", **order), TERM, [1], GO_ON
    )
    saved = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=False)["aadp_fl"]["releases"]
    assert saved == len(ledgers.read(tmp_path / "run")[1]) > 0
    go_on(nursery, tmp_path, undisturbed(2), 2)


# Processes that Lightning starts ----------------------------------------------------------------

SCRIPT = """
import os, sys, time
from pathlib import Path
from fl_lightning.release.clients import Clients
from fl_lightning.fit import main
train, calls = Clients.train, []

def slow(self, *arguments):
    calls.append(1)
    if len(calls) == 3 and os.environ.get("LOCAL_RANK") == "1":
        Path("there").touch()
        time.sleep(600)
    return train(self, *arguments)

if Path("slow").exists():
    Clients.train = slow
if __name__ == "__main__":
    main()
"""


def launched(cwd: Path, *more: str) -> subprocess.Popen[str]:
    """The command line in two processes, which are a group of their own."""
    (cwd / "fit.py").write_text(SCRIPT)
    env = os.environ | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    two = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
    return subprocess.Popen(
        [sys.executable, "fit.py", *COMMAND, *two, *more],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def group_is_there(process: subprocess.Popen[str]) -> bool:
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("late", [True, False], ids=["training", "starting"])
@pytest.mark.parametrize(
    ("way", "to"),
    [*((way, to) for way in (TERM, KILL) for to in ("parent", "child")), (INT, "group")],
    ids=named,
)
def test_no_process_is_left_behind(
    tmp_path: Path, way: signal.Signals, to: str, late: bool
) -> None:
    (tmp_path / "slow").touch()
    process = launched(tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + 240
    while not ((tmp_path / "there").exists() if late else children.read_text().strip()):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.01)
    child = int(children.read_text().split()[0])
    start = time.monotonic()
    target = child if to == "child" else process.pid
    os.killpg(process.pid, way) if to == "group" else os.kill(target, way)
    while group_is_there(process) and time.monotonic() < start + 60:
        time.sleep(0.01)
    seconds = time.monotonic() - start
    left = group_is_there(process)
    if left:
        os.killpg(process.pid, KILL)
    said = process.communicate()[0]
    print({"launched": to, "signal": way.name, "late": late}, process.returncode, seconds, said)
    assert not left
    assert seconds < BOUND, said
    assert "Traceback" not in said
    if way == KILL:
        assert process.returncode == (-KILL if to == "parent" else 1), said
    else:
        assert process.returncode == 128 + way, said
        assert f"stopped by {way.name}; " in said
    if late:
        assert said.count("; ") == said.count(GO_ON) == 1, said
        (tmp_path / "slow").unlink()
        again = launched(tmp_path, "--ckpt_path", "last")
        said = again.communicate(timeout=400)[0]
        assert again.returncode == 0, said
        assert len(ledgers.read(tmp_path / "run")[1]) == 24


# SLURM, Kubernetes ------------------------------------------------------------------------------

SCONTROL = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/asked"
exit {code}
"""


def slurm(folder: Path, code: int, restarts: int) -> dict[str, str]:
    """A job of SLURM, whose scheduler is a script."""
    folder.mkdir(exist_ok=True)
    (folder / "scontrol").write_text(SCONTROL.format(code=code))
    (folder / "scontrol").chmod(0o755)
    facts = {"SLURM_JOB_ID": "1234", "SLURM_RESTART_COUNT": str(restarts)}
    return facts | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_NAME": "train"}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_requeued_job_goes_on_by_itself(
    nursery: Nursery,
    tmp_path: Path,
    undisturbed: Undisturbed,
    processes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = COMMAND[2:]  # without --run_dir
    full = ["fit", *args, *(["--trainer.devices", "2"] if processes > 1 else [])]
    for name, value in slurm(tmp_path / "bin", 0, 0).items():
        monkeypatch.setenv(name, value)
    folder = str(restarts.settle(None, None, full)[1])
    order = {"processes": processes, "args": args, "folder": folder, "slurm": processes > 1}
    place = {"place": "training", "signal": USR1, "to": list(range(processes)), "stay": 0.5}
    answer = stop(nursery, tmp_path, environment=slurm(tmp_path / "bin", 0, 0), **order, **place)
    assert answer["statuses"] == [128 + USR1] * processes
    words = "stopped by SIGUSR1; job 1234 is requeued and goes on by itself\n"
    assert answer["said"].count(words) == answer["said"].count("; ") == 1
    assert (tmp_path / "bin" / "asked").read_text() == "requeue 1234\n"
    answer = nursery(tmp_path, environment=slurm(tmp_path / "bin", 0, 1), **order)
    assert answer["statuses"] == [0] * processes, answer["said"]
    (tmp_path / folder).rename(tmp_path / "run")
    assert_same_end(tmp_path, undisturbed(processes))


def test_a_job_that_cannot_be_requeued_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in slurm(tmp_path, 1, 0).items():
        monkeypatch.setenv(name, value)
    assert str(jobs.requeue()).startswith("job 1234 could not be requeued")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert jobs.job() == "9_2"
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert "scontrol" in str(jobs.requeue())


def test_auto_starts_and_goes_on_and_refuses_releases_without_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert restarts.settle("auto", str(run), []) == (None, str(run))
    assert restarts.settle(None, None, []) == (None, None)
    with pytest.raises(ValueError, match="ckpt_path='auto' needs run_dir"):
        restarts.settle("auto", None, [])
    run.mkdir()
    (run / "ledger.jsonl").write_text("header\n")
    assert restarts.settle("auto", str(run), []) == (None, str(run))
    (run / "ledger.jsonl").write_text("header\nrelease\n")
    with pytest.raises(ValueError, match=r"ledger\.jsonl holds rounds, but there is no checkpoint"):
        restarts.settle("auto", str(run), [])
    (run / CHECKPOINT).parent.mkdir()
    (run / CHECKPOINT).touch()
    assert restarts.settle("auto", str(run), []) == (str(run / CHECKPOINT), str(run))
    assert restarts.settle(None, str(run), []) == (None, str(run))


def test_a_folder_for_a_job_and_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    one, two = (restarts.settle(None, None, ["--seed_everything", seed])[1] for seed in "12")
    assert str(one).startswith("runs/slurm-1234-")
    assert one != two
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert restarts.settle(None, None, []) == (None, None)
