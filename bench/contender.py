"""One side of a comparison: how it is built, fed, gated and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bench import measure, parity
from bench.problem import Problem

L2_CACHE = 128 << 20  # bytes of buffers to rotate through, over twice the largest cache
# (tensors, scale, step) -> results; in place, or sums.
Body = Callable[[list[Tensor], float, int], Sequence[Tensor]]


class Runner(Protocol):
    """A contender with its data in place; one that is not `Local` also has a `version`."""

    def run(self) -> object: ...

    def restore(self) -> None: ...

    def results(self, scale: float) -> list[Tensor]: ...

    def timer(self) -> measure.Timer: ...


@dataclass(frozen=True)
class Contender:
    """An implementation of a problem.

    Attributes:
        name: In tables.
        kind: "ours", "peer" or "floor".
        level: What one norm covers: "layer", "tensor" or "all".
        build: Makes a runner; may raise ImportError or RuntimeError, which skips it.
        form: Of our noise: "wide", "fast", "grid"; None for others.
        exact: Whether noise is compared number by number with the specification.
        clips: False for a mere copy.
        spec: For an exact one: noise of scale one of a tensor at a step, by the specification.
    """

    name: str
    kind: str
    level: str
    build: Callable[[Problem], Runner]
    form: str | None = None
    clips: bool = True
    spec: Callable[[Problem, int, int], Tensor] | None = None


class Local:
    """A contender in this process; on a GPU its buffers rotate, so that the L2 cache is cold."""

    def __init__(self, problem: Problem, body: Body) -> None:
        self.problem, self.body, self.turn = problem, body, 0
        size = sum(t.nbytes for t in problem.tensors)
        copies = 1
        if problem.device.type == "cuda":
            copies = min(64, 1 + L2_CACHE // max(size, 1))
        self.buffers = [[t.clone() for t in problem.tensors] for _ in range(copies)]

    def run(self) -> Sequence[Tensor]:
        self.problem.step += 1
        self.turn = (self.turn + 1) % len(self.buffers)
        return self.body(self.buffers[self.turn], self.problem.scale, self.problem.step)

    def restore(self) -> None:
        """The values of the problem again, so that every call has the same work."""
        for buffers in self.buffers:
            for buffer, value in zip(buffers, self.problem.tensors, strict=True):
                buffer.copy_(value)

    def results(self, scale: float) -> list[Tensor]:
        """Results of one call on fresh values with noise of this scale."""
        self.restore()
        self.problem.step += 1
        return [t.clone() for t in self.body(self.buffers[0], scale, self.problem.step)]

    def timer(self) -> measure.Timer:
        return measure.timer(
            self.run, self.problem.device, before=self.restore, inner=len(self.buffers)
        )


def gate(contender: Contender, runner: Runner, problem: Problem, budget: int) -> str:
    """Check clip and noise of a contender; what was compared.

    Raises:
        parity.ParityError: It does not compute what it is compared for.
    """
    if not contender.clips:
        return "copy"
    dtype = problem.tensors[0].dtype
    expected = problem.expected(contender.level, budget)
    # Norms that others add up in float32 are off by 1e-4 on a few million elements.
    rtol = (1e-5 if contender.kind == "ours" else 1e-3) + 4 * torch.finfo(dtype).eps
    parity.check_clip(dict(enumerate(runner.results(0.0))), expected, rtol)
    first, second = (runner.results(problem.scale) for _ in range(2))
    pairs = [
        torch.stack([(r[i].double() - want).flatten() for r in (first, second)])
        for i, want in expected.items()
    ]
    z = torch.cat(pairs, 1) / problem.scale
    parity.check_noise(z[1], problem.mechanism)
    parity.independent(z[0], z[1], "two calls")
    if contender.spec is None:
        return "statistics"
    step = problem.step
    for i, want in expected.items():
        noise = contender.spec(problem, i, step).view_as(want)
        parity.check_same(second[i], want + problem.scale * noise, noise, problem.scale)
    return "specification"


def warm(runner: Runner, seconds: float) -> None:
    """Run until caches, clocks and compilers have settled."""
    runner.run()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        runner.run()
