"""Steps that are run one after another, in several sittings: each once, under a limit of its own.

What has been done stands in a file; a step that fails is written down and the others go on. A
step that was under way when a sitting ended is tried again, and given up the second time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRIES = 2
TAIL = 15  # lines of a step's output that are shown


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: Unique; also of its log.
        command: Its arguments.
        limit: Seconds after which it is stopped.
        tool: A program that it needs; without it the step is skipped.
        gpu: Whether it needs a CUDA device.
        lacking: Why it cannot run, if that is known already.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    tool: str | None = None
    gpu: bool = True
    lacking: str | None = None


def obstacle(step: Step, gpu: bool) -> str | None:
    """Why a step cannot run here; None if it can."""
    if step.lacking is not None:
        return step.lacking
    if step.gpu and not gpu:
        return "no CUDA device"
    if step.tool is not None and shutil.which(step.tool) is None:
        return f"{step.tool} is not on the path"
    return None


def load(path: Path) -> dict[str, dict]:
    """What is known of each step, by its name."""
    return json.loads(path.read_text()) if path.exists() else {}


def save(path: Path, state: dict[str, dict]) -> None:
    """Write the state so that a reader finds the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(state, indent=1) + "\n")
    os.replace(part, path)


def execute(step: Step, log: Path) -> dict:
    """Run a step to its end or its limit, all that it started with it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("wb") as file:
        child = subprocess.Popen(
            step.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(step.limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Its own session: whatever it left running ends with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    seconds = round(time.monotonic() - start, 1)
    if code is None:
        return {"status": "late", "reason": f"not done in {step.limit:.0f} s", "seconds": seconds}
    status = {"status": "done"} if code == 0 else {"status": "failed", "reason": f"exit {code}"}
    return status | {"seconds": seconds}


def pending(steps: Sequence[Step], state: dict[str, dict]) -> list[Step]:
    """The steps that have no result yet."""
    unknown = [s for s in steps if state.get(s.name, {}).get("status") in (None, "running")]
    return [s for s in unknown if state.get(s.name, {}).get("tries", 0) < TRIES]


def sitting(
    steps: Sequence[Step],
    out: Path,
    *,
    gpu: bool,
    seconds: float,
    say: Callable[[str], None] = print,
) -> dict[str, dict]:
    """Run the steps that are left, as long as the next one's limit fits into `seconds`.

    Returns:
        The state of all steps that have one.
    """
    path, end = out / "state.json", time.monotonic() + seconds
    state = load(path)
    for step in steps:
        found = state.get(step.name, {})
        if found.get("status") == "running" and found.get("tries", 0) >= TRIES:
            state[step.name] = found | {"status": "failed", "reason": "interrupted twice"}
            say(f"{step.name}: failed, interrupted twice")
    save(path, state)
    for step in pending(steps, state):
        reason = obstacle(step, gpu)
        if reason is not None:
            state[step.name] = {"status": "skipped", "reason": reason}
            save(path, state)
            say(f"{step.name}: skipped, {reason}")
            continue
        if time.monotonic() + step.limit > end:
            break
        tries = state.get(step.name, {}).get("tries", 0) + 1
        state[step.name] = {"status": "running", "tries": tries}
        save(path, state)
        say(f"{step.name}: {' '.join(step.command)}")
        log = out / "logs" / f"{step.name}.log"
        state[step.name] = execute(step, log) | {"tries": tries, "log": log.name}
        save(path, state)
        for line in log.read_text(errors="replace").splitlines()[-TAIL:]:
            say(f"  {line}")
        say(f"{step.name}: {state[step.name]['status']}, {state[step.name]['seconds']} s")
    return state


def forget(steps: Sequence[Step], out: Path, statuses: Sequence[str]) -> None:
    """Let steps of these statuses run again."""
    path = out / "state.json"
    state = load(path)
    named = {step.name for step in steps}
    kept = {k: v for k, v in state.items() if k not in named or v["status"] not in statuses}
    save(path, kept)
