"""The day of the GPU: its steps, and how they are run in several sittings."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_day, staged
from bench.staged import Step

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")


def python(name: str, code: str, **options) -> Step:
    options = {"limit": 60.0, "gpu": False} | options
    return Step(name, (sys.executable, "-c", code), **options)


def quiet(steps, out, seconds=600.0, gpu=False):
    lines: list[str] = []
    state = staged.sitting(steps, out, gpu=gpu, seconds=seconds, say=lines.append)
    return state, lines


def statuses(state):
    return {name: found["status"] for name, found in state.items()}


def test_a_step_that_fails_is_written_down_and_the_rest_goes_on(tmp_path):
    steps = [
        python("good", "print('hello')"),
        python("bad", "print('why it failed'); raise SystemExit(3)"),
        python("last", "pass"),
    ]
    state, lines = quiet(steps, tmp_path)
    assert statuses(state) == {"good": "done", "bad": "failed", "last": "done"}
    assert state["bad"]["reason"] == "exit 3"
    assert json.loads((tmp_path / "state.json").read_text()) == state
    assert "  hello" in lines
    assert "why it failed" in (tmp_path / "logs" / "bad.log").read_text()


def test_nothing_that_has_a_result_runs_again(tmp_path):
    count = tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('x'); raise SystemExit({{}})"
    steps = [python("good", code.format(0)), python("bad", code.format(1))]
    for _ in range(3):
        quiet(steps, tmp_path)
    assert count.read_text() == "xx"
    staged.forget(steps, tmp_path, ("failed",))
    state, _ = quiet(steps, tmp_path)
    assert count.read_text() == "xxx"
    assert statuses(state) == {"good": "done", "bad": "failed"}


def test_a_sitting_ends_before_a_step_that_does_not_fit(tmp_path):
    steps = [python("short", "pass", limit=5.0), python("long", "pass", limit=500.0)]
    state, _ = quiet(steps, tmp_path, seconds=60.0)
    assert statuses(state) == {"short": "done"}
    assert [s.name for s in staged.pending(steps, state)] == ["long"]
    state, _ = quiet(steps, tmp_path, seconds=600.0)
    assert statuses(state) == {"short": "done", "long": "done"}


def test_a_step_past_its_limit_is_stopped_with_all_that_it_started(tmp_path):
    mark = tmp_path / "mark"
    inner = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {inner!r}])"
    start = time.monotonic()
    state, _ = quiet([python("slow", f"{code}; time.sleep(60)", limit=1.5)], tmp_path)
    assert time.monotonic() - start < 30
    assert statuses(state) == {"slow": "late"}
    time.sleep(3)
    assert not mark.exists()


def test_an_interrupted_step_is_tried_twice(tmp_path):
    steps = [python("step", "pass"), python("next", "pass")]
    staged.save(tmp_path / "state.json", {"step": {"status": "running", "tries": 1}})
    assert statuses(quiet(steps, tmp_path)[0]) == {"step": "done", "next": "done"}
    staged.save(tmp_path / "state.json", {"step": {"status": "running", "tries": 2}})
    state, _ = quiet(steps, tmp_path)
    assert state["step"] == {"status": "failed", "tries": 2, "reason": "interrupted twice"}
    assert statuses(state)["next"] == "done"


def test_what_is_missing_is_said_in_a_line(tmp_path):
    steps = [
        python("tool", "pass", tool="no-such-tool"),
        python("device", "pass", gpu=True),
        python("module", "pass", lacking="x is not there"),
    ]
    state, lines = quiet(steps, tmp_path)
    assert [s["reason"] for s in state.values()] == [
        "no-such-tool is not on the path", "no CUDA device", "x is not there",
    ]  # fmt: skip
    assert len(lines) == 3


def test_the_steps_of_the_day():
    steps = gpu_day.steps(Path("out"))
    names = [s.name for s in steps]
    assert len(set(names)) == len(names)
    assert names[:3] == ["environment", "warm-up", "test specification"]
    assert names.index("kernels GPT-2") < min(names.index(n) for n in names if n == "kernels MLP")
    assert names[-1] == "predicted"
    # Every command fits into a sitting, and a sitting into nine minutes.
    assert all(step.limit < 60 * gpu_day.MINUTES <= 540 for step in steps)
    for step in steps:
        for argument in step.command:
            if argument.startswith("tests/"):
                assert (ROOT / argument).exists(), argument


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu_day.TESTS)
def test_the_tests_of_the_day_exist(name):
    """Each selection finds tests where there is no GPU, too."""
    arguments = gpu_day.TESTS[name]
    marked = ["-m", "gpu"] if arguments[0] == gpu_day.GPU else []
    command = [*gpu_day.PYTEST, "--collect-only", *arguments, *marked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("case", gpu_day.KERNELS)
def test_the_cases_of_the_day_exist(case):
    from bench.kernels import jobs

    assert any(case in job.title for job in jobs(torch.device("cuda"), False))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu_day", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@WITHOUT_GPU
def test_a_dry_run_lists_the_steps_and_runs_none(tmp_path):
    done = run("--dry-run", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "No CUDA device: the steps that need one are skipped."
    assert len(lines) == 1 + len(gpu_day.steps(tmp_path))
    assert not (tmp_path / "out").exists()


@WITHOUT_GPU
def test_without_a_gpu_the_other_steps_are_done(tmp_path):
    done = run("--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    state = json.loads((tmp_path / "state.json").read_text())
    assert statuses(state) == {"environment": "done", "predicted": "done"}
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["versions"]["torch"]
    assert "GPT-2" in (tmp_path / "predicted.md").read_text()
