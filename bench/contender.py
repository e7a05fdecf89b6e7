"""One side of a comparison: how it is built, fed, gated and timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bench import measure, parity
from bench.problem import Problem

# (tensors, scale, step) -> results; in place, or sums.
Body = Callable[[list[Tensor], float, int], Sequence[Tensor]]
# (problem, tensor, step, count) -> noise of scale one of the last elements of each row.
Specification = Callable[[Problem, int, int, int], Tensor]


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
        clips: False for a mere copy.
        spec: Noise of scale one to compare with number by number, or None.
    """

    name: str
    kind: str
    level: str
    build: Callable[[Problem], Runner]
    form: str | None = None
    clips: bool = True
    spec: Specification | None = None


class Local:
    """A contender in this process; on a GPU its buffers rotate, so that the L2 cache is cold."""

    def __init__(self, problem: Problem, body: Body) -> None:
        self.problem, self.body, self.turn = problem, body, 0
        self.buffers = problem.buffers

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
    ends = {i: problem.end(want, budget) for i, want in expected.items()}
    del expected
    results = []
    for _ in range(2):
        drawn = runner.results(problem.scale)
        results.append({i: problem.end(drawn[i], budget) for i in ends})
        del drawn
    step = problem.step
    noises = [
        torch.cat([(result[i].double() - want).flatten() for i, want in ends.items()])
        for result in results
    ]
    parity.check_noise(noises[1] / problem.scale, problem.mechanism)
    parity.independent(noises[0], noises[1], "two calls")
    if contender.spec is None:
        return "statistics"
    for i, want in ends.items():
        noise = contender.spec(problem, i, step, want.shape[-1]).view_as(want)
        parity.check_same(results[1][i], want, noise, problem.scale)
    return "specification"
