"""Python's share of a call of `privatize_` in Triton: the kernel is replaced by nothing.

`python -m bench.gpu_overhead OTHER_TREE` measures this tree and another one, such as a worktree of
an earlier commit, in turns, and writes bench/results/gpu_overhead.json for docs/gpu.md. It needs no
GPU: what is left of a call beside its kernel is the same Python, and a look at the clip norms and
scales, which a device would spare it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from bench import machine, measure

RESULT = machine.ROOT / "bench" / "results" / "gpu_overhead.json"
# Tensors of the layer tables: what they hold plays no part.
TENSORS = {"ResNet-50": 161, "GPT-2": 148, "ResNet-18": 62, "CNN": 6}
TURNS, WARM_UP, CALLS = 9, 150, 600

# A process of its own: Triton reads its mode once, and two trees have one name.
CODE = """
import os, sys, time
os.environ["TRITON_INTERPRET"] = "1"
import torch
torch.set_num_threads(1)
from aadp_kernels import Layout, NoiseKey, privatize_
import aadp_kernels._triton.privatize as launches

class Nothing:
    def __getitem__(self, grid):
        return lambda *arguments, **constants: None

launches.privatize_kernel = Nothing()
count, warm_up, calls = map(int, sys.argv[1:])
tensors = [torch.zeros(4) for _ in range(count)]
layout, key = Layout.build(tensors), NoiseKey.random("philox10")
bounds = torch.ones(count, dtype=torch.float64)

def call(step):
    privatize_(tensors, layout=layout, clip=bounds, scale=bounds, key=key, step=step, form="fast",
               impl="triton")

for step in range(warm_up):
    call(step)
start = time.process_time()
for step in range(warm_up, warm_up + calls):
    call(step)
print((time.process_time() - start) / calls)
"""


def seconds(tree: Path, count: int) -> float:
    """CPU seconds a call over so many tensors in a tree, what is entered late counted in."""
    command = [sys.executable, "-c", CODE, *map(str, (count, WARM_UP, CALLS))]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def compare(other: Path) -> list[dict[str, object]]:
    """A row for each number of tensors: medians, and the ratio within a turn with its spread."""
    rows: list[dict[str, object]] = []
    for name, count in TENSORS.items():
        pairs = [(seconds(other, count), seconds(machine.ROOT, count)) for _ in range(TURNS)]
        before, now = ([pair[i] for pair in pairs] for i in (0, 1))
        ratio, low, high = measure.ratios(before, now)
        rows.append(
            {
                "tensors": f"{count} ({name})",
                "before": f"{1e6 * statistics.median(before):.0f} µs",
                "now": f"{1e6 * statistics.median(now):.0f} µs",
                "ratio": f"{ratio:.1f} ({low:.1f} to {high:.1f})",
            }
        )
        print(rows[-1], flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_overhead", description=__doc__)
    parser.add_argument("other", type=Path, help="a tree of an earlier commit")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    other = options.other.resolve()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=other, capture_output=True, text=True, check=True
    ).stdout.strip()
    found = {"machine": machine.record(torch.device("cpu")), "before": commit}
    found["rows"] = compare(other)
    options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
