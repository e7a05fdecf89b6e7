"""Contenders that exist on a GPU only: other windows, a replayed CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from aadp_kernels import NoiseKey, privatize_
from bench.contender import Contender, Local, Runner
from bench.ours import SEED, privatize_body, specification
from bench.problem import Problem

WINDOWS = (8, 16, 48)  # MB; the default stands among ours


@contextmanager
def _patched(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """A module's attribute replaced for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _window(problem: Problem, megabytes: int) -> Runner:
    """One launch whose second read trails the first by so much at most."""
    plan = import_module("aadp_kernels._triton.launch_plan")
    # A layout remembers its plan, so another window needs another layout.
    own = copy.copy(problem)
    own.layout = copy.deepcopy(problem.layout)
    vars(own.layout).pop("_triton_plans", None)
    body = privatize_body(own, "philox10", "fast", "triton")

    def patched(tensors: list[Tensor], scale: float, step: int) -> list[Tensor]:
        with _patched(plan, "window_of", lambda _: megabytes << 20):
            return body(tensors, scale, step)

    return Local(problem, patched)


def _graph(problem: Problem) -> Runner:
    """A CUDA graph that counts its own steps; one graph for each of the rotating buffers."""
    device = problem.device
    key = NoiseKey.from_seed(SEED, "philox10")
    step_on_device = torch.zeros((), dtype=torch.int64, device=device)
    scales = torch.zeros_like(problem.clip)
    clients = None if problem.rows is None else torch.arange(problem.rows, device=device)
    graphs: dict[int, torch.cuda.CUDAGraph] = {}
    state = {"scale": -1.0, "step": 0}

    def once(tensors: list[Tensor]) -> None:
        step_on_device.add_(1)
        privatize_(
            tensors, layout=problem.layout, clip=problem.clip, scale=scales, p=problem.p,
            mechanism=problem.mechanism, key=key, step=step_on_device, clients=clients,
            reference=problem.reference, impl="triton", form="fast",
        )  # fmt: skip

    def capture(tensors: list[Tensor]) -> torch.cuda.CUDAGraph:
        values = [t.clone() for t in tensors]
        once(tensors)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once(tensors)
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
        step_on_device.fill_(state["step"])
        return graph

    def body(tensors: list[Tensor], scale: float, step: int) -> list[Tensor]:
        address = tensors[0].data_ptr()
        if scale != state["scale"]:
            scales.fill_(scale)
            state["scale"] = scale
        if address not in graphs:
            graphs[address] = capture(tensors)
        if step != state["step"] + 1:
            step_on_device.fill_(step - 1)
        state["step"] = step
        graphs[address].replay()
        return tensors

    return Local(problem, body)


def contenders(problem: Problem, *, windows: bool) -> list[Contender]:
    """For whole updates on a GPU."""
    if problem.device.type != "cuda" or problem.summed:
        return []
    spec = specification("philox10", "fast")

    def make(name: str, kind: str, build: Callable[[Problem], Runner]) -> Contender:
        return Contender(name, kind, "layer", build, form="fast", spec=spec)

    found = [make("ours, fast, philox10, CUDA graph", "ours", _graph)]
    for megabytes in WINDOWS if windows else ():
        build = partial(_window, megabytes=megabytes)
        found.append(make(f"ours, fast, philox10, window {megabytes} MB", "ours", build))
    return found
