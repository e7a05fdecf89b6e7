"""The federated problem that every engine gets: records, clients, cohorts, batches, and the plain
loop that says what the model must be after a number of rounds.

Needs torch and numpy only, since engines run in environments of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fl_lightning.models import CNN, MLP

LR = 0.1


def network(name: str) -> nn.Module:
    """The CNN (about 20,000 parameters) and the MLP (51,000) of `bench.cohort`, or a small one."""
    torch.manual_seed(0)
    if name == "CNN":
        return CNN(image_size=28, channels=[16, 32], kernel_sizes=[6, 4], strides=[2, 2], hidden=[])
    return MLP(in_features=784, hidden=[64]) if name == "MLP" else MLP()


def batches(problem: dict[str, Any], client: int, round: int) -> list[Tensor]:
    """Rows of a client's minibatches in a round: those that fl_lightning draws."""
    own = problem["owners"][client]
    order = np.random.default_rng([problem["seed"], round, client]).permutation(len(own))
    size, steps = problem["batch"], problem["steps"]
    return [own[order[i * size : (i + 1) * size]] for i in range(steps)]


def records(problem: dict[str, Any], client: int, round: int) -> tuple[Tensor, Tensor]:
    """A client's records of a round in the order of its minibatches."""
    rows = torch.cat(batches(problem, client, round))
    return problem["x"][rows], problem["y"][rows]


class Local:
    """Local training written down plainly: one model, one client after another."""

    def __init__(self, problem: dict[str, Any]) -> None:
        self.problem = problem
        self.device = torch.device(problem["device"])
        self.model = network(problem["network"]).to(self.device)
        self.parameters = dict(self.model.named_parameters())
        self.x, self.y = problem["x"].to(self.device), problem["y"].to(self.device)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def train(self, client: int, round: int) -> None:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=self.problem["lr"])
        for rows in batches(self.problem, client, round):
            rows = rows.to(self.device)
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.x[rows]), self.y[rows]).backward()
            optimizer.step()

    def round(
        self, weights: dict[str, Tensor], round: int, clip: float | None = None
    ) -> dict[str, Tensor]:
        """The global model after a round; `clip` is the L2 clip norm of each layer's update."""
        total = {name: torch.zeros_like(value) for name, value in weights.items()}
        cohort = self.problem["schedule"][round].tolist()
        for client in cohort:
            self.load(weights)
            self.train(client, round)
            with torch.no_grad():
                update = {n: p - weights[n] for n, p in self.parameters.items()}
                for name, value in clipped(update, clip).items():
                    total[name] += value
        return {name: value + total[name] / len(cohort) for name, value in weights.items()}


def clipped(update: dict[str, Tensor], clip: float | None) -> dict[str, Tensor]:
    """Each module's tensors scaled down together to an L2 norm of at most `clip`."""
    if clip is None:
        return update
    layers: dict[str, list[str]] = {}
    for name in update:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    result = {}
    for names in layers.values():
        norm = torch.cat([update[n].flatten() for n in names]).norm()
        result |= {n: update[n] * (clip / norm).clamp(max=1.0) for n in names}
    return result


def start(problem: dict[str, Any]) -> dict[str, Tensor]:
    """The first global model."""
    state = network(problem["network"]).state_dict()
    return {name: value.to(problem["device"]) for name, value in state.items()}


@torch.no_grad()
def accuracy(problem: dict[str, Any], weights: dict[str, Tensor]) -> float:
    """Share of the test records that a model gets right."""
    model = network(problem["network"])
    model.load_state_dict(weights)
    right = model(problem["x_test"]).argmax(1) == problem["y_test"]
    return float(right.double().mean())
