"""Several processes: what one of them gets wrong stops all, and what is refused."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys

import pytest
import pytorch_lightning as pl
import torch

from fl_lightning import ClientParallelStrategy
from fl_lightning import ledger as ledgers
from fl_lightning.preflight.trainer_check import check_processes
from fl_lightning.processes import together as processes
from fl_lightning.processes.together import Processes
from tests.fl_lightning.ddp_runs import ENVIRONMENT, charged


@pytest.fixture(scope="module", autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# What must not hang -----------------------------------------------------------------------------

SMALL = [
    *("--data.num_clients", "3", "--model.network", "fl_lightning.models.LogisticRegression"),
    *("--privacy.epsilon", "null", "--privacy.noise_multiplier", "2", "--model.execution", "loop"),
    *("--trainer.max_epochs", "4", "--trainer.accelerator", "cpu", "--trainer.logger", "false"),
    *("--trainer.strategy", "ddp", "--trainer.devices", "2"),
]
FAULTS = """
import os, signal
from fl_lightning.ledger import chain
from fl_lightning.fit import main
from fl_lightning.release.one_by_one import OneByOne
rank = int(os.environ.get("LOCAL_RANK", 0))
fault = os.environ.get("FAULT", "")
write, made = chain.write_all, OneByOne.draw

def full(descriptor, data):
    if b'"round":2' in data:
        raise OSError(28, "No space left on device")
    write(descriptor, data)

def failing(self, clients, params, key, round):
    if round == 2 and rank == 1:
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("client 2 divides by zero")
    return made(self, clients, params, key, round)

if fault == "disk full":
    chain.write_all = full
elif fault:
    OneByOne.draw = failing
if __name__ == "__main__":
    main()
"""


def command(folder, *more, fault=None):
    """The command line in two processes that Lightning starts; (exit code, output, errors)."""
    script = folder / "faults.py"
    script.write_text(FAULTS)
    process = subprocess.Popen(
        [sys.executable, *([str(script)] if fault else ["-m", "fl_lightning.fit"]), *SMALL, *more],
        cwd=folder,
        env=ENVIRONMENT | {"FAULT": fault or ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, errors


@pytest.mark.slow
def test_the_command_and_a_folder_that_is_taken(tmp_path):
    code, out, errors = command(tmp_path)
    assert code == 0, errors
    (run,) = (tmp_path / "runs").iterdir()
    assert out.count("run folder:") == out.count("round 4/4") == out.count("test accuracy") == 1
    assert "Warning" not in errors
    assert len(charged(run)) == 12
    assert ledgers.verify(run) == []
    assert (run / "secret.key").stat().st_mode & 0o777 == 0o600
    names = {p.name for p in run.iterdir()}
    assert {"config.yaml", "summary.json", "rounds.csv", "privacy_statement.md"} <= names
    assert "config_2.yaml" not in names
    before = (run / "ledger.jsonl").read_bytes()
    (run / "rounds.csv").unlink()  # so that only the ledger, which process 0 opens, can refuse
    code, out, errors = command(tmp_path, "--run_dir", str(run))
    assert code == 2
    assert errors.count("error: ") == 1
    assert "already has a ledger with releases" in errors
    assert "Traceback" not in errors
    assert (run / "ledger.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("disk full", 2, "nothing was released: [Errno 28] No space left on device"),
        ("failing", 1, "ZeroDivisionError: client 2 divides by zero"),
        ("killed", None, ""),
    ],
)
def test_a_fault_of_one_process_stops_all(tmp_path, fault, code, said):
    run = tmp_path / "run"
    stopped, _, errors = command(tmp_path, "--run_dir", str(run), fault=fault)
    assert stopped == code if code else stopped != 0
    assert said in errors
    done = [(k, t, 0) for t in range(2) for k in range(3)]
    assert charged(run) == done
    assert ledgers.verify(run) == []
    alone = tmp_path / "alone"
    shutil.copytree(run, alone)
    code, _, errors = command(tmp_path, "--run_dir", str(run), "--ckpt_path", "last")
    assert code == 0, errors
    assert charged(run) == done + [(k, t, 0) for t in (2, 3) for k in range(3)]
    more = ["--run_dir", str(alone), "--ckpt_path", "last", "--trainer.devices", "1"]
    code, _, errors = command(tmp_path, *more)
    assert code == 0, errors
    assert charged(alone) == charged(run)


# Checks and parts -------------------------------------------------------------------------------


def trainer(**options):
    defaults = {"max_epochs": 1, "accelerator": "cpu", "devices": 2, "logger": False}
    return pl.Trainer(**(defaults | options))


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "ddp_find_unused_parameters_true"])
def test_other_strategies_are_refused_in_python(strategy):
    with pytest.raises(ValueError, match=r"trainer\.strategy=DDPStrategy with 2 process"):
        check_processes(trainer(strategy=strategy))


@pytest.mark.parametrize("option", ["use_distributed_sampler", "sync_batchnorm"])
def test_options_that_share_records_are_refused(option):
    options = {"use_distributed_sampler": False, option: True}
    with pytest.raises(ValueError, match=f"trainer.{option}=True"):
        check_processes(trainer(strategy=ClientParallelStrategy(), **options))


def test_options_of_lightnings_ddp_are_refused():
    with pytest.raises(ValueError, match="find_unused_parameters=True"):
        ClientParallelStrategy(find_unused_parameters=True)


@pytest.mark.parametrize(("clients", "size"), [(10, 2), (5, 3), (1, 4), (0, 2), (7, 1)])
def test_shares_are_everybody_once(clients, size):
    ids = torch.arange(clients) * 3
    shares = [Processes(rank, size).part_of(ids) for rank in range(size)]
    assert torch.equal(torch.cat(shares), ids)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_does_the_plain_thing():
    alone, value = Processes(), torch.ones(2)
    assert alone.together(lambda: 3) == [3]
    assert alone.first(lambda: 4) == 4
    assert alone.sum([value])[0] is value


def test_whole_numbers_are_summed_exactly():
    numbers = torch.tensor([2**62 - 1, -(2**62) + 3, -1, 0, 5, 2**53 + 1])
    halves = processes._as_float64(numbers)
    assert torch.equal(processes._like(numbers, halves), numbers)
    assert torch.equal(processes._like(numbers, 2 * halves), 2 * numbers)
    values = torch.tensor([0.1, -2.5])
    assert torch.equal(processes._like(values, processes._as_float64(values)), values)
