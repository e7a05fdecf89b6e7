"""Random small networks as source text: drawn from a seed, printed, made, and made smaller."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.networks.operations import LOSSES, MIXING, ONCE, OTHERWISE, Operation

_ALL = {operation.name: operation for operation in (*ONCE, *OTHERWISE, *MIXING)}
assert len(_ALL) == len(ONCE) + len(OTHERWISE) + len(MIXING)

_HEADER = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from aadp_kernels import Bias

class Reverse(torch.autograd.Function):
    generate_vmap_rule = True
    @staticmethod
    def forward(x): return x.clone()
    @staticmethod
    def setup_context(ctx, inputs, output): pass
    @staticmethod
    def backward(ctx, g): return -g

class Rolled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): return g + 0.5 * g.roll(1, 0)

class Scaled(nn.Linear):
    def forward(self, input): return 2 * super().forward(input)

class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.n = nn.Linear(4, 4), nn.LayerNorm(4)
    def forward(self, x): return torch.tanh(self.l(self.n(x)))
"""


@dataclass(frozen=True)
class Program:
    """A network and a loss.

    Args:
        kind: its records: "vector" [4], "positions" [3, 4] or "tokens" int64 [3].
        steps: (name of an operation, number of an earlier layer) each.
        head: whether the outputs are those of a layer, or of the embedding's transposed weight.
        loss: one of LOSSES.
    """

    kind: str
    steps: tuple[tuple[str, int], ...]
    head: str
    loss: str

    @property
    def operations(self) -> Iterator[tuple[int, int, Operation]]:
        """(own number, number of an earlier dense layer, operation) of each step."""
        made = [0]
        for i, (name, pick) in enumerate(self.steps, 1):
            yield i, made[pick % len(made)], _ALL[name]
            if _ALL[name].makes:
                made.append(i)

    @property
    def random(self) -> bool:
        """Whether two forwards of the same records may differ."""
        return any(operation.random for _, _, operation in self.operations)

    @property
    def mixes(self) -> bool:
        """Whether something in it mixes records."""
        names = {operation.name for operation in MIXING}
        return "(mixes)" in self.loss or any(name in names for name, _ in self.steps)

    def source(self) -> str:
        """The classes `Network` and `Loss`."""
        tokens = self.kind == "tokens"
        made = ["self.l0 = nn.Linear(4, 4)"] + ["self.e0 = nn.Embedding(7, 4)"] * tokens
        done = ["h = torch.tanh(self.l0(self.e0(x)))" if tokens else "h = torch.tanh(self.l0(x))"]
        for i, j, operation in self.operations:
            made += operation.made.format(i=i, j=j).splitlines()
            done += [f"# {operation.name}", *operation.done.format(i=i, j=j).splitlines()]
        if self.kind != "vector":
            done.append("h = h.mean(1)")
        if self.head == "layer":
            made.append("self.head = nn.Linear(4, 3)")
            done.append("return self.head(h)")
        else:
            done.append("return h @ self.e0.weight.T" if tokens else "return h @ self.l0.weight.T")
        return "\n".join(
            [
                "class Network(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                *(f"        {line}" for line in made),
                "    def forward(self, x):",
                *(f"        {line}" for line in done),
                "class Loss(nn.Module):",
                "    def __init__(self, network):",
                "        super().__init__()",
                "        self.scale, self.held = nn.Parameter(torch.tensor(2.0)), [network]",
                "    def forward(self, outputs, labels):",
                f"        return {LOSSES[self.loss]}",
            ]
        )

    def make(self, seed: int = 0) -> tuple[nn.Module, nn.Module]:
        """The network, whose weights follow the seed, and the loss."""
        space: dict[str, Any] = {"__name__": "random_network"}
        exec(compile(_HEADER + self.source(), "<random network>", "exec"), space)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = space["Network"]()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return network, space["Loss"](network)

    def records(self, n: int, generator: torch.Generator) -> Tensor:
        """[n, ...] of all kinds: usual, long, short, zero, with a tail of zeros."""
        if self.kind == "tokens":
            x = torch.randint(1, 7, (n, 3), generator=generator)
        else:
            shape = (3, 4) if self.kind == "positions" else (4,)
            size = torch.tensor([1.0, 1.0, 1.0, 0.2, 4.0])
            pick = torch.randint(len(size), (n,), generator=generator)
            x = torch.randn(n, *shape, generator=generator)
            x = x * size[pick].view(-1, *[1] * len(shape))
        if self.kind != "vector":
            length = torch.randint(1, 4, (n, 1), generator=generator)
            hidden = torch.arange(3) >= length
            x = x.masked_fill(hidden if x.dim() == 2 else hidden[..., None], 0)
        return x

    def smaller(self) -> Iterator[Program]:
        """Programs that lack something of this one."""
        for i in range(len(self.steps)):
            yield replace(self, steps=self.steps[:i] + self.steps[i + 1 :])
        if self.loss != "cross entropy":
            yield replace(self, loss="cross entropy")
        if self.head != "layer":
            yield replace(self, head="layer")


def draw(seed: int) -> Program:
    """The program of a seed."""
    coins = random.Random(seed)
    kind = coins.choice(("vector", "positions", "positions", "tokens"))
    place = "vector" if kind == "vector" else "positions"
    depth, mixing = coins.choice((1, 1, 2, 2, 3, 4, 5)), coins.random() < 0.25
    groups = (ONCE,) if coins.random() < 0.3 else (ONCE, OTHERWISE)
    steps = []
    for at in range(depth):
        group = MIXING if mixing and at == 0 else coins.choice(groups)
        fitting = [operation for operation in group if operation.on in ("any", place)]
        steps.append((coins.choice(fitting).name, coins.randrange(8)))
    coins.shuffle(steps)
    loss = coins.choice(list(LOSSES)) if coins.random() < 0.2 else "cross entropy"
    return Program(kind, tuple(steps), coins.choice(("layer",) * 5 + ("weight",)), loss)


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """The smallest program found, by leaving out one thing after the other, that still fails."""
    for candidate in program.smaller():
        if fails(candidate):
            return shrink(candidate, fails)
    return program
