"""The ledger: tampering, locking, and the report from the file alone."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from fl_lightning import ledger as ledger_module
from fl_lightning.accounting.composition import compose_epsilon
from fl_lightning.ledger import Ledger, LedgerError, report, verify
from fl_lightning.ledger.__main__ import main
from fl_lightning.values.event import NoiseEvent
from tests.fl_lightning.filled_ledger import HEADER, filled, release, reopen


def test_round_trip(tmp_path: Path) -> None:
    odd = release(
        1, 7, attempt=2, first_step=35, vote_noise_scale=0.5, quantum=2.0**-20,
        epsilon_inflation=1e-6, tail_delta=1e-9, guarantee=False,
    )  # fmt: skip
    with Ledger.create(tmp_path, HEADER) as ledger:
        ledger.append([release(0, 7), odd])
        ledger.append([])
        before, digest, header = ledger.releases, ledger.head_hash, ledger.header
    with Ledger.open(tmp_path) as ledger:
        assert [*ledger.releases] == [*before] == [release(0, 7), odd]
        assert ledger.head_hash == digest
        assert ledger.header == header
        assert header["epsilon"] == [1.0, "inf"]
        assert len(ledger) == 2
        assert ledger.find(1, 7) == [odd]
        assert ledger.find(1, 8) == []
        ledger.append([release(1, 7, attempt=3)])
        assert [r.attempt for r in ledger.find(1, 7)] == [2, 3]
    assert verify(tmp_path) == []


def test_create_refuses_a_ledger_with_releases(tmp_path: Path) -> None:
    Ledger.create(tmp_path, HEADER).close()
    file = filled(tmp_path, 1)
    with pytest.raises(LedgerError, match="already has a ledger"):
        Ledger.create(tmp_path, HEADER)
    file.write_bytes(b"")
    with pytest.raises(LedgerError, match="already has a ledger"):
        Ledger.create(tmp_path, HEADER)


def test_open_without_a_ledger(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no ledger"):
        Ledger.open(tmp_path)
    (tmp_path / "ledger.jsonl").write_bytes(b"")
    with pytest.raises(LedgerError, match="no header"):
        Ledger.open(tmp_path)
    assert verify(tmp_path) == ["line 1 is missing: the file has no header"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"setting": "magic"}, "setting"),
        ({"simulated": 1}, "simulated"),
        ({"delta": math.nan}, "NaN"),
    ],
)
def test_header_refusals(tmp_path: Path, changes: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Ledger.create(tmp_path, {**HEADER, **changes})
    with pytest.raises(ValueError, match="must have delta"):
        Ledger.create(tmp_path, {k: v for k, v in HEADER.items() if k != "delta"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("client", -2),
        ("steps", 0),
        ("round", 1.5),
        ("clip_norm", (1.0,)),
        ("shares", (0.5, -1.0)),
        ("noise_multiplier", -1.0),
        ("tail_delta", -1e-9),
        ("digest", 3),
        ("epsilon_inflation", math.nan),
        ("adjacency", "add_one"),
    ],
)
def test_release_refusals(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        release(**{name: value})


def test_one_attempt_is_recorded_once(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, HEADER) as ledger:
        ledger.append([release(0, 0)])
        for batch in ([release(0, 0, steps=1)], [release(1, 0), release(1, 0)]):
            with pytest.raises(ValueError, match="already recorded"):
                ledger.append(batch)
        assert len(ledger) == 1
    assert len(reopen(tmp_path)) == 1


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    file = filled(tmp_path, 1)
    whole = file.read_bytes()
    starts = [0, *(i + 1 for i, b in enumerate(whole) if b == 10)]
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1
        file.write_bytes(changed)
        line = sum(start <= position for start in starts)
        problems = verify(file)
        assert problems, position
        assert problems[0].startswith(f"line {line} "), (position, problems)
    with pytest.raises(LedgerError, match="line 3"):
        Ledger.open(tmp_path)


def test_a_changed_spelling_is_found(tmp_path: Path) -> None:
    """The same JSON value written differently is a change as well."""
    file = filled(tmp_path, 1)
    file.write_bytes(file.read_bytes().replace(b'"round":0', b'"round": 0', 1))
    assert verify(file) == ["line 2 was changed: its hash does not match its content"]


@pytest.mark.parametrize("number", range(1, 8))
def test_a_removed_line_is_found(tmp_path: Path, number: int) -> None:
    file = filled(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 7
    file.write_bytes(b"".join(lines[: number - 1] + lines[number:]))
    assert verify(file)[0].startswith(f"line {number} ")
    with pytest.raises(LedgerError, match=f"line {number} "):
        Ledger.open(tmp_path)


def test_swapped_and_repeated_lines_are_found(tmp_path: Path) -> None:
    file = filled(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:3], lines[4], lines[3], *lines[5:]]))
    assert "line 4 does not follow" in verify(file)[0]
    file.write_bytes(b"".join([*lines, lines[-1]]))
    assert "line 8 does not follow" in verify(file)[0]


def test_head_must_be_there_and_of_this_chain(tmp_path: Path) -> None:
    file, other = filled(tmp_path / "a"), filled(tmp_path / "b", 2, trust="nobody")
    head = file.with_suffix(".head")
    head.write_bytes(other.with_suffix(".head").read_bytes())
    assert verify(file) == ["line 5 is not the one in ledger.head"]
    head.write_bytes(b"{}")
    assert "unreadable" in verify(file)[0]
    head.unlink()
    assert "missing" in verify(file)[0]
    with pytest.raises(LedgerError, match="missing"):
        Ledger.open(file)


def test_two_openers(tmp_path: Path) -> None:
    file = filled(tmp_path)
    code = "import sys; from fl_lightning.ledger import Ledger; Ledger.open(sys.argv[1])"
    with Ledger.open(tmp_path):
        with pytest.raises(LedgerError, match=f"{tmp_path.name} is in use"):
            Ledger.open(file)
        with pytest.raises(LedgerError, match="in use"):
            Ledger.create(tmp_path, HEADER)
        second = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True)
        assert second.returncode == 1
        assert b"in use by another run" in second.stderr
        assert verify(file) == []
    Ledger.open(file).close()


def test_a_forked_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    file = filled(tmp_path)
    ledger = Ledger.open(file)
    ready, done = os.pipe(), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            ledger.append([release(0, 99)])
            os.write(ready[1], b"!")
        except LedgerError:
            os.write(ready[1], b".")
        os.read(done[0], 1)
        os._exit(0)
    try:
        assert os.read(ready[0], 1) == b"."
        with pytest.raises(LedgerError, match="in use"):
            Ledger.open(file)
        ledger.append([release(0, 50)])
        ledger.close()
        assert len(reopen(file)) == 7
    finally:
        os.write(done[1], b".")
        os.waitpid(child, 0)
        for descriptor in (*ready, *done):
            os.close(descriptor)


def test_closed_and_copied(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path, HEADER)
    with pytest.raises(TypeError, match="cannot be pickled"):
        copy.copy(ledger)
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.append([release()])


def test_report(tmp_path: Path) -> None:
    filled(tmp_path, 10, client_sizes=[10, 20, 30])
    first, second, third = report(tmp_path).values()
    expected = compose_epsilon({NoiseEvent("gaussian", 3.0, 0.1): 50}, 1e-5)
    assert first.epsilon == second.epsilon == expected
    assert (first.releases, first.steps, first.noise_multipliers) == (10, 50, (3.0,))
    assert (first.target_epsilon, second.target_epsilon, third.target_epsilon) == (
        1,
        math.inf,
        None,
    )
    assert (third.client, third.epsilon, third.releases) == (2, 0.0, 0)
    assert first.guarantee


def test_report_charges_tails_and_inflation(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, {**HEADER, "delta": 1e-5}) as ledger:
        ledger.append([release(0, 0, tail_delta=4e-6, epsilon_inflation=0.25)])
        ledger.append([release(1, 0, tail_delta=2e-5), release(2, 0, noise_multiplier=0.0)])
    first, second, third = report(tmp_path).values()
    event = NoiseEvent("gaussian", 3.0, 0.1)
    assert first.epsilon == pytest.approx(compose_epsilon({event: 5}, 6e-6) + 0.25, rel=1e-9)
    assert second.epsilon == third.epsilon == math.inf


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = filled(tmp_path, 10)
    command = [sys.executable, "-m", "fl_lightning.ledger", "show", str(file)]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert main(["show", str(tmp_path)]) == 0
    for text in (shown.stdout, capsys.readouterr().out):
        assert "0.9709" in text  # Rounded up.
        assert "SIMULATED" in text
    assert main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "20 releases, chain unbroken\n"
    file.write_bytes(file.read_bytes().replace(b'"round":4', b'"round":5', 1))
    for action in ("show", "verify"):
        assert main([action, str(file)]) == 1
        said = capsys.readouterr()
        assert said.err.startswith("line 10 was changed")
        assert said.out == ""


@pytest.mark.parametrize("setting", ["abstract", "none"])
def test_command_without_guarantee(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    with Ledger.create(tmp_path, {**HEADER, "setting": setting, "simulated": False}) as ledger:
        multiplier = 3.0 if setting == "abstract" else 0.0
        ledger.append([release(0, 0, noise_multiplier=multiplier, guarantee=False)])
    assert main(["show", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert ("nominal, no guarantee" in text) == (setting == "abstract")
    assert ("epsilon infinite" in text) == (setting == "none")
    assert "SIMULATED" not in text
    assert main(["show", str(tmp_path / "nothing")]) == 1


def test_import_is_light() -> None:
    code = (
        "import sys, fl_lightning.ledger as l; "
        "print([m for m in ('torch', 'pytorch_lightning', 'dp_accounting') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_file_is_plain_json_lines(tmp_path: Path) -> None:
    """Readable without this package, with strict JSON."""

    def refuse(token: str) -> None:
        raise AssertionError(token)

    file = filled(tmp_path, 1)
    entries = [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]
    assert [e["kind"] for e in entries] == ["header", "release", "release"]
    assert [e["prev"] for e in entries[1:]] == [e["hash"] for e in entries[:-1]]
    head = json.loads(file.with_suffix(".head").read_text())
    assert head == {"entries": 3, "hash": entries[-1]["hash"]}
    assert file.name == ledger_module.FILE_NAME
