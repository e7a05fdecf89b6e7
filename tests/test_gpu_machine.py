"""What a GPU machine runs: little more than torch, triton, Lightning and pytest is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from bench import dp_step, kernels, measure
from bench.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
NAMED = {"jsonargparse", "dp_accounting", "wandb", "opacus", "numba", "pooch", "scipy", "sklearn"}
ABSENT = NAMED | {"matplotlib", "rich", "safetensors", "docstring_parser", "pandas", "xdist"}
# One finder says that it has not found a package; another raises, which not all libraries expect.
HIDE = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in HIDDEN:
            return self.finder.find_spec(name, path, target)
        if RAISES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
GPU_TESTS = {
    "test_triton_gpu.py", "test_triton_clip_sum_edges.py", "test_triton_product_norms.py",
    "test_bench.py",
}  # fmt: skip


def run(folder: Path, *command: str, raises: bool = False) -> subprocess.CompletedProcess[str]:
    """Run Python without those packages."""
    (folder / "sitecustomize.py").write_text(
        HIDE.replace("RAISES", str(raises)).replace("HIDDEN", str(NAMED if raises else ABSENT))
    )
    paths = os.pathsep.join([str(folder), str(ROOT)])
    environment = {"PYTHONPATH": paths, "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=environment,
        check=False,
    )  # fmt: skip


def test_all_gpu_tests_are_collected(tmp_path: Path) -> None:
    done = run(
        tmp_path, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert {Path(line.partition("::")[0]).name for line in found} >= GPU_TESTS


@pytest.mark.slow
def test_the_same_gpu_tests_are_collected_as_here(tmp_path: Path) -> None:
    done = run(
        tmp_path, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"
    )
    found = [line for line in done.stdout.splitlines() if "::" in line]
    here = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q"], cwd=ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found == [line for line in here.stdout.splitlines() if "::" in line]


@pytest.mark.parametrize("raises", [False, True])
def test_the_benchmarks_for_a_gpu_are_imported(tmp_path: Path, raises: bool) -> None:
    code = (
        "import bench.__main__, bench.kernels, bench.dp_step, bench.rounds, bench.engine\n"
        "import aadp_kernels._triton.backend, aadp_kernels._triton.product_norms, torch\n"
        "import fl_lightning.models\n"
        "from bench import cases, kernels, rounds, steps\n"
        "from bench.problem import Problem\n"
        "device = torch.device('cuda')\n"
        "assert kernels.jobs(device, False) and rounds.cases(device, False)\n"
    )
    if not raises:  # torch's own compiler, which vmap imports, does not expect it
        code += "setup = steps.Setup.build('MLP', 8, torch.device('cpu'))\n"
        code += "assert len(steps.sides(setup, ('philox10',))) > 5\n"
    done = run(tmp_path, "-c", code, raises=raises)
    assert done.returncode == 0, done.stderr


def test_the_command_gets_as_far_as_the_device(tmp_path: Path) -> None:
    """Every part in one process; where there is a device it goes on."""
    code = (
        "from bench.__main__ import main\n"
        "for part in ('kernels', 'dp_step', 'rounds'):\n"
        "    try:\n"
        f"        main([part, '--device', 'cuda', '--quick', '--out', {str(tmp_path)!r}])\n"
        "        print('went on')\n"
        "    except SystemExit:\n"
        "        pass\n"
    )
    done = run(tmp_path, "-c", code)
    reached = done.stderr.count("no CUDA device") + done.stdout.count("went on")
    assert reached == 3, done.stderr


def test_a_mode_that_torch_calls_a_prototype_fails_no_test() -> None:
    """`set_sync_debug_mode` warns in these words."""
    warnings.warn(
        "Synchronization debug mode is a prototype feature and does not yet detect all "
        "synchronizing operations (Triggered internally at Module.cpp:1)",
        UserWarning,
        stacklevel=1,
    )


def test_a_side_that_fails_while_it_is_timed_does_not_end_the_others() -> None:
    """A kernel may be compiled for the values of a later call."""
    calls: list[int] = []
    told: list[tuple[str, str]] = []

    def late() -> float:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("does not compile")
        return 1.0

    samples = measure.interleaved(
        {"a": lambda: 1.0, "b": late, "c": lambda: 2.0}, 5, 1.0,
        lambda name, error: told.append((name, str(error))),
    )  # fmt: skip
    assert samples == {"a": [1.0] * 5, "c": [2.0] * 5}
    assert told == [("b", "does not compile")]
    calls.clear()
    with pytest.raises(RuntimeError, match="compile"):
        measure.interleaved({"b": late}, 5, 1.0)


def test_a_case_that_cannot_be_built_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no sides: it is written down by itself, and the command fails at its end."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(kernels.Problem, "build", broken)
    monkeypatch.setattr(dp_step.Setup, "build", broken)
    for part in ("kernels", "dp_step"):
        with pytest.raises(SystemExit) as done:
            main([part, "--quick", "--only", "MLP", "--out", str(tmp_path)])
        assert "MLP" in str(done.value)
        assert ": RuntimeError: out of memory" in str(done.value)
        (path,) = tmp_path.glob("*.json")
        found = json.loads(path.read_text())[part]
        assert found["results"] == {}
        assert set(found["failed"].values()) == {"RuntimeError: out of memory"}


def test_cases_share_the_time_that_is_left() -> None:
    shares: list[float] = []

    def case(share: float) -> dict[str, object]:
        shares.append(share)
        if len(shares) == 2:
            raise ValueError
        return {"sides": {}}

    results = measure.every_case("part", dict.fromkeys("abcd", case), 100.0)
    assert results == {
        "a": {"sides": {}}, "b": {"failed": "ValueError: "}, "c": {"sides": {}}, "d": {"sides": {}}
    }  # fmt: skip
    # What a case leaves goes to those after it.
    assert shares == pytest.approx([25, 100 / 3, 50, 100], rel=0.1)
    assert measure.every_case("part", {"a": case}, -1.0) == {}
