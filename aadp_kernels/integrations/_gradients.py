"""Clipped sums between backward and step: whose they are, of how many forwards, and unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_ZERO_FIRST = "zero_grad() must be called between two steps"


class ClippedSums:
    """Keeps the account of `grad` of every private parameter.

    Only what `add` was given may be released. The sum stands in `parameter.grad`, where everybody
    expects it; its identity and version say whether somebody else has written there.

    Args:
        parameters: Private parameters by name. Gradients that they hold are forgotten.
        micro_batches: Whether the sums of several forwards, each of other records, may be added up
            before a step.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, micro_batches: bool) -> None:
        self.parameters = dict(parameters)
        self.micro_batches = micro_batches
        self.forwards = 0
        for parameter in self.parameters.values():
            parameter.grad = None
        self.zeroed()

    def zeroed(self) -> None:
        """The caller has emptied all gradients: a new step begins."""
        # None, or zeros of zero_grad(set_to_none=False).
        self._left = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        self._versions = {name: grad._version for name, grad in self._left.items()}
        self.forwards, self._spent = 0, ""
        self._running: set[int] = set()

    def add(self, name: str, grad: Tensor) -> None:
        """Add what one forward's backward pass gave a parameter."""
        parameter = self.parameters[name]
        there = parameter.grad
        if there is None:
            parameter.grad = there = grad
        else:
            self._check_unchanged(name, there)
            with torch.no_grad():
                there.add_(grad)
        self._left[name], self._versions[name] = there, there._version

    def begin(self) -> None:
        """A forward that has given nothing yet begins to give; called within backward.

        Raises:
            RuntimeError: The gradients of the step before were not zeroed, or a pass has failed.
            ValueError: A second forward before a step, without micro_batches.
        """
        self._notice_emptied()
        task = torch._C._current_graph_task_id()
        self._check_ready(allowed={task})
        if self.forwards and not self.micro_batches:
            raise ValueError(
                "two backward passes before a step: a record in both would count twice. Call "
                "zero_grad() before each; micro_batches=True allows gradient accumulation, and "
                "says that every forward before a step has other records"
            )
        self.forwards += 1
        if task not in self._running:
            running = self._running
            running.add(task)
            # Is called where backward has come to its end without an error.
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: running.discard(task))

    def take(self) -> list[Tensor]:
        """The sums [*parameter.shape] of all private parameters, zeros where nothing was added.

        Raises:
            RuntimeError: As `begin`; a gradient that something else has written or changed.
        """
        self._notice_emptied()
        self._check_ready(allowed=set())
        found = {name: p.grad for name, p in self.parameters.items()}
        for name, grad in found.items():
            if grad is not None or name in self._left:
                self._check_unchanged(name, grad)
        for name, grad in found.items():
            if grad is None:
                parameter = self.parameters[name]
                parameter.grad = self._left[name] = torch.zeros_like(parameter)
        return [self._left[name] for name in self.parameters]

    def spend(self) -> None:
        """The sums were released; they count no more, and must be zeroed before the next step."""
        self._spent = _ZERO_FIRST

    def give_up(self, reason: str) -> None:
        """Something has failed half-way: nothing is released until the gradients are zeroed."""
        self._spent = reason

    def forget(self, reason: str) -> None:
        """As `give_up`, and what is half summed or half noised is thrown away."""
        for parameter in self.parameters.values():
            parameter.grad = None
        self._left.clear()
        self._spent = reason

    def _notice_emptied(self) -> None:
        """`model.zero_grad()` empties the gradients too, without telling."""
        if self._left and all(self.parameters[name].grad is None for name in self._left):
            self.zeroed()

    def _check_ready(self, allowed: set[int]) -> None:
        """Raise unless a step has begun and every backward pass in it has come to its end."""
        if self._spent:
            raise RuntimeError(self._spent)
        if self._running - allowed:
            raise RuntimeError("a backward pass has failed half-way: zero_grad() must be called")

    def _check_unchanged(self, name: str, grad: Tensor | None) -> None:
        """Raise unless the gradient is the one that was left here, with its values."""
        left = self._left.get(name)
        if grad is None or grad is not left or grad._version != self._versions[name]:
            raise RuntimeError(
                f"the gradient of {name!r} was changed between backward and step; each record's "
                "gradient is clipped already, and what else is done to their sum before the noise "
                "(clip_grad_norm_, GradScaler.unscale_, gradients set by hand) is not bounded. "
                "Call zero_grad() of the private optimizer to begin anew"
            )
