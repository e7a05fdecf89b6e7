"""One record-level private training step against the same step without privacy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from bench import gpt2, measure, minilm, parity, step_peers, steps
from bench.kernels import note_failure
from bench.step_peers import RemoteRunner
from bench.steps import Setup

LONG = 1.0  # seconds of a step


def jobs(quick: bool, gpu: bool) -> list[tuple[str, int, int]]:
    """(network, batch, p) of each comparison."""
    found = [("MLP", 500, 2), ("CNN", 500, 2), ("transformer", 32, 2)]
    if not quick:
        found += [("MLP", 64, 2), ("CNN", 64, 2), ("transformer", 128, 2)]
        found += [("MLP", 500, 1), ("CNN", 500, 1)]
        found += [(name, 32, 2) for name in minilm.NAMES]
        found += [(gpt2.NAME, 16, 2)]
    if gpu:
        found += [("MLP", 4096, 2), ("CNN", 4096, 2), ("transformer", 1024, 2)]
    return found


def title_of(name: str, size: int, p: int) -> str:
    """How tables call a comparison."""
    return f"{name}, batch {size}" + (", L1 clip and Laplace" if p == 1 else "")


class StepRunner:
    """One side with a model of its own, put back before every step."""

    def __init__(self, setup: Setup, build: Callable[[Setup], steps.Built]) -> None:
        self.setup = setup
        own = replace(setup, model=copy.deepcopy(setup.model))
        self.model, self.step = build(own)
        self.start = [p.detach().clone() for p in self.model.parameters()]

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, value in zip(self.model.parameters(), self.start, strict=True):
            parameter.copy_(value)

    def run(self) -> None:
        self.step(self.setup.scale)

    def timer(self) -> measure.Timer:
        return measure.timer(self.run, self.setup.device, before=self.restore)

    def peak_extra(self) -> int | None:
        """Memory of a step, in bytes."""
        return measure.peak_extra(lambda: (release(self.model), self.run()), self.setup.device)

    def close(self) -> None:
        """Nothing is left to end."""

    def gradients(self, scale: float) -> list[Tensor]:
        """Gradients of a step from the first parameters."""
        self.restore()
        return [g.detach().clone() for g in self.step(scale)]


def gate(runner: StepRunner | RemoteRunner, level: str) -> str:
    """Equal clipped gradients, noise of the right scale, new noise every step.

    Raises:
        parity.ParityError: Otherwise.
    """
    setup = runner.setup
    if level == "none":
        return "no privacy"
    silent = runner.gradients(0.0)
    wanted = setup.gradients[level]
    if len(silent) != len(wanted):
        raise parity.ParityError(f"{len(silent)} gradients, must be {len(wanted)}")
    # Sums of products of float32 in another order: 1e-4 of the largest entry of a tensor, and
    # 1e-7 of the largest of all where there is nothing but rounding (the biases of keys).
    floor = max(1e-3 * max(float(want.abs().max()) for want in wanted), 1e-30)
    for i, (have, want) in enumerate(zip(silent, wanted, strict=True)):
        worst = float((have.double() - want).abs().max() / want.abs().max().clamp(min=floor))
        if not worst <= 1e-4:
            raise parity.ParityError(f"clipped gradient {i} differs by {worst:.1e}")
    both = []
    for _ in range(2):
        noisy = runner.gradients(setup.scale)
        parts = [(a.double() - b).flatten() for a, b in zip(noisy, wanted, strict=True)]
        both.append(torch.cat(parts) / setup.scale)
    parity.check_noise(both[1], "gaussian" if setup.p == 2 else "laplace")
    parity.independent(both[0], both[1], "two steps")
    return "equal clipped gradients"


def run(device: torch.device, *, quick: bool, budget: float, only: str = "") -> dict:
    """Every comparison, or those that are named; `budget` seconds for all of them together."""
    todo = {
        title_of(*job): partial(measure_step, *job, device, quick=quick)
        for job in jobs(quick, device.type == "cuda")
        if only in title_of(*job)
    }
    for missing, names in ((minilm.missing(), minilm.NAMES), (gpt2.missing(), (gpt2.NAME,))):
        for title in [t for t in todo if missing and t.startswith(names)]:
            print(f"\n{title}\n  skipped, {missing} is not installed", flush=True)
            del todo[title]
    return measure.every_case("dp_step", todo, budget)


def measure_step(
    name: str, size: int, p: int, device: torch.device, budget: float, quick: bool
) -> dict:
    """One comparison: what it needs, and its sides."""
    return measure_setup(Setup.build(name, size, device, p), budget, quick)


def measure_setup(setup: Setup, budget: float, quick: bool) -> dict:
    """Gate every side, then time those that passed, in turns."""
    rngs = ("chacha20",) if quick else ("philox10", "chacha20")
    entries: dict[str, dict] = {}
    passed: dict[str, StepRunner | RemoteRunner] = {}
    local = {
        name: (kind, level, partial(StepRunner, build=build))
        for name, (kind, level, build) in steps.sides(setup, rngs).items()
    }
    with ExitStack() as running:
        for name, (kind, level, make) in {**local, **step_peers.sides(setup)}.items():
            entries[name] = entry = {"kind": kind, "clips": level}
            try:
                runner = make(setup)
                running.callback(runner.close)
                if isinstance(runner, RemoteRunner):
                    entry["version"] = runner.version
                entry["first_call"] = measure.first_call(runner.run, setup.device)
                entry["gate"] = gate(runner, level)
                passed[name] = runner
            except Exception as error:
                note_failure(name, entry, error)
        time_sides(setup, passed, entries, budget, quick)
    size = sum(p.numel() for p in setup.model.parameters())
    return {"network": setup.name, "batch": setup.size, "p": setup.p, "parameters": size,
            "sides": entries}  # fmt: skip


def time_sides(
    setup: Setup,
    passed: Mapping[str, StepRunner | RemoteRunner],
    entries: dict[str, dict],
    budget: float,
    quick: bool,
) -> None:
    """Seconds and memory of the sides that passed, in turns, into their entries."""
    timers = {name: runner.timer() for name, runner in passed.items()}

    def failed(name: str, error: Exception) -> None:
        note_failure(name, entries[name], error)

    samples = measure.interleaved(timers, 15 if quick else 25, 0.4 * budget, failed)
    rows = {name: measure.in_a_row(timers[name], 10) for name in samples}
    # What takes long gains nothing from its like before it, and ten of it take ten times as long.
    medians = (measure.quantiles(taken)[0] for taken in samples.values())
    long = max(medians, default=0.0) > LONG
    repeated = {} if quick or long else measure.interleaved(rows, 15, 0.3 * budget, failed)
    for name, seconds in samples.items():
        if "failed" in entries[name] or "skipped" in entries[name]:
            continue
        entries[name]["seconds"] = seconds
        if name in repeated:
            entries[name]["in_a_row"] = repeated[name]
        entries[name]["peak_extra"] = passed[name].peak_extra()
        floor = samples.get("no privacy", seconds)
        ratio = measure.ratios(seconds, floor)[0]
        print(f"  {name}: {1e3 * measure.quantiles(seconds)[0]:.2f} ms, {ratio:.2f} x", flush=True)


def release(model: nn.Module) -> None:
    """No gradients from the step before, so that they count as memory of this one."""
    for parameter in model.parameters():
        parameter.grad = None
