"""What a ledger holds was durable: torn lines, full disks, interrupts and SIGKILL."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from fl_lightning.ledger import Ledger, LedgerError, LedgerWarning, chain, verify
from tests.fl_lightning.filled_ledger import HEADER, filled, release, reopen


def test_torn_last_line_at_every_byte(tmp_path: Path) -> None:
    """Whatever part of an append reached the disk: complete lines count, the rest is set aside."""
    file = filled(tmp_path, 1)
    whole, head = file.read_bytes(), file.with_suffix(".head").read_bytes()
    with Ledger.open(tmp_path) as ledger:
        ledger.append([release(0, 1), release(1, 1)])
    longer = file.read_bytes()
    first_line_end = longer.index(b"\n", len(whole)) + 1
    for cut in range(len(whole), len(longer)):
        file.write_bytes(longer[:cut])
        file.with_suffix(".head").write_bytes(head)
        torn = file.with_name("ledger.jsonl.torn")
        torn.unlink(missing_ok=True)
        assert verify(file) == []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            releases = reopen(tmp_path)
        assert len(releases) == (2 if cut < first_line_end else 3)
        complete = cut in (len(whole), first_line_end)
        assert [w.category for w in caught] == ([] if complete else [LedgerWarning])
        if not complete:
            start = len(whole) if cut < first_line_end else first_line_end
            assert torn.read_bytes() == longer[start:cut] + b"\n"
        assert reopen(tmp_path) == releases


def test_a_torn_line_that_was_acknowledged_is_an_error(tmp_path: Path) -> None:
    file = filled(tmp_path)
    for cut in (1, 2, 100):
        file.write_bytes(file.read_bytes()[:-cut])
        with pytest.raises(LedgerError, match="line 7 is missing"):
            Ledger.open(tmp_path)


@pytest.mark.parametrize("call", ["write", "fsync", "pwrite"])
def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Whichever call of an append fails: nothing counts, and the file is as before."""
    file = filled(tmp_path)
    before = file.read_bytes(), file.with_suffix(".head").read_bytes()
    original, seen = getattr(os, call), 0

    def failing(*arguments: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen > 1:
            return original(*arguments)
        if call != "fsync":
            original(arguments[0], arguments[1][:14], *arguments[2:])
        raise OSError(errno.ENOSPC, "No space left on device")

    with Ledger.open(tmp_path) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            with pytest.raises(LedgerError, match="No space left"):
                ledger.append([release(0, 9), release(1, 9)])
        assert (file.read_bytes(), file.with_suffix(".head").read_bytes()) == before
        assert len(ledger) == 6
        assert ledger.find(0, 9) == []
        ledger.append([release(0, 9)])
        assert len(ledger) == 7
    assert len(reopen(tmp_path)) == 7


def test_lines_are_on_disk_before_the_head_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One write and one fsync for the lines of a round; the head then stays the same file."""
    head = filled(tmp_path).with_suffix(".head")
    calls: list[str] = []

    def noted(name: str) -> Any:
        original = getattr(os, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return original(*arguments)

        return call

    with Ledger.open(tmp_path) as ledger:
        before = head.stat()
        with monkeypatch.context() as patch:
            for name in ("write", "fsync", "pwrite", "replace"):
                patch.setattr(os, name, noted(name))
            ledger.append([release(0, 9), release(1, 9)])
        assert calls == ["write", "fsync", "pwrite"]
        after = head.stat()
        assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)
        assert chain.read_head(head) == (9, ledger.head_hash)


@pytest.mark.parametrize("text", [None, b'{"entries":7,"hash":"%b"}\n'])
def test_a_head_of_an_older_version_or_none_is_written_anew(
    tmp_path: Path, text: bytes | None
) -> None:
    head = filled(tmp_path).with_suffix(".head")
    with Ledger.open(tmp_path) as ledger:
        head.unlink()
        if text is not None:
            head.write_bytes(text % ledger.head_hash.encode())
            assert verify(tmp_path) == []
        ledger.append([release(0, 9)])
        assert chain.read_head(head) == (8, ledger.head_hash)
    assert verify(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: original(fd, data[:11]))
    filled(tmp_path)
    assert len(reopen(tmp_path)) == 6


def test_interrupted_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the file and the head: the ledger is to be opened again, the lines count."""
    filled(tmp_path)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with Ledger.open(tmp_path) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ledger.append([release(0, 9)])
        with pytest.raises(LedgerError, match="open the ledger again"):
            ledger.append([release(0, 10)])
    assert len(reopen(tmp_path)) == 7


CHILD = """
import os, sys
from fl_lightning.ledger import Ledger, Release
ledger = Ledger.open(sys.argv[1])
for number in range(10**6):
    ledger.append([Release(client=c, round=number, steps=1, mechanism="gaussian",
        noise_multiplier=1.0, sampling_rate=1.0, adjacency="zero_out", num_layers=1,
        clip_norm=(1.0,), shares=(1.0,), binding="", digest=str(number)) for c in range(3)])
    os.write(1, b"%d\\n" % number)
"""


def test_killed_while_appending(tmp_path: Path) -> None:
    """SIGKILL at several moments: every acknowledged release is there, and at most one more."""
    for acknowledged_before_kill in (1, 7, 40):
        run = tmp_path / str(acknowledged_before_kill)
        Ledger.create(run, HEADER).close()
        command = [sys.executable, "-c", CHILD, str(run)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            for _ in range(acknowledged_before_kill):
                assert child.stdout.readline()
            child.send_signal(signal.SIGKILL)
            rest = child.stdout.read().split(b"\n")
        acknowledged = acknowledged_before_kill + sum(1 for line in rest[:-1] if line)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LedgerWarning)
            releases = reopen(run)
        rounds = [r.round for r in releases]
        assert {r for r in range(acknowledged)} <= set(rounds)
        assert all(rounds.count(r) == 3 for r in range(acknowledged))
        assert max(rounds) <= acknowledged
