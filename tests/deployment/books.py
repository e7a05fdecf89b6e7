"""What must be true of the books of a federation, whatever happened to its processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fl_lightning import ledger as ledgers
from fl_lightning.ledger import FILE_NAME, Release


def ledgers_of(holder: Path) -> list[Path]:
    """Folders of the runs of a holder whose ledger exists."""
    return sorted(path.parent for path in holder.glob(f"runs/*/{FILE_NAME}"))


def lines_of(holder: Path, client: int) -> list[Release]:
    """All releases of a holder, as the server numbers its client."""
    return [
        replace(line, client=client)
        for folder in ledgers_of(holder)
        for line in ledgers.read(folder)[1]
    ]


def raw_lines(folder: Path) -> list[bytes]:
    """Whole lines of a ledger as they stand in the file."""
    path = folder / FILE_NAME
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1].splitlines()


def check_books(run: Path, holders: Sequence[Path], epsilon: float) -> None:
    """Every ledger is whole and within its epsilon; every copied line is a holder's own."""
    assert ledgers.verify(run) == []
    copied = {repr(line) for line in ledgers.read(run)[1]}
    own: set[str] = set()
    for client, holder in enumerate(holders):
        for folder in ledgers_of(holder):
            assert ledgers.verify(folder) == []
            report = ledgers.report(folder)
            assert all(one.epsilon <= epsilon * (1 + 1e-9) for one in report.values())
        lines = lines_of(holder, client)
        own |= {repr(line) for line in lines}
        one_noise_one_release(lines)
    assert copied <= own, "the server has a release that no holder's ledger has"


def one_noise_one_release(lines: Sequence[Release]) -> None:
    """No noise was ever put on two different values, and no line stands twice."""
    digests: dict[str, str] = {}
    for line in lines:
        assert line.binding not in digests, f"{line.binding} twice"
        digests[line.binding] = line.digest


def processes_of(folder: Path) -> dict[int, str]:
    """Commands of the processes that a federation in a folder started, by process id."""
    wanted = f"FLWR_HOME={folder / 'flwr'}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if command:  # a zombie has none
                    found[int(entry.name)] = command
        except OSError:
            continue
    return found


def listening(pids: Sequence[int]) -> set[str]:
    """Addresses, as the kernel writes them, at which processes wait for connections."""
    inodes = set()
    for pid in pids:
        try:
            descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
        except OSError:
            continue
        for descriptor in descriptors:
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            cells = row.split()
            if cells[3] == "0A" and cells[9] in inodes:
                found.add(cells[1].rpartition(":")[0])
    return found
