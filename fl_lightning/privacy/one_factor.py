"""One clip factor a record over all layers: flat and joint clipping.

`flat` clips the norm over all layers. `joint` clips the norm in which a layer is measured by its
own noise, A_l = C_l/√π_l (Gaussian; C_l/π_l for Laplace): Σ (‖g_l‖/A_l)² <= 1 (Σ ‖g_l‖/A_l <= 1).
Layers clipped one by one to C_l lie within that bound, so the same noise covers both; the joint
clip keeps the direction of a record's gradient and shortens fewer records.

A record's gradient of a dense layer is the outer product of what comes in and the gradient of what
goes out, so its norm is a product of two norms, and the clipped sum is one matrix product. One
forward and one backward pass give both; no per-record gradient is held.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from aadp_kernels import ClippingLayer, Layout, UnsupportedLayerError, WatchedForward
from fl_lightning.local.batches import Batch
from fl_lightning.local.gradient import Loss
from fl_lightning.values.round import LayerPolicy, Params

# (params, shared, batch, policy) -> clipped sums [k, ...] and, a layer, votes, clipped and
# non-finite counts [k, L, 3]: all private.
ClippedSums = Callable[[Params, bool, Batch, LayerPolicy], tuple[Params, Tensor]]

AUTOMATIC_GAMMA = 0.01
# Factors are rounded down by more than the float32 roundings of the two factors of a product.
ROUNDING = 1 - 1e-6


class _KeptLinear(nn.Linear, ClippingLayer):
    """A dense layer that keeps what came in and where the gradient of what went out arrives."""

    kept: tuple[Tensor, GradientEdge] | None = None

    def forward(self, input: Tensor) -> Tensor:
        input, weight, bias = self.taken(input)
        if input.dim() != 2:
            raise UnsupportedLayerError(
                f"a dense layer gets shape {tuple(input.shape)}, not one vector a record"
            )
        assert weight is not None
        output = nn.functional.linear(input, weight, bias)
        if output.requires_grad:
            # Not the tensor: an activation in place would make it its own output.
            self.__dict__["kept"] = input.detach(), get_gradient_edge(output)
        return output


def dense_layers(
    network: nn.Module, layout: Layout, example: Tensor
) -> tuple[WatchedForward, dict[str, _KeptLinear]]:
    """A copy of a network whose Linear layers hold all its parameters, and these layers by name.

    Args:
        network: the model.
        layout: its trained parameters.
        example: some records.

    Raises:
        UnsupportedLayerError: other layers have parameters, or one is not applied once, to one
            vector a record, or a parameter is used elsewhere.
    """
    linear = [n for n, m in network.named_modules() if type(m) is nn.Linear]
    held = {f"{n}.{p}" for n in linear for p, _ in network.get_submodule(n).named_parameters()}
    if set(layout.names) != held:
        raise UnsupportedLayerError("not all trained parameters are those of Linear layers")
    copied = copy.deepcopy(network)
    layers: dict[str, _KeptLinear] = {}
    for name in linear:
        module: Any = copied.get_submodule(name)
        module.__class__ = _KeptLinear
        layers[name] = module
    watch = WatchedForward(copied.to(example.device))
    watch.check(example)
    return watch, layers


def layer_units(policy: LayerPolicy, clipping: str, mechanism: str) -> Tensor:
    """A_l, the unit in which a layer's norm counts, float64 [k, L]: C for flat clipping."""
    if clipping == "flat":
        return policy.clip_norm
    part = policy.shares / policy.shares.sum(-1, keepdim=True)
    return policy.clip_norm / (part.sqrt() if mechanism == "gaussian" else part)


def clip_factors(sizes: Tensor, units: Tensor, *, order: int, automatic: bool) -> Tensor:
    """Factor of each record, float64 [B]; above 1 minus rounding only where nothing is clipped.

    Args:
        sizes: norms of each record's layers, finite, [L, B].
        units: A_l [L].
        order: of the norm that is taken over the layers, 1 or 2.
        automatic: 1/(N + γ/A) in place of min(1, 1/N), for one layer.
    """
    size = torch.linalg.vector_norm(sizes / units[:, None].clamp(min=1e-300), order, dim=0)
    if automatic:
        return 1 / (size + AUTOMATIC_GAMMA / units[0])
    return (1 / size.clamp(min=1e-300)).clamp(max=1.0)


def _scaled_sums(
    linear: Mapping[str, nn.Linear],
    params: Params,
    inputs: Params,
    outputs: Params,
    factor: Tensor,
    strange: Tensor | None,
) -> Params:
    """Sums over records of factor times gradient; layers that were not run have zeros.

    Args:
        linear: layers by name.
        params: parameters of all of them.
        inputs, outputs: of each layer that was run: its input and the gradient of its output, a row
            a record.
        factor: of each record [B].
        strange: [B, 1], true where a record's gradient is not finite; None: nowhere.
    """
    sums: Params = {}
    for name, module in linear.items():
        if name not in outputs:
            own = [n for n in params if n.rpartition(".")[0] == name]
            sums |= {n: torch.zeros_like(params[n]) for n in own}
            continue
        a, g = inputs[name], outputs[name]
        if strange is not None:
            a, g = a.masked_fill(strange, 0.0), g.masked_fill(strange, 0.0)
        g = g * factor[:, None]
        sums[f"{name}.weight"] = g.T @ a
        if module.bias is not None:
            sums[f"{name}.bias"] = g.sum(0)
    return sums


