"""The examples run, and print what they claim."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
QUICK = {"plain_loop": 0.6, "flower_client": 0.7, "opacus_engine": 0.7}


def _main(name: str) -> object:
    """The example's main(), in this process."""
    spec = importlib.util.spec_from_file_location(
        f"example_{name}", ROOT / "examples" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main()


def _claims(printed: str) -> None:
    """Epsilon, delta, unit, adjacency, arithmetic and assumptions stand in the output."""
    epsilons = [float(e) for e in re.findall(r"epsilon ([\d.]+) at delta", printed)]
    assert epsilons
    assert all(0 < e < 10 for e in epsilons)
    for word in ("unit", "adjacency", "arithmetic", "assumed:"):
        assert word in printed


def test_every_example_is_run() -> None:
    assert set(EXAMPLES) == {*QUICK, "ddp"}


@pytest.mark.parametrize("name", sorted(QUICK))
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "opacus_engine":
        pytest.importorskip("opacus")
    accuracy = _main(name)
    assert isinstance(accuracy, float)
    assert accuracy > QUICK[name]
    _claims(capsys.readouterr().out)


@pytest.mark.slow
def test_two_processes() -> None:
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [sys.executable, "-W", "error", *words, "examples/ddp.py"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    _claims(done.stdout)
