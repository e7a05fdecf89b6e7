"""Private steps by Opake, in an environment of its own: its clipped_grad and gaussian_noise."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from opake.dpsgd.clipping import clipped_grad
from opake.dpsgd.noise import gaussian_noise
from opake.random import fold_in, key
from torch import Tensor
from torch.func import functional_call

from bench import minilm, steps


def build(
    network: str, variant: str, parameters: dict[str, Tensor], x: Tensor, y: Tensor,
    clips: list[float], members: list[list[str]], lr: float,
) -> tuple[str, Callable[[float], list[Tensor]]]:  # fmt: skip
    """Version, and a step from the first parameters; arguments as of `bench.jax_steps.build`."""
    model = minilm.written_out(steps.network(network, torch.device("cpu")))
    model.load_state_dict(parameters, strict=False)
    start = {n: p.detach() for n, p in steps.trained(model).items()}
    held = {n: p.clone() for n, p in start.items()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return steps.losses(functional_call(model, params, (x[None],)), y[None])[0]

    gradient, state = clipped_grad(loss, clipping_norm=clips[0], batch_argnums=(1, 2))
    noises: dict[float, list[Any]] = {}

    def run(scale: float) -> list[Tensor]:
        nonlocal state
        for name, value in held.items():
            value.copy_(start[name])
        if scale not in noises:
            own = fold_in(key(0), len(noises))
            noises[scale] = list(gaussian_noise(noise_multiplier=scale / clips[0], key=own))
        sums, state = gradient(held, x, y, state=state)
        noisy, noises[scale][1] = noises[scale][0](sums, noises[scale][1])
        found = [noisy.pytree[name] for name in held]
        with torch.no_grad():
            torch._foreach_add_(list(held.values()), found, alpha=-lr)
        return found

    return f"opake {version('opake')}, torch {torch.__version__}", run
