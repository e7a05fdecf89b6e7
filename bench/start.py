"""From a command to its first answer: `python -m bench start`, ratios within one run.

Times are CPU seconds, of the process and of those that it started, so that other work on the
machine counts little; seconds on the clock stand beside them. `cold` begins with an empty folder
for compiled kernels, `warm` with one that is filled.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import machine, pages

RESULT = machine.ROOT / "bench" / "results" / "start.json"
PAGE = machine.ROOT / "docs" / "install.md"
_RELEASE = """
import torch, aadp_kernels as k
shapes = {"a.weight": torch.randn(32, 16), "a.bias": torch.randn(32)}
layout = k.Layout.build(shapes)
ones = torch.ones(len(layout.layer_names))
k.privatize_([t.clone() for t in shapes.values()], layout=layout, clip=ones, scale=ones, p=2,
             mechanism="gaussian", key=k.NoiseKey.random(), step=0)
"""
_COMPILED = _RELEASE.replace("k.privatize_", "with k.compiling('now'): k.privatize_")
_RUN = ("-m", "fl_lightning.fit", "--trainer.logger", "false")
_FEW = 2


def run_all() -> None:
    """Measure every case and write the result."""
    found: dict[str, Any] = {
        "machine": machine.record(torch.device("cpu")),
        "load": os.getloadavg(),
    }
    cases: dict[str, dict[str, float]] = {}
    found["cases"] = cases
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        kept = {"NUMBA_CACHE_DIR": str(root / "kernels"), "WANDB_MODE": "disabled"}
        for title, case in _cases(root).items():
            cases[title] = _least(case, kept, root)
            print(f"{title}: {cases[title]}", flush=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def _cases(root: Path) -> dict[str, tuple[Sequence[str], int]]:
    """What is run, in this order, and how often."""
    run = str(root / "cold")
    return {
        "Python alone": (("-c", "pass"), _FEW),
        "`import torch`": (("-c", "import torch"), _FEW),
        "`import pytorch_lightning`": (("-c", "import pytorch_lightning"), _FEW),
        "`aadp fit --help`": (("-m", "fl_lightning", "fit", "--help"), _FEW),
        "a mistyped option": (("-m", "fl_lightning", "fit", "--epsilon", "3"), _FEW),
        "a value out of range": (("-m", "fl_lightning", "fit", "--privacy.epsilon", "0"), _FEW),
        "`aadp export --help`": (("-m", "fl_lightning", "export", "--help"), _FEW),
        "a first release, cold": (("-c", _RELEASE), 1),
        "a first release, compiled first": (("-c", _COMPILED), 1),
        "a first release, warm": (("-c", _RELEASE), _FEW),
        "default run, cold": ((*_RUN, "--run_dir", run), 1),
        "default run, warm": ((*_RUN, "--run_dir", str(root / "warm")), 1),
        "default run without privacy": (
            (*_RUN, "--privacy.setting", "none", "--run_dir", str(root / "none")),
            1,
        ),
        "`aadp ledger verify`": (("-m", "fl_lightning", "ledger", "verify", run), _FEW),
    }


def _least(
    case: tuple[Sequence[str], int], kept: Mapping[str, str], root: Path
) -> dict[str, float]:
    """The repeat with least CPU time."""
    command, repeats = case
    return min((_once(command, kept, root) for _ in range(repeats)), key=lambda t: t["cpu"])


def _once(command: Sequence[str], kept: Mapping[str, str], root: Path) -> dict[str, float]:
    environment = os.environ | kept | {"PYTHONPATH": str(machine.ROOT), "COLUMNS": "100"}
    with (root / "said").open("w") as said:
        started = time.perf_counter()
        actions = [(os.POSIX_SPAWN_DUP2, said.fileno(), 1), (os.POSIX_SPAWN_DUP2, said.fileno(), 2)]
        words = [sys.executable, *command]
        child = os.posix_spawn(sys.executable, words, environment, file_actions=actions)
        _, status, used = os.wait4(child, 0)
        clock = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status) not in (0, 2):
        raise RuntimeError(f"{' '.join(command)[:80]}: {(root / 'said').read_text()[-2000:]}")
    return {"cpu": round(used.ru_utime + used.ru_stime, 3), "clock": round(clock, 3)}


def table(found: Mapping[str, Any]) -> str:
    """The table of the page, in Markdown."""
    cases = found["cases"]
    base, lines = cases["`import torch`"]["cpu"], []
    for title, seconds in cases.items():
        ratio = seconds["cpu"] / base
        lines.append(f"| {title} | {seconds['cpu']:.2f} | {ratio:.2f} | {seconds['clock']:.1f} |")
    run = cases["default run, cold"]["cpu"] / cases["default run, warm"]["cpu"]
    release = cases["a first release, cold"]["cpu"] / cases["a first release, warm"]["cpu"]
    head = "| command | CPU s | over `import torch` | s on the clock |\n|---|---|---|---|\n"
    where = found["machine"]
    return (
        head
        + "\n".join(lines)
        + f"\n\nFrom an empty folder of compiled kernels the default run takes {run:.2f} × the CPU "
        f"time of the next one, a first release {release:.1f} ×. {where['cpu']}, {where['cores']} "
        f"cores, {where['date']}, load {found['load'][0]:.1f} as it began; `python -m bench start`."
    )


def report() -> None:
    """Write the table into its page."""
    if RESULT.exists():
        pages.put(PAGE, "start table", table(json.loads(RESULT.read_text())))
