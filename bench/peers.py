"""What somebody would use instead, for whole updates and for per-sample gradients.

Each is skipped with a line that says why where it cannot be imported or cannot do what the problem
asks for; what it clips (a layer, a tensor, everything at once) is said with its name.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Laplace, Normal

from bench.contender import Body, Contender, Local, Runner
from bench.problem import Problem


def _clip_in_place(parts: Sequence[Tensor], clip: Tensor, p: int) -> None:
    """One client's layer down to its clip norm, the way it is usually written."""
    flat = torch.cat([part.flatten() for part in parts])
    # On a CPU norm(1) of float32 is 3% off for 4e7 elements, which sum() is not.
    norm = flat.abs().sum() if p == 1 else flat.norm()
    factor = (clip / norm).clamp(max=1.0)
    for part in parts:
        part.mul_(factor)


def _eager(problem: Problem) -> Body:
    """A loop over clients and layers with torch.distributions."""
    kind = Laplace if problem.mechanism == "laplace" else Normal
    clips = problem.clip.to(problem.tensors[0].dtype)

    def body(tensors: list[Tensor], scale: float, step: int) -> list[Tensor]:
        for row in range(problem.rows or 1):
            for layer, members in enumerate(problem.layout.members):
                parts = [tensors[i][row] if problem.rows else tensors[i] for i in members]
                if problem.reference is not None:
                    for i, part in zip(members, parts, strict=True):
                        part.sub_(problem.reference[i])
                _clip_in_place(parts, clips[layer], problem.p)
                if scale:
                    # Each layer has a scale of its own in general, so a distribution of its own.
                    noise = kind(0.0, scale)
                    for part in parts:
                        part.add_(noise.sample(part.shape).to(part))
        return tensors

    return body


def _stacked_layers(problem: Problem, tensors: list[Tensor], scale: Tensor) -> None:
    """A loop over layers, all clients of a cohort at once; what torch.compile gets."""
    rows = problem.rows or 1
    for layer, members in enumerate(problem.layout.members):
        parts = [tensors[i].view(rows, -1) for i in members]
        if problem.reference is not None:
            for i, part in zip(members, parts, strict=True):
                part.sub_(problem.reference[i].flatten())
        norm = torch.stack([part.float().norm(problem.p, dim=1) for part in parts])
        factor = (problem.clip[layer].float() / norm.norm(problem.p, dim=0)).clamp(max=1.0)
        for part in parts:
            if problem.mechanism == "laplace":
                u = torch.rand(part.shape, device=part.device) - 0.5
                noise = -u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.49999997))
            else:
                noise = torch.randn(part.shape, device=part.device)
            part.copy_(part * factor[:, None] + scale * noise)


def _stacked(problem: Problem) -> Body:
    def body(tensors: list[Tensor], scale: float, step: int) -> list[Tensor]:
        _stacked_layers(problem, tensors, torch.tensor(scale, device=problem.device))
        return tensors

    return body


def _compiled(problem: Problem, mode: str) -> Runner:
    """torch.compile of the loop over layers; compiled anew, whatever a cache holds."""
    scales: dict[float, Tensor] = {}
    torch._dynamo.reset()
    function = torch.compile(_stacked_layers, mode=mode, fullgraph=True, dynamic=False)

    def body(tensors: list[Tensor], scale: float, step: int) -> list[Tensor]:
        if scale not in scales:
            scales[scale] = torch.tensor(scale, device=problem.device)
        function(problem, tensors, scales[scale])
        return tensors

    return Local(problem, body)


def _foreach(problem: Problem) -> Body:
    """torch._foreach over the whole list of tensors, two exponential_ for Laplace noise."""
    rows = problem.rows
    groups = [(c, m) for c in range(rows or 1) for m in problem.layout.members]
    clips = problem.clip.float().repeat(rows or 1)
    dtype = problem.tensors[0].dtype

    def body(tensors: list[Tensor], scale: float, step: int) -> list[Tensor]:
        parts = [tensors[i][c] if rows else tensors[i] for c, m in groups for i in m]
        if problem.reference is not None:
            start = [problem.reference[i] for _, m in groups for i in m]
            torch._foreach_sub_(parts, start)
        norms = torch.stack(torch._foreach_norm(parts, problem.p)).float()
        owner = torch.tensor(
            [g for g, (_, m) in enumerate(groups) for _ in m], device=problem.device
        )
        power = norms if problem.p == 1 else norms.square()
        total = torch.zeros(len(groups), device=problem.device).index_add_(0, owner, power)
        total = total if problem.p == 1 else total.sqrt()
        factors = (clips / total).clamp(max=1.0).to(dtype)[owner]
        torch._foreach_mul_(parts, list(factors.unbind()))
        if scale:
            noise = [torch.empty_like(part) for part in parts]
            if problem.mechanism == "laplace":
                other = [torch.empty_like(part) for part in parts]
                for a, b in zip(noise, other, strict=True):
                    a.exponential_(1 / scale)
                    b.exponential_(1 / scale)
                torch._foreach_sub_(noise, other)
            else:
                for a in noise:
                    a.normal_(0.0, scale)
            torch._foreach_add_(parts, noise)
        return tensors

    return body


