"""Gates on the machine code of the clipped sums and norms of products, built without a GPU.

The builds run in a process of their own: Triton's interpreter, which the other tests use, and
ahead-of-time builds cannot share one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("triton_aot_sums.py")
MAX_REGISTERS = {"norms": 128, "sums": 128, "correlated": 128, "grid": 160, "products": 128}

QUICK = ["norms,1,votes,fp32,90", "sums,philox10,fast,laplace,fp32,90", "products,fp32,90"]
SLOW = [
    f"{case},{dtype},{capability}"
    for case in (
        "norms,1,none", "norms,2,none", "norms,2,votes", "sums,philox10,wide,gaussian",
        "sums,philox10,wide,laplace", "sums,philox10,fast,laplace", "sums,chacha8,wide,gaussian",
        "sums,chacha8,fast,gaussian", "sums,chacha20,wide,laplace", "grid", "products",
        "correlated,philox10,wide,gaussian", "correlated,chacha8,fast,gaussian",
    )
    for dtype in ("fp32", "bf16")
    for capability in (80, 90)
]  # fmt: skip


def measure(cases):
    """Reports of the cases, built in another process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *cases], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(report):
    kind, *details, dtype, _ = report["case"].split(",")
    # A thread has four neighbouring numbers of fast ChaCha noise: 64 bits of a 16-bit tensor.
    narrow = dtype == "bf16" and "fast" in details and details[0].startswith("chacha")
    width = "64" if narrow else "128"
    assert report["spills"] == report["stack"] == 0, report
    assert report["registers"] <= MAX_REGISTERS[kind], report
    if kind in ("norms", "sums", "correlated", "grid"):
        # Loads of at least four records, or of as many blocks, are in flight together.
        assert report[f"loads{width}"] >= 4, report
    if kind in ("sums", "correlated", "grid"):
        assert report[f"stores{width}"] >= 1, report
    if kind == "products":
        assert report["loads128"] >= 4, report
        # float32 runs in float32 and not in TF32; 16 bits run on tensor cores.
        assert (report["tensor_core"] > 0) == (dtype == "bf16"), report
        assert (report["fused"] >= 64) == (dtype == "fp32"), report


def test_gates_of_the_common_cases():
    reports = measure(QUICK)
    for report in reports:
        check(report)
    assert len(reports) == len(QUICK)


@pytest.mark.slow
def test_gates_of_all_cases():
    reports = measure(SLOW)
    for report in reports:
        check(report)
    assert len(reports) == len(SLOW)
