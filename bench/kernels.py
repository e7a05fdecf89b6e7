"""Fused clipping and noise against naive: whole updates, cohorts and per-sample gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from aadp_kernels import UnsupportedLayerError
from bench import gpu, measure, ours, peers
from bench.cases import CASES
from bench.child import Child
from bench.contender import Contender, Local, Runner, gate
from bench.problem import Problem

LARGE = 5e7  # elements; on a CPU only the eager loop and the default generator go on from here
BOTH = ("default", "reduce-overhead")
GPU_MODES = {"cnn_100": BOTH, "resnet18": BOTH, "gpt2": ("default",)}
GATE_ELEMENTS = 1_500_000  # compared; layers are taken from both ends
EAGER = "eager loop, torch.distributions"


@dataclass(frozen=True)
class Job:
    """One comparison: a case, what is asked of it, and who takes part.

    Attributes:
        case: Key of `bench.cases.CASES`.
        p, mechanism, dtype, reference: What is asked.
        rows: Samples of a batch: the operation is then clip, sum, noise; None: whole updates.
        modes: Of torch.compile; each needs a compiler and up to minutes.
        short: Only the default generator and only the eager loop, for an axis by itself.
    """

    case: str
    p: int = 1
    mechanism: str = "laplace"
    dtype: str = "float32"
    reference: bool = False
    rows: int | None = None
    modes: tuple[str, ...] = ()
    short: bool = False

    @property
    def title(self) -> str:
        what = f"{'L1' if self.p == 1 else 'L2'} {self.mechanism.title()}"
        extra = "" if self.dtype == "float32" else f", {self.dtype}"
        extra += ", less a reference" if self.reference else ""
        table = CASES[self.case].title
        name = f"{table.split(' × ')[0]}, batch {self.rows}" if self.rows else table
        return f"{name}: {what}{extra}"


def jobs(device: torch.device, quick: bool) -> list[Job]:
    """What is compared on a device."""
    gpu = device.type == "cuda"
    found = [
        Job(
            name,
            modes=GPU_MODES.get(name, ()) if gpu else ("default",) if name == "cnn_100" else (),
            short=not gpu and case.elements > LARGE,
        )
        for name, case in CASES.items()
        if (gpu or not case.gpu_only) and (case.quick or not quick)
    ]
    # Tables that take longest come last, in case the time runs out.
    found, large = [j for j in found if not j.short], [j for j in found if j.short]
    found += [Job("cnn_100", p=2, mechanism="gaussian"), Job("cnn_100", reference=True, short=True)]
    found += [Job("mlp_100", p=2, mechanism="gaussian", rows=500)]
    if not quick:
        found += [Job("cnn_100", p=2, mechanism="gaussian", rows=500)]
        found += [Job("resnet18", p=2, mechanism="gaussian"), Job("resnet18", reference=True)]
        found += [Job("resnet18", dtype=d, short=True) for d in ("bfloat16", "float16")]
        found += [Job("resnet18", p=2, mechanism="gaussian", rows=8)]
    return found + large


def run(device: torch.device, *, quick: bool, budget: float, only: str = "") -> dict:
    """Every job, or those that are named; `budget` seconds for all of them together."""
    todo = {
        job.title: partial(measure_job, job, device, quick=quick)
        for job in jobs(device, quick)
        if only in job.title
    }
    return measure.every_case("kernels", todo, budget)


def measure_job(job: Job, device: torch.device, budget: float, quick: bool) -> dict:
    """Gate every contender, then time those that passed, in turns."""
    case = CASES[job.case]
    problem = Problem.build(
        case, device, p=job.p, mechanism=job.mechanism, dtype=getattr(torch, job.dtype),
        reference=job.reference, rows=job.rows, summed=job.rows is not None,
    )  # fmt: skip
    rngs = ("philox10", "chacha20")
    if job.short and problem.elements < LARGE:
        rngs = ("chacha20",)
    elif job.case in ("cnn_100", "resnet18") and not (job.short or quick):
        rngs = ("philox10", "chacha8", "chacha20")
    slow = not quick and job == Job("cnn_100", modes=job.modes)
    sides = ours.contenders(problem, rngs, specification_too=slow)
    sides += gpu.contenders(problem, windows=job.case == "gpt2")
    sides += peers.contenders(problem, modes=job.modes)
    if job.short:
        sides = [s for s in sides if s.kind != "peer" or s.name == EAGER]
    print(f"  {problem.elements:,} elements", flush=True)
    passed, entries = {}, {}
    for side in sides:
        runner, entry = prepare(side, problem)
        entries[side.name] = entry
        if runner is not None:
            passed[side.name] = runner
    floor = {name: r.timer() for name, r in passed.items()}

    def failed(name: str, error: Exception) -> None:
        note_failure(name, entries[name], error)

    samples = measure.interleaved(floor, 5 if quick else 15, 0.6 * budget, failed)
    for runner in passed.values():
        if isinstance(runner, Child):
            runner.close()
    for name, seconds in samples.items():
        entries[name]["seconds"] = seconds
        if isinstance(passed[name], Local):
            entries[name] |= footprint(passed[name], device)
        print(f"  {name}: {1e3 * measure.quantiles(seconds)[0]:.2f} ms", flush=True)
    return {
        "elements": problem.elements, "tensors": len(problem.tensors),
        "layers": problem.layout.num_layers, "bytes": problem.least_bytes(),
        "bytes_in": sum(t.nbytes for t in problem.tensors),
        "job": {k: v for k, v in vars(job).items() if k not in ("modes", "short")},
        "sides": entries,
    }  # fmt: skip


def prepare(side: Contender, problem: Problem) -> tuple[Runner | None, dict]:
    """Build and gate one contender: its runner, or None and in the entry why there is none.

    A peer is "skipped" whatever its library raises; one of ours has "failed" unless a package is
    missing.
    """
    entry: dict = {"kind": side.kind, "clips": side.level}
    runner: Runner | None = None
    try:
        runner = side.build(problem)
        if not isinstance(runner, Local):
            entry["version"] = runner.version
        entry["first_call"] = measure.first_call(runner.run, problem.device)
        entry["gate"] = gate(side, runner, problem, budget=GATE_ELEMENTS)
        runner.run()
        return runner, entry
    except Exception as error:
        if isinstance(runner, Child):
            runner.close()
        note_failure(side.name, entry, error)
    return None, entry


def note_failure(name: str, entry: dict, error: Exception) -> None:
    """Say why a side has no figure."""
    missing = isinstance(error, ImportError | NotImplementedError | UnsupportedLayerError)
    word = "failed" if entry["kind"] == "ours" and not missing else "skipped"
    reason = measure.reason_of(error)
    entry[word] = reason.replace("ParityError", "wrong result", 1)
    print(f"  {name}: {word}, {entry[word]}", flush=True)


def footprint(runner: Local, device: torch.device) -> dict:
    """Launches and memory of a call, outside the timed ones."""
    runner.restore()
    return {
        "launches": measure.launches(runner.run, device),
        "peak_extra": measure.peak_extra(runner.run, device),
    }
