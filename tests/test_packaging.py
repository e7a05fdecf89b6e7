"""The kernels alone, fl_lightning by an extra, one version; what is missing is said in a line."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import aadp_kernels
import fl_lightning
from fl_lightning.requirements import PACKAGES, check_packages

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FEDERATED = PROJECT["optional-dependencies"]["federated"]


def run_without(hidden: set[str], then: str) -> subprocess.CompletedProcess[str]:
    """Runs code for which these modules are not there: neither to find nor to import."""
    code = f"import sys\nfor name in {sorted(hidden)}: sys.modules[name] = None\n{then}"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[><=;]", line)[0].strip().lower() for line in requirements}


def test_kernels_need_torch_numpy_and_triton_alone() -> None:
    assert names(PROJECT["dependencies"]) == {"torch", "numpy", "triton"}
    assert names(PROJECT["optional-dependencies"]["cpu"]) == {"numba"}


def test_the_check_knows_every_package_of_the_extra() -> None:
    homes = {k: {d.lower() for d in v} for k, v in packages_distributions().items()}
    known = set().union(*(homes[package] for package in PACKAGES))
    assert names(FEDERATED) - {"aadp-fl", "blake3"} <= known  # hashlib does for blake3
    for package in PACKAGES:
        assert homes[package] & names(FEDERATED), package


def test_public_names_are_listed_before_they_are_used() -> None:
    for package in (aadp_kernels, fl_lightning):
        assert set(package.__all__) == set(package._HOMES) <= set(dir(package))


def test_the_version_is_one() -> None:
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert citation is not None
    assert aadp_kernels.__version__ == fl_lightning.__version__ == citation[1]
    assert "version" in PROJECT["dynamic"]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_and_its_extra_are_named(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as refused:
        check_packages()
    assert str(refused.value) == (
        f"fl_lightning needs packages that are not installed ({package}): "
        "pip install 'aadp-fl[federated]'"
    )


def test_the_command_line_says_it_in_one_line() -> None:
    """`python -m` is what runpy's _run_module_as_main does."""
    then = "import runpy; runpy._run_module_as_main('fl_lightning.fit')"
    done = run_without(set(PACKAGES), then)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert ", ".join(PACKAGES) in line
    assert "pip install 'aadp-fl[federated]'" in line


@pytest.mark.parametrize(
    ("remove", "lacks"),
    [
        ("sys.modules['fcntl'] = None", "has no fcntl, by"),
        ("import os; del os.register_at_fork", "has no os.register_at_fork, by"),
    ],
)
def test_a_system_that_is_not_posix_is_refused(remove: str, lacks: str) -> None:
    """fl_lightning says what the system lacks; importing it does nothing else before."""
    then = f"import runpy\n{remove}\n"
    done = run_without(set(), then + "runpy._run_module_as_main('fl_lightning.fit')")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "fl_lightning runs on Linux and macOS" in line
    assert lacks in line
    assert "aadp_kernels works here" in line


def test_the_kernels_work_without_any_of_them() -> None:
    then = """
import torch
from aadp_kernels import Layout, NoiseKey, noise_scales, privatize_
update = [torch.ones(3, 4), torch.ones(3)]
layout = Layout.build(update, [0, 0])
one = torch.ones(1)
scale = noise_scales(one, one, mechanism="gaussian", noise_multiplier=1e-6, adjacency="zero_out")
privatize_(update, layout=layout, clip=one, scale=scale, p=2, mechanism="gaussian",
           key=NoiseKey.random(), step=0)
norm = sum(float(t.square().sum()) for t in update) ** 0.5
assert 0.99 < norm < 1.01, norm
"""
    done = run_without({*PACKAGES, "numba", "opacus", "fl_lightning"}, then)
    assert done.returncode == 0, done.stderr


def test_constraints_leave_triton_to_torch() -> None:
    """Torch for CUDA asks for one version of triton: another one here would let nothing install."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = names([line for line in lines if not line.startswith("#")])
    assert "torch" in pinned
    assert "triton" not in pinned
