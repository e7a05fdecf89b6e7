"""Full disks, damaged files and second runs: a clear error, and nothing that counts is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fl_lightning import ledger as ledgers
from fl_lightning.ledger import LedgerWarning
from fl_lightning.output.checkpoint import CHECKPOINT, AtomicCheckpointIO
from tests.fl_lightning.killing import COMMAND, Zygote, assert_same_end, complete_lines
from tests.fl_lightning.resuming import (
    RECORD,
    SETTINGS,
    charged,
    crash,
    go,
    rows,
    same_optimizers,
    same_tensors,
)


def last_error(cwd: Path) -> str:
    lines = (cwd / "output.txt").read_text().splitlines()
    assert "Traceback" not in "\n".join(lines)
    (error,) = [line for line in lines if line.startswith("error: ")]
    return error


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["record+local", "client+aggregator"])
def test_a_disk_without_room_for_the_ledger(tmp_path: Path, zygote: Zygote, setting: str) -> None:
    """The ledger outgrows the checkpoint, so a limit on files stops the run at an append."""
    rounds = "12" if setting == "record+local" else "36"  # a sum is one line a round
    args = ["--privacy.setting", setting, "--trainer.max_epochs", rounds]
    args += ["--model.weighting", "records", "--privacy.thresholds", "fixed"]
    assert zygote(tmp_path / "whole", *args)["status"] == 0
    run, cwd = tmp_path / "whole" / "run", tmp_path / "full"
    sizes = [(run / name).stat().st_size for name in (CHECKPOINT, "ledger.jsonl")]
    assert sizes[0] + 600 < sizes[1]
    assert zygote(cwd, *args, limit=(sizes[0] + sizes[1]) // 2)["status"] == 2
    assert "cannot write the ledger in run, nothing was released" in last_error(cwd)
    assert ledgers.verify(cwd / "run") == []
    before = complete_lines(cwd)
    assert 1 < len(before) < len(complete_lines(tmp_path / "whole"))
    assert zygote.go_on(cwd, *args)["status"] == 0
    assert complete_lines(cwd)[: len(before)] == before
    assert_same_end(cwd, tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_without_room_for_a_checkpoint(tmp_path: Path, zygote: Zygote) -> None:
    args = ["--privacy.setting", "record+local"]
    assert zygote(tmp_path, *args, limit=6000)["status"] == 2
    error = last_error(tmp_path)
    assert "cannot save run/checkpoints/last.ckpt, the one before stays: File too large" in error
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert len(complete_lines(tmp_path)) == 1, "nothing may be released before a checkpoint"
    assert zygote.go_on(tmp_path, *args)["status"] == 0
    assert ledgers.verify(tmp_path / "run") == []


@pytest.mark.parametrize("call", ["write", "fsync", "pwrite"])
@pytest.mark.parametrize("setting", ["record+local", "client+aggregator"])
def test_a_full_disk_in_the_middle_of_a_run(tmp_path, monkeypatch, setting, call):
    """Whichever call fails from some round on, in the ledger or the checkpoint."""
    privacy = SETTINGS[setting]
    whole = go(tmp_path / "whole", 5, privacy=privacy)
    original, left = getattr(os, call), [4]

    def failing(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises((OSError, ledgers.LedgerError), match="No space left"):
            go(tmp_path / "run", 5, privacy=privacy)
    before = (tmp_path / "run" / "ledger.jsonl").read_bytes()
    # What could be neither finished nor taken back is a torn line, which never counted.
    before = before[: before.rfind(b"\n") + 1]
    resumed = go(tmp_path / "run", 5, resume=True, privacy=privacy)
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes().startswith(before)
    same_tensors(whole.state_dict(), resumed.state_dict())
    same_optimizers(whole, resumed)
    assert ledgers.verify(tmp_path / "run") == []


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_checkpoint(tmp_path, keep):
    go(tmp_path, 3, privacy=RECORD)
    path, ledger = tmp_path / CHECKPOINT, (tmp_path / "ledger.jsonl").read_bytes()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ValueError, match=r"ckpt_path=.*last\.ckpt is damaged.*stays in the ledger"):
        go(tmp_path, 6, resume=True, privacy=RECORD)
    with pytest.raises(ledgers.LedgerError, match="already has a ledger with releases"):
        go(tmp_path, 6, privacy=RECORD)
    assert (tmp_path / "ledger.jsonl").read_bytes() == ledger
    path.write_bytes(whole)
    same_tensors(
        go(tmp_path, 6, resume=True, privacy=RECORD).state_dict(),
        go(tmp_path / "whole", 6, privacy=RECORD).state_dict(),
    )


@pytest.mark.parametrize("setting", ["record+local", "client+aggregator"])
@pytest.mark.parametrize("cut", [1, 40, -3])
def test_a_cut_last_line_of_the_ledger(tmp_path, setting, cut):
    """Cut before the line was acknowledged it never counted; afterwards it is missed."""
    privacy = SETTINGS[setting]
    whole = go(tmp_path / "whole", 6, privacy=privacy)
    crash(tmp_path / "run", 3, privacy=privacy)
    ledger, head = tmp_path / "run" / "ledger.jsonl", tmp_path / "run" / "ledger.head"
    *kept, last = ledger.read_bytes().splitlines(keepends=True)
    acknowledged = head.read_text()
    ledger.write_bytes(b"".join(kept) + last[:cut])
    with pytest.raises(ledgers.LedgerError, match="is missing"):
        go(tmp_path / "run", 6, resume=True, privacy=privacy)
    assert head.read_text() == acknowledged
    state = {"entries": len(kept), "hash": json.loads(kept[-1])["hash"]}
    head.write_text(json.dumps(state))
    with pytest.warns(LedgerWarning, match="had not left the client"):
        resumed = go(tmp_path / "run", 6, resume=True, privacy=privacy)
    same_tensors(whole.state_dict(), resumed.state_dict())
    assert sorted(charged(tmp_path / "run")) == sorted(charged(tmp_path / "whole"))
    assert len(rows(tmp_path / "run" / "rounds.csv")) == 6


def test_a_failed_save_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    go(tmp_path, 1, privacy=RECORD)
    before = (tmp_path / CHECKPOINT).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot save .*last\.ckpt.*No space left"):
        AtomicCheckpointIO().save_checkpoint({"a": 1}, tmp_path / CHECKPOINT)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert [p.name for p in (tmp_path / CHECKPOINT).parent.iterdir()] == ["last.ckpt"]


@pytest.mark.slow
def test_two_processes_at_once(tmp_path):
    waiting = "import time; from fl_lightning import module; from fl_lightning.fit import main\n"
    waiting += "module.FederatedModule.training_step = lambda *_: time.sleep(600)\nmain()"
    env = os.environ | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        [sys.executable, "-c", waiting, *COMMAND],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        ledger = tmp_path / "run" / "ledger.jsonl"
        deadline = time.monotonic() + 120
        while not (ledger.exists() and ledger.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        second = subprocess.run(
            [sys.executable, "-m", "fl_lightning.fit", *COMMAND],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 2
        assert "in use by another run" in second.stderr
        assert "Traceback" not in second.stderr
    finally:
        first.kill()
        first.communicate(timeout=60)