def _copy(problem: Problem) -> Body:
    targets = [torch.empty_like(t) for t in problem.tensors]

    def body(tensors: list[Tensor], scale: float, step: int) -> list[Tensor]:
        for target, tensor in zip(targets, tensors, strict=True):
            target.copy_(tensor)
        return targets

    return body


def _per_sample(problem: Problem) -> Body:
    """Per-sample gradients clipped a layer at a time in plain torch, then torch noise."""

    def body(tensors: list[Tensor], scale: float, step: int) -> list[Tensor]:
        result: list[Tensor] = [torch.empty(0)] * len(tensors)
        for layer, members in enumerate(problem.layout.members):
            norms = torch.stack([tensors[i].flatten(1).norm(problem.p, dim=1) for i in members])
            factor = (problem.clip[layer].float() / norms.norm(problem.p, dim=0)).clamp(max=1.0)
            for i in members:
                total = torch.einsum("b,b...->...", factor.to(tensors[i].dtype), tensors[i])
                if scale and problem.mechanism == "laplace":
                    total = total + Laplace(0.0, scale).sample(total.shape).to(total)
                elif scale:
                    total = total + scale * torch.randn_like(total)
                result[i] = total
        return result

    return body


def _opacus(problem: Problem, per_tensor: bool) -> Runner:
    """Clipping and noise of Opacus' optimizer on materialised per-sample gradients."""
    optimizers = importlib.import_module("opacus.optimizers")
    level = "tensor" if per_tensor else "all"
    clips = [float(clip) for _, clip in problem.groups(level)]
    params = [torch.nn.Parameter(torch.zeros_like(t[0])) for t in problem.tensors]
    kind = optimizers.DPPerLayerOptimizer if per_tensor else optimizers.DPOptimizer
    optimizer = kind(
        torch.optim.SGD(params, lr=0.0), noise_multiplier=1.0,
        max_grad_norm=clips if per_tensor else clips[0], expected_batch_size=problem.rows,
        loss_reduction="sum",
    )  # fmt: skip

    def body(tensors: list[Tensor], scale: float, step: int) -> list[Tensor]:
        # A view is a new tensor, without the mark that this one has been used.
        for param, tensor in zip(params, tensors, strict=True):
            param.grad_sample, param.summed_grad = tensor.detach(), None
        optimizer.noise_multiplier = scale / optimizer.max_grad_norm
        optimizer.pre_step()
        return [param.grad for param in params if param.grad is not None]

    return Local(problem, body)


def _pfl(problem: Problem) -> Runner:
    """pfl's LaplaceMechanism, client by client, in a process with an environment of its own."""
    from bench.child import Child

    clip = float(problem.groups("all")[0][1])
    with tempfile.TemporaryDirectory() as folder:
        return Child(
            "pfl_laplace", folder,
            {"tensors": problem.tensors, "rows": problem.rows, "clip": clip,
             "scale": problem.scale},
            scale=problem.scale, rows=problem.rows,
        )  # fmt: skip


def _local(body) -> object:
    return lambda problem: Local(problem, body(problem))


def contenders(problem: Problem, *, modes: tuple[str, ...] = ()) -> list[Contender]:
    """The peers that can do what the problem asks for."""
    if problem.summed:
        found = [Contender("eager, per-sample einsum", "peer", "layer", _local(_per_sample))]
        if problem.p == 2 and problem.mechanism == "gaussian":
            found += [
                Contender("Opacus optimizer, flat", "peer", "all", lambda q: _opacus(q, False)),
                Contender("Opacus optimizer, per layer", "peer", "tensor",
                          lambda q: _opacus(q, True)),
            ]  # fmt: skip
        return found
    found = [
        Contender("eager loop, torch.distributions", "peer", "layer", _local(_eager)),
        Contender("foreach", "peer", "layer", _local(_foreach)),
    ]
    if problem.rows:
        found.append(Contender("eager, clients stacked", "peer", "layer", _local(_stacked)))
    for mode in modes:
        build = lambda q, mode=mode: _compiled(q, mode)  # noqa: E731
        found.append(Contender(f"torch.compile, {mode}", "peer", "layer", build))
    cpu32 = problem.device.type == "cpu" and problem.tensors[0].dtype == torch.float32
    if problem.p == 1 and problem.reference is None and cpu32:
        found.append(Contender("pfl LaplaceMechanism", "peer", "all", _pfl))
    return [*found, Contender("copy_", "floor", "layer", _local(_copy), clips=False)]
