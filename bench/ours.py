"""The contenders of this package, in every form and implementation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from aadp_kernels import FORMS, Layout, NoiseKey, clip_sum_noise, privatize_, sample_noise
from bench.contender import Body, Contender, Local, Runner, Specification
from bench.problem import Problem

SEED = 11


def variants(function: Callable, device: torch.device) -> list[tuple[str, str]]:
    """(implementation, form) of all that run on a device: numba and triton may be missing."""
    names = ("torch", "triton") if device.type == "cuda" else ("torch", "numba")
    impls = names if "impl" in inspect.signature(function).parameters else ("",)
    return [pair for pair in product(impls, FORMS) if _runs(function, *pair, device)]


def _runs(function: Callable, impl: str, form: str, device: torch.device) -> bool:
    """Whether a call of this kind is refused."""
    one = torch.ones(1, 1, device=device)
    options = {"impl": impl} if impl else {}
    if function is privatize_:
        options["clients"] = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        function(
            [one], layout=Layout.build([one[0]]), clip=one[0], scale=one[0], p=1, step=0,
            mechanism="laplace", key=NoiseKey.from_seed(0), form=form, **options,
        )  # fmt: skip
    except (ValueError, ImportError):
        return False
    return True


def privatize_body(problem: Problem, rng: str, form: str, impl: str) -> Body:
    key = NoiseKey.from_seed(SEED, rng)
    clients = None
    if problem.rows is not None:
        clients = torch.arange(problem.rows, device=problem.device)
    scales: dict[float, Tensor] = {}

    def body(tensors: list[Tensor], scale: float, step: int) -> list[Tensor]:
        if scale not in scales:
            scales[scale] = torch.full_like(problem.clip, scale)
        privatize_(
            tensors, layout=problem.layout, clip=problem.clip, scale=scales[scale], p=problem.p,
            mechanism=problem.mechanism, key=key, step=step, clients=clients,
            reference=problem.reference, impl=impl, form=form,
        )  # fmt: skip
        return tensors

    return body


def _clip_sum_body(problem: Problem, rng: str, form: str, impl: str) -> Body:
    key = NoiseKey.from_seed(SEED, rng)
    options = {"impl": impl} if impl else {}

    def body(tensors: list[Tensor], scale: float, step: int) -> list[Tensor]:
        return clip_sum_noise(
            tensors, layout=problem.layout, clip=problem.clip,
            scale=torch.full_like(problem.clip, scale) if scale else None, p=problem.p,
            mechanism=problem.mechanism, key=key, step=step, form=form, **options,
        )[0]  # fmt: skip

    return body


def specification(rng: str, form: str) -> Specification:
    """Noise of scale one, by the plain-torch specification and an equal key."""

    def noise(problem: Problem, index: int, step: int, count: int) -> Tensor:
        cohort = problem.rows is not None and not problem.summed
        layout: Layout = problem.layout
        client = torch.arange(problem.rows or 1, device=problem.device) if cohort else 0
        return sample_noise(
            (problem.rows or 1, count) if cohort else (count,), mechanism=problem.mechanism,
            scale=1.0, key=NoiseKey.from_seed(SEED, rng), step=step, client=client,
            layer=layout.layer_of[index],
            offset=layout.offsets[index] + layout.sizes[index] - count, dtype=torch.float64,
            device=problem.device, impl="torch", form=form,
        )  # fmt: skip

    return noise


def contenders(
    problem: Problem, rngs: tuple[str, ...], *, specification_too: bool = True
) -> list[Contender]:
    """Every form, generator and implementation; the specification itself only where asked for."""
    function = clip_sum_noise if problem.summed else privatize_
    make = _clip_sum_body if problem.summed else privatize_body
    found = []
    every = variants(function, problem.device)
    for (each, form), rng in product(every, rngs):
        alone = (
            problem.summed and form != "grid" and {i for i, f in every if f == form} == {"torch"}
        )
        if each == "torch" and (
            form == "grid" or rng != rngs[0] or not (specification_too or alone)
        ):
            continue
        # The grid form wants a secure generator, and on a CPU it is too slow for large tables.
        large = problem.device.type == "cpu" and problem.elements > 2e7
        if form == "grid" and (rng != rngs[-1] or large):
            continue

        def build(problem: Problem, rng=rng, form=form, impl=each) -> Runner:
            return Local(problem, make(problem, rng, form, impl))

        name = f"ours, {form}, {rng}" + (f", {each}" if each else "")
        # The grid rounds the clipped values too: its own tests compare it bit by bit.
        spec = None if form == "grid" else specification(rng, form)
        found.append(Contender(name, "ours", "layer", build, form=form, spec=spec))
    return found
