"""Clipping in two steps, norms first: one factor a record over all layers, or one a layer.

`flat` clips the norm over all layers. `joint` clips the norm in which a layer is measured by its
own noise, A_l = C_l/√π_l (Gaussian; C_l/π_l for Laplace): Σ (‖g_l‖/A_l)² <= 1 (Σ ‖g_l‖/A_l <= 1).
Layers clipped one by one to C_l lie within that bound, so the same noise covers both; the joint
clip keeps the direction of a record's gradient and shortens fewer records. `layer` clips each layer
by itself, where it cannot clip in its own backward: it shares its weight with another one, or its
weight and bias are layers of their own.

One forward and one backward pass give what comes into each layer and the gradient of what goes out.
Norms of a record's gradients follow from these two, and so do the clipped sums, by one matrix
product a layer; no per-record gradient is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial, wraps

import torch
from torch import Tensor, nn

from aadp_kernels import (
    Layout,
    RecordGradients,
    SharedGradients,
    WatchedForward,
    forget_gradients,
    record_gradients,
    with_kept_gradients,
)
from fl_lightning.local.batches import Batch
from fl_lightning.local.gradient import Loss
from fl_lightning.values.round import LayerPolicy, Params

# (params, shared, batch, policy) -> clipped sums [k, ...] and, a layer, votes, clipped and
# non-finite counts [k, L, 3]: all private.
ClippedSums = Callable[[Params, bool, Batch, LayerPolicy], tuple[Params, Tensor]]

AUTOMATIC_GAMMA = 0.01
# Factors are rounded down by more than the float32 roundings of the two factors of a product.
ROUNDING = 1 - 1e-6


def kept_layers(network: nn.Module, example: Tensor) -> WatchedForward:
    """A watched copy of a network whose layers keep what gradients of records are made of.

    Args:
        network: the model.
        example: some records.

    Raises:
        UnsupportedLayerError: a layer that has no rule has trained parameters, or one is not
            applied once, to the records, or a parameter is used elsewhere.
    """
    watch = WatchedForward(with_kept_gradients(network).to(example.device))
    watch.check(example)
    return watch


def layer_units(policy: LayerPolicy, clipping: str, mechanism: str) -> Tensor:
    """A_l, the unit in which a layer's norm counts, float64 [k, L]: C but for joint clipping."""
    if clipping != "joint":
        return policy.clip_norm
    part = policy.shares / policy.shares.sum(-1, keepdim=True)
    return policy.clip_norm / (part.sqrt() if mechanism == "gaussian" else part)


def vote_levels(policy: LayerPolicy, like: Tensor) -> Tensor:
    """M_l, the L1 norms that records vote on, [k, L]; NaN: no votes."""
    return torch.full_like(like, torch.nan) if policy.votes_at is None else policy.votes_at.to(like)


def layer_factors(sizes: Tensor, clip_norm: Tensor) -> Tensor:
    """Factor of each layer of each record, float64 [L, B], from their norms and the clip norms."""
    return (clip_norm[:, None] / sizes.clamp(min=1e-300)).clamp(max=1.0)


