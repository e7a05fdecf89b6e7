"""All that is to be done with a GPU, in order: `make gpu-day` until nothing is left.

    python -m bench.gpu_day             the next steps, for nine minutes at most
    python -m bench.gpu_day --minutes 60
    python -m bench.gpu_day --dry-run   lists the steps and runs none
    python -m bench.gpu_day --again     failed, late and skipped steps, too

torch, triton, numpy, pytest and hypothesis are enough; the rounds want pytorch-lightning and
torchmetrics as well. What is measured is written to build/gpu-day: state.json, a log a step, the
environment, the results of the benchmarks, and predicted.md, the predictions of docs/gpu.md
against them. To publish it, copy the results to bench/results and run `python -m bench report`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench import staged
from bench.staged import Step

OUT = staged.ROOT / "build" / "gpu-day"
MINUTES = 8.8
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
TRITON = "tests/aadp_kernels/test_triton"
GPU = f"{TRITON}_gpu.py"
# What matters most first: bits and bounds, then order among programs, then everything else.
TESTS = {
    "specification": (GPU, "-k", "specification"),
    "bits": (GPU, "-k", "bits_of_the_cpu"),
    "contention": (GPU, "-k", "contention or graph or synchronisation"),
    "far": (GPU, "-k", "two_to_the_31 or bad_scales"),
    "all of the GPU": ("tests/aadp_kernels", "-m", "gpu"),
    "privatize": (f"{TRITON}_privatize.py", "-m", "not slow"),
    "noise": (f"{TRITON}_noise.py", f"{TRITON}_rng.py", "-m", "not slow"),
    "clipped sums": (f"{TRITON}_clip_sum.py", f"{TRITON}_product_norms.py", "-m", "not slow"),
}
SANITIZED = {
    "memcheck": (GPU, "-k", "contention or (specification and float32 and fast and philox10)"),
    "racecheck": (GPU, "-k", "two_streams or (specification and float32 and fast and philox10)"),
}
KERNELS = (
    "GPT-2", "ResNet-50", "2 layers of Llama", "ResNet-18", "BERT", "LoRA", "CNN", "MLP", "ViT",
    "one tensor",
)  # fmt: skip


def benchmark(out: Path, part: str, only: str = "") -> tuple[str, ...]:
    """A part of `python -m bench` on the device, or the cases of it that are named."""
    command = (sys.executable, "-m", "bench", part, "--device", "cuda", "--out", str(out))
    return (*command, "--only", only) if only else command


def warm_up() -> Step:
    """Compile every kernel before anything is timed or limited."""
    command = (sys.executable, "-m", "aadp_kernels.warm_up", "--dtype", "float32", "bfloat16")
    return Step("warm-up", command, 520)


def steps(out: Path) -> list[Step]:
    """Everything, in order of importance."""
    python = sys.executable
    found = [
        Step("environment", (python, "-m", "bench.gpu_environment", str(out)), 60, gpu=False),
        warm_up(),
    ]
    for name, arguments in TESTS.items():
        marked = ("-m", "gpu") if arguments[0] == GPU else ()
        found.append(Step(f"test {name}", (*PYTEST, *arguments, *marked), 400))
    for name, arguments in SANITIZED.items():
        command = (
            "compute-sanitizer",
            "--tool",
            name,
            "--error-exitcode",
            "9",
            *PYTEST,
            *arguments,
        )
        found.append(Step(name, (*command, "-m", "gpu"), 500, tool="compute-sanitizer"))
    found += [Step(f"kernels {name}", benchmark(out, "kernels", name), 300) for name in KERNELS]
    found += [Step(part, benchmark(out, part), 500) for part in ("dp_step", "rounds")]
    predicted = (python, "-m", "bench.predictions", str(out))
    return [*found, Step("predicted", predicted, 60, gpu=False)]


def summary(todo: list[Step], state: dict[str, dict]) -> list[str]:
    """A line a step."""
    lines = []
    for step in todo:
        found = state.get(step.name, {"status": "to do"})
        reason = f", {found['reason']}" if "reason" in found else ""
        seconds = f", {found['seconds']} s" if "seconds" in found else ""
        lines.append(f"{step.name}: {found['status']}{reason}{seconds}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 unless a step failed or was late."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_day", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of this sitting")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args(arguments)
    out, gpu = options.out.resolve(), torch.cuda.is_available()
    todo = steps(out)
    if not gpu:
        print("No CUDA device: the steps that need one are skipped.", flush=True)
    if options.dry_run:
        for step in todo:
            reason = staged.obstacle(step, gpu)
            what = f"skipped, {reason}" if reason else f"at most {step.limit:.0f} s"
            print(f"{step.name}: {what}: {' '.join(step.command)}")
        return 0
    if options.again:
        staged.forget(todo, out, ("failed", "late", "skipped"))
    # Without a device nothing is written down as skipped: the day may still come.
    able = todo if gpu else [step for step in todo if staged.obstacle(step, gpu) is None]
    seconds = 60 * options.minutes
    state = staged.sitting(able, out, gpu=gpu, seconds=seconds, say=lambda s: print(s, flush=True))
    print("\n".join(["", *summary(todo, state)]))
    left = staged.pending(able, state)
    if left:
        print(f"\n{len(left)} steps are left, the next is {left[0].name!r}: run this again.")
    bad = [s.name for s in todo if state.get(s.name, {}).get("status") in ("failed", "late")]
    return 1 if bad and not left else 0


if __name__ == "__main__":
    sys.exit(main())