def flat_sums(
    network: nn.Module,
    loss: Loss,
    layout: Layout,
    *,
    p: int,
    example: Tensor,
    clipping: str = "flat",
    mechanism: str = "gaussian",
    automatic: bool = False,
) -> ClippedSums:
    """Sums over records of g·min(1, 1/N(g)), N the norm over all layers of the clipping.

    Args:
        network: all of its parameters are those of `dense_layers`.
        loss: loss of each record.
        layout: one layer for flat, the network's for joint clipping.
        p: norm of a layer, 1 or 2.
        example: some records.
        clipping: "flat" or "joint".
        mechanism: whose noise joint clipping is for.
        automatic: g·C/(‖g‖+γ) instead (Bu et al. 2022, arXiv:2206.07136), for flat clipping.

    Guarantees:
        Every record's part has norm N at most 1 in real arithmetic, given its rounded factors. A
        record whose norm is not finite contributes zero and counts as such.

    Raises:
        UnsupportedLayerError: see `dense_layers`; also in any later call, for a batch that takes
            another path through the network.
    """
    watch, linear = dense_layers(network, layout, example)
    # Flat clipping sees one layer, whose parts' norms add up; joint clipping sees all of them.
    row = [layout.layer_of[layout.names.index(f"{n}.weight")] for n in linear]
    order = p if clipping == "flat" else 1 if mechanism == "laplace" else 2

    def client(
        params: Params, x: Tensor, y: Tensor, mask: Tensor, units: Tensor, votes_at: Tensor
    ) -> tuple[Params, Tensor]:
        inputs, outputs = _pass(watch, linear, loss, params, x, y, mask)
        sizes = torch.zeros(layout.num_layers, len(x), dtype=torch.float64, device=x.device)
        l1 = torch.zeros_like(sizes)
        for at, (name, module) in zip(row, linear.items(), strict=True):
            if name not in outputs:
                continue
            bias = 0.0 if module.bias is None else 1.0
            l1[at] += _norm(outputs[name], 1) * (_norm(inputs[name], 1) + bias)
            square = _norm(inputs[name], 2).square() + bias
            sizes[at] += _norm(outputs[name], 2).square() * square
        sizes = l1 if p == 1 else sizes.sqrt()
        real, finite = mask > 0, sizes.isfinite().all(0)
        factor = clip_factors(
            sizes.masked_fill(~finite, 0.0), units, order=order, automatic=automatic
        )
        clipped = (factor < 1 if not automatic else sizes[0] > units[0]) & finite & real
        factor = (factor * ROUNDING * (finite & real)).float()
        strange = None if bool(finite.all()) else ~finite[:, None]
        sums = _scaled_sums(linear, params, inputs, outputs, factor, strange)
        counts = count_layers(l1, votes_at, clipped, finite, real)
        return {n: sums[n] for n in layout.names}, counts

    def run(
        params: Params, shared: bool, batch: Batch, policy: LayerPolicy
    ) -> tuple[Params, Tensor]:
        rows = []
        units = layer_units(policy, clipping, mechanism).to(batch.x.device)
        votes_at = torch.full_like(units, torch.nan)  # no votes
        if policy.votes_at is not None:
            votes_at = policy.votes_at.to(units)
        for i in range(len(batch.x)):
            own = {n: (v if shared else v[i]).detach() for n, v in params.items()}
            rows.append(client(own, batch.x[i], batch.y[i], batch.mask[i], units[i], votes_at[i]))
        sums = {n: torch.stack([row[n] for row, _ in rows]) for n in layout.names}
        return sums, torch.stack([counts for _, counts in rows])

    return run


def count_layers(
    l1: Tensor, votes_at: Tensor, clipped: Tensor, finite: Tensor, real: Tensor
) -> Tensor:
    """Votes Σ (1[‖g_l‖₁ <= M_l] - ½), clipped and non-finite records, float32 [L, 3].

    Args:
        l1: L1 norms [L, B].
        votes_at: M_l [L]; NaN: no votes.
        clipped, finite, real: of each record, bool [B].
    """
    votes = ((l1 <= votes_at[:, None]).double() - 0.5) * (finite & real)
    votes = votes.masked_fill(votes_at.isnan()[:, None], 0.0).sum(1)
    others = torch.stack([clipped.sum(), (~finite & real).sum()]).to(votes)
    return torch.cat([votes[:, None], others.expand(len(l1), 2)], 1).float()


def _pass(
    watch: WatchedForward,
    linear: dict[str, _KeptLinear],
    loss: Loss,
    params: Params,
    x: Tensor,
    y: Tensor,
    mask: Tensor,
) -> tuple[Params, Params]:
    """What came into each layer, and each record's gradient of what went out, [B, ...].

    Layers that the loss does not depend on are left out.
    """
    try:
        with torch.enable_grad():
            leaves = {n: v.requires_grad_() for n, v in params.items()}
            with watch.forward(leaves, len(x)):
                outputs = watch.model(x)
            total = torch.where(mask > 0, loss(outputs, y), 0.0).sum()
            kept = {name: layer.kept for name, layer in linear.items() if layer.kept is not None}
            edges = [edge for _, edge in kept.values()]
            if not edges or not total.requires_grad:
                return {}, {}
            gradients = torch.autograd.grad(total, edges, allow_unused=True)
    finally:
        for layer in linear.values():
            layer.__dict__.pop("kept", None)
    found = zip(kept, gradients, strict=True)
    inputs = {name: given for name, (given, _) in kept.items()}
    return inputs, {name: gradient for name, gradient in found if gradient is not None}


def _norm(x: Tensor, p: int) -> Tensor:
    """Norm of each row, [B], summed in float64; `ROUNDING` allows for the terms' float32."""
    if p == 1:
        return x.abs().sum(1, dtype=torch.float64)
    return x.double().square().sum(1).sqrt()  # float32 squares of small numbers would vanish
