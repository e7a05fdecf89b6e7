"""Gates on the machine code of the kernels, built for sm_80 and sm_90 without a GPU.

The builds run in a process of their own: Triton's interpreter, which the other tests use, and
ahead-of-time builds cannot share one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aadp_kernels._triton import float64

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("triton_aot.py")

# Instructions an element of the apply loop over whole tiles, measured (Triton 3.6 and 3.9) and
# rounded up a little.
BUDGETS = {
    ("philox10", "fast"): 28,
    ("chacha8", "fast"): 44,
    ("chacha20", "fast"): 80,
    ("philox10", "wide"): 120,
    ("chacha8", "wide"): 170,
    ("chacha20", "wide"): 244,
}
# CPU seconds of a build, which a loaded machine stretches a little.
MAX_SECONDS = 16
# Four programs on a multiprocessor; three for ChaCha in the wide form, whose words fill the rest.
MAX_REGISTERS = 144
MAX_REGISTERS_WIDE_CHACHA = 184

QUICK = ["philox10,fast,laplace,fp32,1,90"]
SLOW = [
    "philox10,fast,laplace,fp32,1,80",
    "philox10,fast,laplace,bf16,1,90",
    "philox10,fast,gaussian,fp32,2,90",
    "chacha8,fast,laplace,fp32,1,90",
    "chacha8,fast,gaussian,bf16,2,80",
    "chacha20,fast,laplace,fp32,1,90",
    "philox10,wide,laplace,fp32,1,90",
    "philox10,wide,laplace,bf16,1,80",
    "philox10,wide,gaussian,fp32,2,80",
    "chacha8,wide,laplace,fp32,1,90",
    "chacha8,wide,laplace,bf16,1,80",
    *(f"chacha20,wide,laplace,fp32,1,{capability}" for capability in (80, 90, 100, 120)),
    *(f"philox10,fast,laplace,fp32,1,{capability}" for capability in (100, 120)),
    *(f"philox10,{form},laplace,fp32,1,89" for form in ("wide", "fast")),
    "philox10,grid,laplace,fp32,1,90",
]
AMD = [
    f"{rng},{form},{kind},gfx942"
    for rng, form in (("philox10", "wide"), ("chacha20", "wide"), ("chacha20", "grid"))
    for kind in ("laplace,fp32,1", "gaussian,bf16,2")
]


def measure(cases):
    """Reports of the cases, built in another process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[2])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *cases], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(report):
    rng, form, mechanism, dtype, *_ = report["case"].split(",")
    assert report["spills"] == report["stack"] == report["local"] == 0, report
    wide_chacha = rng.startswith("chacha") and form == "wide"
    assert report["registers"] <= (MAX_REGISTERS_WIDE_CHACHA if wide_chacha else MAX_REGISTERS)
    assert report["seconds"] <= MAX_SECONDS, report
    if form == "grid":
        return
    assert report["wide_norm_loops"] >= 1, report
    # Wide accesses tell the cache what is read again: norm loads are, apply loads and stores not.
    assert report["hints"] == ["ld first", "ld last", "st first"], report
    assert report["apply"] is not None, report
    assert report["other_loads"] == 0, report
    moved = 16 * report["loads128"] + 8 * report["loads64"]
    assert moved == report["bytes"] == 16 * report["stores128"] + 8 * report["stores64"], report
    if dtype == "fp32" or rng.startswith("philox"):
        assert report["loads64"] == report["stores64"] == 0, report
    if dtype == "fp32":
        # A row of the wide form of ChaCha is two vectors: it goes through shared memory.
        assert report["shuffles"] == 0 or (rng.startswith("chacha") and form == "wide"), report
        assert report["apply"] <= BUDGETS[rng, form], report
    if dtype == "fp32" and mechanism == "laplace":
        # What warnings and predictions for graphics cards are made of.
        most = float64.OPERATIONS if form == "wide" else 3
        assert report["float64"] <= most, report
        assert form == "fast" or report["float64"] >= 0.9 * most, report


def test_gates_of_the_common_cases():
    for report in measure(QUICK):
        check(report)


@pytest.mark.slow
def test_gates_of_all_cases():
    reports = measure(SLOW)
    for report in reports:
        check(report)
    assert len(reports) == len(SLOW)


@pytest.mark.slow
def test_wide_and_grid_are_built_for_an_amd_device():
    """Nobody has run them there: what an assembler can tell."""
    reports = measure(AMD)
    assert len(reports) == len(AMD)
    for report in reports:
        assert report["object"] > 0, report
        assert report["vgpr_spill_count"] == report["private_segment_fixed_size"] == 0, report
        # Parts of the device have caches of their own: who waits for a factor reads past them.
        assert report["coherent_loads"] == 2, report
        assert not report["fused"], report
