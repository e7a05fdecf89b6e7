"""From a clean machine to the first picture, as a newcomer goes: `python -m bench newcomer`.

A clone in an empty folder, a virtual environment of its own and an empty home, so that no cache of
this machine helps: `make fit`, what it prints and when, the pictures, the ledger, a second run, and
the tests. Packages come from wherever pip gets them here, so the seconds of installing say least.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import machine, pages

RESULT = machine.ROOT / "bench" / "results" / "newcomer.json"
PAGE = machine.ROOT / "docs" / "install.md"
TESTS = "`make test`, the quick tests"
_ARGUMENTS = "ARGS=--run_dir {}"


def run_all() -> None:
    """Take every step and write what it took."""
    found: dict[str, Any] = {
        "machine": machine.record(torch.device("cpu")),
        "load": os.getloadavg(),
    }
    with tempfile.TemporaryDirectory() as folder:
        found["steps"] = _steps(Path(folder))
    RESULT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    report()


def _steps(folder: Path) -> list[dict[str, Any]]:
    clone, home = folder / "aadp-fl", folder / "home"
    home.mkdir()
    keep = ("PATH", "LANG", "LC_ALL", "PIP_CONFIG_FILE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
    kinds = ("pip_", "_proxy")  # where packages come from, and how they are reached
    environment = {
        n: v for n, v in os.environ.items()
        if n in keep or n.lower().startswith(kinds) or n.lower().endswith(kinds)
    }  # fmt: skip
    environment |= {"HOME": str(home), "PYTHONUNBUFFERED": "1", "PYTHON": sys.executable}
    steps: list[dict[str, Any]] = []

    def step(title: str, command: Sequence[str], where: Path, **more: Any) -> None:
        steps.append({"title": title, **_watched(command, where, environment, **more)})
        print(f"{title}: {steps[-1]}", flush=True)

    source = ["git", "clone", "-q", str(machine.ROOT), str(clone)]
    step("`git clone`", source, folder)
    step("`make fit`, installing", ["make", ".venv/installed-federated"], clone)
    steps[-1]["megabytes"] = round(_size(clone / ".venv") / 1e6)
    for title, name in (("`make fit`, the run", "first"), ("`make fit` again", "second")):
        run = clone / "runs" / name
        step(title, ["make", "fit", _ARGUMENTS.format(run)], clone, run=run)
    aadp = str(clone / ".venv" / "bin" / "aadp")
    step("`aadp ledger verify`", [aadp, "ledger", "verify", "runs/first"], clone)
    export = [aadp, "export", "runs/first", "--out", str(folder / "model")]
    step("`aadp export`", export, clone)
    step("`make test`, installing the rest", ["make", ".venv/installed-test"], clone)
    step(TESTS, ["make", "test"], clone)
    return steps


def _watched(
    command: Sequence[str], where: Path, environment: dict[str, str], run: Path | None = None
) -> dict[str, Any]:
    """A command's seconds, its lines, and when its first line, round and picture were there."""
    found: dict[str, Any] = {}
    started = time.perf_counter()

    def seen(name: str) -> None:
        found.setdefault(name, round(time.perf_counter() - started, 1))

    with (where / "said").open("wb") as said:
        child = subprocess.Popen(
            command, cwd=where, env=environment, stdout=said, stderr=subprocess.STDOUT
        )
        while child.poll() is None:
            time.sleep(0.05)
            if (where / "said").stat().st_size:
                seen("first_line")
            if run is not None and (run / "ledger.jsonl").exists():
                seen("first_release")
            if run is not None and next(run.glob("plots/*.png"), None):
                seen("first_picture")
    text = (where / "said").read_text(errors="replace")
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)}: {text[-2000:]}")
    lines = [line for line in text.splitlines() if line.strip()]
    found |= {"seconds": round(time.perf_counter() - started, 1), "lines": len(lines)}
    return found


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def table(found: dict[str, Any]) -> str:
    """The protocol, in Markdown."""
    head = "| step | seconds | first line | ledger begun | first picture | lines printed |\n"
    rows = []
    for each in found["steps"]:
        cells = [each.get(n, "") for n in ("first_line", "first_release", "first_picture")]
        rows.append(f"| {each['title']} | {each['seconds']} | {cells[0]} | {cells[1]} | {cells[2]} "
                    f"| {each['lines']} |")  # fmt: skip
    where, size = found["machine"], next(s for s in found["steps"] if "megabytes" in s)
    return (
        head
        + "|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\nThe environment takes {size['megabytes']:,} MB. {where['cpu']}, {where['cores']} "
        f"cores, Python {where['python']}, {where['date']}, load {found['load'][0]:.1f} as it "
        "began; `python -m bench newcomer`."
    )


def report() -> None:
    """Write the protocol into its page."""
    if RESULT.exists():
        pages.put(PAGE, "newcomer", table(json.loads(RESULT.read_text())))
