"""Gates on the machine code of the kernels, built for sm_80 to sm_120 without a GPU.

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
# The same with the noise of two steps.
BUDGETS_AGAIN = {
    ("philox10", "fast"): 62,
    ("chacha8", "fast"): 88,
    ("philox10", "wide"): 264,
    ("chacha20", "wide"): 475,
}
# CPU seconds of a build, which a loaded machine stretches a little.
MAX_SECONDS = 16
# Room for four programs on a multiprocessor with the fastest noise, and for three with others.
# ChaCha in the wide form may leave room for two alone: its words fill the rest.
MAX_REGISTERS = {("philox10", "fast"): 128, ("chacha8", "wide"): 184, ("chacha20", "wide"): 184}
MAX_REGISTERS_OTHERS = 168
# What programs tell each other, in which order of memory: sums (who counts last sees them all),
# tickets (twice) and the factor.
ATOMICS = ["acq_rel add", "relaxed add", "relaxed add", "relaxed exch"]

QUICK = ["philox10,fast,laplace,fp32,1,90,1"]
SLOW = [
    "philox10,fast,laplace,fp32,1,80,1",
    "philox10,fast,laplace,bf16,1,90,1",
    "philox10,fast,gaussian,fp32,2,90,1",
    "chacha8,fast,laplace,fp32,1,90,1",
    "chacha8,fast,gaussian,bf16,2,80,1",
    "chacha20,fast,laplace,fp32,1,90,1",
    "philox10,wide,laplace,fp32,1,90,1",
    "philox10,wide,laplace,bf16,1,80,1",
    "philox10,wide,gaussian,fp32,2,80,1",
    "chacha8,wide,laplace,fp32,1,90,1",
    "chacha8,wide,laplace,bf16,1,80,1",
    *(f"chacha20,wide,laplace,fp32,1,{capability},1" for capability in (80, 90, 100, 120)),
    *(f"philox10,fast,laplace,fp32,1,{capability},1" for capability in (100, 120)),
    *(f"philox10,{form},laplace,fp32,1,89,1" for form in ("wide", "fast")),
    "philox10,grid,laplace,fp32,1,90,1",
    *(f"philox10,fast,gaussian,fp32,2,{capability},2" for capability in (80, 90, 100, 120)),
    "philox10,wide,gaussian,fp32,2,90,2",
    "philox10,wide,gaussian,bf16,2,90,2",
    "chacha8,fast,gaussian,fp32,2,80,2",
    "chacha20,wide,gaussian,fp32,2,90,2",
]
AMD = [
    f"{rng},{form},{kind},gfx942,1"
    for rng, form in (("philox10", "wide"), ("chacha20", "wide"), ("chacha20", "grid"))
    for kind in ("laplace,fp32,1", "gaussian,bf16,2")
] + ["chacha20,wide,gaussian,fp32,2,gfx942,2"]


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
    rng, form, mechanism, dtype, *_, bands = report["case"].split(",")
    assert report["spills"] == report["stack"] == report["local"] == 0, report
    assert report["registers"] <= MAX_REGISTERS.get((rng, form), MAX_REGISTERS_OTHERS), report
    assert report["atomics"] == ATOMICS, report
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
        budgets = BUDGETS if bands == "1" else BUDGETS_AGAIN
        assert report["apply"] <= budgets[rng, form], report
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