def clip_factors(sizes: Tensor, units: Tensor, *, order: int, automatic: bool) -> Tensor:
    """Factor of each record, float64 [1, B]; above 1 minus rounding only where nothing is clipped.

    Args:
        sizes: norms of each record's layers, finite, [L, B].
        units: A_l [L].
        order: of the norm that is taken over the layers, 1 or 2.
        automatic: 1/(N + γ/A) in place of min(1, 1/N), for one layer.
    """
    size = torch.linalg.vector_norm(
        sizes / units[:, None].clamp(min=1e-300), order, dim=0, keepdim=True
    )
    if automatic:
        return 1 / (size + AUTOMATIC_GAMMA / units[0])
    return (1 / size.clamp(min=1e-300)).clamp(max=1.0)


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
    max_examples: int = 2**62,
) -> ClippedSums:
    """Sums over records of g·min(1, 1/N(g)), N the norm over all layers, or a layer's ‖g_l‖/C_l.

    Args:
        network: its trained parameters are those of `kept_layers`.
        loss: loss of each record.
        layout: one layer for flat, the network's otherwise.
        p: norm of a layer, 1 or 2.
        example: some records.
        clipping: "layer", "flat" or "joint".
        mechanism: whose noise joint clipping is for.
        automatic: g·C/(‖g‖+γ) instead (Bu et al. 2022, arXiv:2206.07136), for flat clipping.
        max_examples: records computed at once.

    Guarantees:
        Every record's part has norm N at most 1 in real arithmetic, given its rounded factors. A
        record with a norm that is not finite counts as such and contributes zero: to the layer with
        that norm alone where layers are clipped one by one.

    Raises:
        UnsupportedLayerError: see `kept_layers`; also in any later call, for a batch that takes
            another path through the network.
    """
    row = dict(zip(layout.names, layout.layer_of, strict=True))
    watch = kept_layers(network, example)
    # Flat clipping sees one layer, whose parts' norms add up; joint clipping sees all of them.
    order = p if clipping == "flat" else 1 if mechanism == "laplace" else 2
    by_record = partial(clip_factors, order=order, automatic=automatic)
    factors = layer_factors if clipping == "layer" else by_record

    def client(
        params: Params, x: Tensor, y: Tensor, mask: Tensor, units: Tensor, votes_at: Tensor
    ) -> tuple[Params, Tensor]:
        found = by_layers(_pass(watch, loss, params, x, y, mask), row)
        sizes = torch.zeros(layout.num_layers, len(x), dtype=torch.float64, device=x.device)
        l1, voting = torch.zeros_like(sizes), bool((~votes_at.isnan()).any())
        finite = torch.ones_like(sizes, dtype=torch.bool)
        for at, layer in found:
            norm1, square, own = layer.norms(p, l1=voting)
            if norm1 is not None:
                l1[at] += norm1
            if square is not None:
                sizes[at] += square
            finite[at] &= own
        sizes = l1 if p == 1 else sizes.sqrt()
        real, finite = mask > 0, finite & sizes.isfinite()
        if clipping != "layer":
            finite = finite.all(0, keepdim=True).expand(sizes.shape)
        sizes = sizes.masked_fill(~finite, 0.0)
        factor = factors(sizes, units)
        clipped = (factor < 1 if not automatic else sizes > units[:, None]) & finite & real
        factor = (factor * ROUNDING * (finite & real)).float().expand(sizes.shape)
        sums = {n: torch.zeros_like(v) for n, v in params.items()}
        for at, layer in found:
            sums |= layer.sums(factor[at], finite[at])
        counts = count_layers(l1, votes_at, clipped, finite, real)
        return {n: sums[n] for n in layout.names}, counts

    def run(
        params: Params, shared: bool, batch: Batch, policy: LayerPolicy
    ) -> tuple[Params, Tensor]:
        rows = []
        units = layer_units(policy, clipping, mechanism).to(batch.x.device)
        votes_at = vote_levels(policy, units)
        for i in range(len(batch.x)):
            own = {n: (v if shared else v[i]).detach() for n, v in params.items()}
            rows.append(client(own, batch.x[i], batch.y[i], batch.mask[i], units[i], votes_at[i]))
        sums = {n: torch.stack([row[n] for row, _ in rows]) for n in layout.names}
        return sums, torch.stack([counts for _, counts in rows])

    return _by_parts(run, max_examples)


def _by_parts(sums: ClippedSums, max_examples: int) -> ClippedSums:
    """The same, of at most so many records of a client at once, added up."""

    @wraps(sums)
    def run(
        params: Params, shared: bool, batch: Batch, policy: LayerPolicy
    ) -> tuple[Params, Tensor]:
        total, counts = {}, []
        for part in batch.split(max_examples):
            found, seen = sums(params, shared, part, policy)
            total = {n: total[n] + v if total else v for n, v in found.items()}
            counts.append(seen)
        return total, torch.stack(counts).sum(0)

    return run


def count_layers(
    l1: Tensor, votes_at: Tensor, clipped: Tensor, finite: Tensor, real: Tensor
) -> Tensor:
    """Votes Σ (1[‖g_l‖₁ <= M_l] - ½), clipped and non-finite records, float32 [L, 3].

    Args:
        l1: L1 norms [L, B].
        votes_at: M_l [L]; NaN: no votes.
        clipped: of each layer [L, B], or of each record [1, B], bool.
        finite: of each layer [L, B], bool.
        real: which records are no padding [B].
    """
    votes = ((l1 <= votes_at[:, None]).double() - 0.5) * (finite & real)
    votes = votes.masked_fill(votes_at.isnan()[:, None], 0.0).sum(1)
    seen = clipped.sum(-1).expand(len(l1)), (~finite & real).sum(-1)
    return torch.stack([votes, *(t.to(votes) for t in seen)], 1).float()


def by_layers(
    found: Iterable[RecordGradients | SharedGradients], row: Mapping[str, int]
) -> list[tuple[int, RecordGradients | SharedGradients]]:
    """Gradients with the layer of the layout that each belongs to, cut where it belongs to two.

    Args:
        found: of the modules.
        row: layer of each parameter.
    """
    parts: list[RecordGradients | SharedGradients] = []
    for layer in found:
        weight, bias = layer.weight_name, layer.bias_name
        if isinstance(layer, RecordGradients) and weight and bias and row[weight] != row[bias]:
            parts += [replace(layer, bias_name=None), replace(layer, weight_name=None)]
        else:
            parts.append(layer)
    return [(row[part.weight_name or part.bias_name or ""], part) for part in parts]


def _pass(
    watch: WatchedForward, loss: Loss, params: Params, x: Tensor, y: Tensor, mask: Tensor
) -> list[RecordGradients | SharedGradients]:
    """What gradients of records are made of, for the layers that the loss depends on."""
    try:
        with torch.enable_grad():
            leaves = {n: v.requires_grad_() for n, v in params.items()}
            with watch.forward(leaves, len(x)):
                outputs = watch.model(x)
            return record_gradients(watch.model, torch.where(mask > 0, loss(outputs, y), 0.0).sum())
    finally:
        forget_gradients(watch.model)
