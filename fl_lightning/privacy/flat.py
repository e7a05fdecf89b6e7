"""One norm over all layers, for networks of dense layers: what per-layer clipping is compared with.

A record's gradient of a dense layer is the outer product of what comes in and the gradient of what
goes out, so its norm is a product of two norms, and the clipped sum is one matrix product. One
forward and one backward pass give both; no per-record gradient is held.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aadp_kernels import Layout
from fl_lightning.client import Batch, Loss
from fl_lightning.types import LayerPolicy, Params

# (params, shared, batch, policy) -> clipped sums [k, ...] and, a layer, votes, clipped and
# non-finite counts [k, L, 3]: all private.
ClippedSums = Callable[[Params, bool, Batch, LayerPolicy], tuple[Params, Tensor]]

AUTOMATIC_GAMMA = 0.01
# Factors are rounded down by more than the float32 roundings of the two factors of a product.
_DOWN = 1 - 1e-6


def dense_layers(
    network: nn.Module, layout: Layout, example: Tensor
) -> dict[str, nn.Linear] | None:
    """The Linear layers that hold all parameters, by name; None if something else does.

    Each must be applied once, to one vector a record.
    """
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    held = {f"{n}.{p}" for n, m in layers.items() for p, _ in m.named_parameters()}
    if set(layout.names) != held:
        return None
    seen: list[int] = []
    handles = [
        m.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].dim()))
        for m in layers.values()
    ]
    try:
        with torch.no_grad():
            network(example)
    finally:
        for handle in handles:
            handle.remove()
    return layers if seen == [2] * len(layers) else None


def flat_sums(
    network: nn.Module, loss: Loss, layout: Layout, *, p: int, automatic: bool
) -> ClippedSums:
    """Sums over records of g·min(1, C/‖g‖), or of g·C/(‖g‖+γ), with g over all layers.

    Args:
        network: all of its parameters in `dense_layers`.
        loss: loss of each record.
        layout: one layer.
        p: norm, 1 or 2.
        automatic: the second form (Bu et al. 2022, arXiv:2206.07136).

    Guarantees:
        Every record's part has norm at most C in real arithmetic, given its rounded factors. A
        record whose norm is not finite contributes zero and counts as such.
    """
    linear = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear)}

    def client(
        params: Params, x: Tensor, y: Tensor, mask: Tensor, clip: Tensor, votes_at: float
    ) -> tuple[Params, Tensor]:
        inputs, outputs = _pass(network, linear, loss, params, x, y, mask)
        norms = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        l1 = torch.zeros_like(norms)
        for name, module in linear.items():
            bias = 0.0 if module.bias is None else 1.0
            l1 += _norm(outputs[name], 1) * (_norm(inputs[name], 1) + bias)
            norms += _norm(outputs[name], 2).square() * (_norm(inputs[name], 2).square() + bias)
        norms = l1 if p == 1 else norms.sqrt()
        real = mask > 0
        finite = norms.isfinite()
        norms = norms.masked_fill(~finite, 0.0)
        if automatic:
            factor = clip / (norms + AUTOMATIC_GAMMA)
        else:
            factor = (clip / norms.clamp(min=1e-300)).clamp(max=1.0)
        factor = (factor * _DOWN * (finite & real)).float()
        sums: Params = {}
        strange = None if bool(finite.all()) else ~finite[:, None]
        for name, module in linear.items():
            a, g = inputs[name], outputs[name]
            if strange is not None:
                a, g = a.masked_fill(strange, 0.0), g.masked_fill(strange, 0.0)
            g = g * factor[:, None]
            sums[f"{name}.weight"] = g.T @ a
            if module.bias is not None:
                sums[f"{name}.bias"] = g.sum(0)
        below = (l1 <= votes_at).double() - 0.5
        counted = finite & real
        votes = (below * counted).sum() if votes_at == votes_at else below.new_zeros(())
        clipped = ((norms > clip) & counted).sum()
        counts = torch.stack([votes, clipped, (~finite & real).sum()])
        return {n: sums[n] for n in layout.names}, counts.float()[None]

    def run(
        params: Params, shared: bool, batch: Batch, policy: LayerPolicy
    ) -> tuple[Params, Tensor]:
        rows = []
        for i in range(len(batch.x)):
            own = {n: (v if shared else v[i]).detach() for n, v in params.items()}
            at = float("nan") if policy.votes_at is None else float(policy.votes_at[i, 0])
            clip = policy.clip_norm[i, 0].to(batch.x.device)
            rows.append(client(own, batch.x[i], batch.y[i], batch.mask[i], clip, at))
        sums = {n: torch.stack([row[n] for row, _ in rows]) for n in layout.names}
        return sums, torch.stack([counts for _, counts in rows])

    return run


def _pass(
    network: nn.Module,
    linear: dict[str, nn.Linear],
    loss: Loss,
    params: Params,
    x: Tensor,
    y: Tensor,
    mask: Tensor,
) -> tuple[Params, Params]:
    """What came into each layer, and each record's gradient of what went out, [B, ...]."""
    inputs: Params = {}
    made: Params = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name], made[name] = given[0].detach(), output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in linear.items()]
    try:
        with torch.enable_grad():
            leaves = {n: v.requires_grad_() for n, v in params.items()}
            losses = loss(functional_call(network, leaves, (x,)), y)
            total = torch.where(mask > 0, losses, 0.0).sum()
            gradients = torch.autograd.grad(total, list(made.values()))
    finally:
        for handle in handles:
            handle.remove()
    return inputs, dict(zip(made, gradients, strict=True))


def _norm(x: Tensor, p: int) -> Tensor:
    """Norm of each row, [B], summed in float64; `_DOWN` allows for the terms' float32."""
    if p == 1:
        return x.abs().sum(1, dtype=torch.float64)
    return x.double().square().sum(1).sqrt()  # float32 squares of small numbers would vanish
