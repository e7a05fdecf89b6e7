"""Whether clients train together or one after another, and how many records fit into memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


def bytes_per_example(network: nn.Module, example: Tensor) -> int:
    """Rough memory of one record's forward and backward pass: activations and unfolded patches."""
    total = [example.numel()]

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        if isinstance(output, Tensor):
            total[0] += output.numel()
        if isinstance(module, nn.Conv2d) and isinstance(output, Tensor):
            patch = module.in_channels // module.groups * int(np.prod(module.kernel_size))
            total[0] += patch * output[0, 0].numel() + module.weight.numel()

    leaves = [m for m in network.modules() if not list(m.children())]
    handles = [m.register_forward_hook(count) for m in leaves]
    try:
        with torch.no_grad():
            network(example[None])
    finally:
        for handle in handles:
            handle.remove()
    return 4 * 3 * total[0]


def faster_execution(run: Callable[[bool], object], *, repeats: int = 3) -> tuple[bool, str]:
    """Whether vmap beats the loop, by timing `run(vectorize)`, and a line that says why.

    A network that cannot be vmapped is trained by the loop; the reason is in the line.
    """

    def best(vectorize: bool) -> float:
        run(vectorize)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run(vectorize)
            times.append(time.perf_counter() - start)
        return min(times)

    try:
        vmapped = best(True)
    except Exception as error:  # whatever functorch cannot do shows only by trying
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        return False, f"clients train one after another: the network cannot be vmapped ({reason})"
    looped = best(False)
    winner = "together (vmap)" if vmapped <= looped else "one after another (loop)"
    return vmapped <= looped, (
        f"clients train {winner}: a step took {1e3 * vmapped:.1f} ms under vmap and "
        f"{1e3 * looped:.1f} ms in a loop"
    )
