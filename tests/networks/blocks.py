"""What a building block is: a network by name, and records that fit it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 3
WIDTH, LENGTH, CODES = 8, 6, 12

Records = Callable[[int, torch.Generator], Tensor]


def vectors(n: int, generator: torch.Generator) -> Tensor:
    """[n, 8]."""
    return torch.randn(n, WIDTH, generator=generator)


def images(n: int, generator: torch.Generator) -> Tensor:
    """[n, 2, 8, 8]."""
    return torch.randn(n, 2, 8, 8, generator=generator)


def volumes(n: int, generator: torch.Generator) -> Tensor:
    """[n, 1, 4, 4, 4]."""
    return torch.randn(n, 1, 4, 4, 4, generator=generator)


def series(n: int, generator: torch.Generator) -> Tensor:
    """[n, 6, 8], positions of vectors."""
    return torch.randn(n, LENGTH, WIDTH, generator=generator)


def tokens(n: int, generator: torch.Generator) -> Tensor:
    """int64 [n, 6], codes from 1 and a tail of zeros: lengths from 1 to 6."""
    codes = torch.randint(1, CODES, (n, LENGTH), generator=generator)
    length = torch.randint(1, LENGTH + 1, (n, 1), generator=generator)
    return codes.masked_fill(torch.arange(LENGTH) >= length, 0)


@dataclass(frozen=True)
class Block:
    """A network that users have.

    Args:
        name: for the page.
        records: what its records look like.
        make: builds the network; called after `torch.manual_seed`, so that two are equal.
        loss: builds the loss of each record; None: cross entropy.
        needs: packages that it is made of, beside torch.
        classes: of its labels.
    """

    name: str
    records: Records
    make: Callable[[], nn.Module]
    loss: Callable[[], nn.Module] | None = None
    needs: tuple[str, ...] = ()
    classes: int = CLASSES

    def network(self) -> nn.Module:
        """A new network, equal to any other that this method gives.

        Its parameters are moved a little: behind a layer of zeros nothing would be seen.
        """
        with torch.random.fork_rng():
            torch.manual_seed(3)
            network = self.make()
            with torch.no_grad():
                for parameter in network.parameters():
                    if parameter.requires_grad and not nn.parameter.is_lazy(parameter):
                        parameter.add_(0.1 * torch.randn_like(parameter))
        return network

    def missing(self) -> str | None:
        """The first package that is not installed."""
        return next((name for name in self.needs if importlib.util.find_spec(name) is None), None)


class Net(nn.Module):
    """A network of named parts with the forward of a function (network, x) → outputs."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def frozen(module: nn.Module) -> nn.Module:
    """The module, whose parameters are not trained."""
    return module.requires_grad_(False)
