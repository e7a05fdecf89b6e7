"""Sums of clipped per-record gradients of a group of clients: what noise is then added to.

Everything here is private. Clip-in-backward needs one backward pass and keeps no per-record
gradient, but adds up in floating point (matrix products); whole-number sums, which a proof in
floating point needs, are made of per-sample gradients.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from aadp_kernels import (
    Layout,
    UnsupportedLayerError,
    WatchedForward,
    clip_sum_noise,
    layer_norms,
    with_clipping,
)
from fl_lightning.local.batches import Batch
from fl_lightning.local.gradient import CohortGradient, Loss
from fl_lightning.networks.functional import apply_with
from fl_lightning.networks.state import with_parameters
from fl_lightning.privacy.one_factor import (
    ROUNDING,
    ClippedSums,
    clip_factors,
    count_layers,
    flat_sums,
    layer_units,
    vote_levels,
)
from fl_lightning.values.round import LayerPolicy, Params

_LOG = logging.getLogger("pytorch_lightning")
# Clip-in-backward shortens a record that it clips by so many machine epsilons more (numba).
LAYER_ROUNDING = 8


_REFUSALS = "refusals"  # attribute of sums that can go either way: why one pass was refused


def clipped_sums(
    network: nn.Module,
    loss: Loss,
    layout: Layout,
    *,
    p: int,
    vectorize: bool,
    max_examples: int,
    example: Tensor,
    grid: str | None = None,
    clipping: str = "layer",
    mechanism: str = "gaussian",
    automatic: bool = False,
) -> ClippedSums:
    """Clip in backward where every layer can; per-sample gradients otherwise.

    Args:
        network, loss, layout: what is trained.
        p: norm of the clipping.
        vectorize, max_examples: see `CohortGradient`.
        example: some records, for their shape.
        grid: mechanism whose whole-number noise is added to the sums, or None. Such sums are made
            of per-sample gradients.
        clipping: "layer", "flat" (`layout` has one layer) or "joint".
        mechanism: whose noise joint clipping is for.
        automatic: scale by C/(‖g‖+γ) instead; for flat clipping.

    Raises:
        ValueError: `automatic` for a network that is not clipped in one pass.
    """

    def by_records(vectorize: bool) -> ClippedSums:
        if clipping == "joint":
            return joint_sample_sums(
                network, loss, layout, p=p, mechanism=mechanism, vectorize=vectorize,
                max_examples=max_examples,
            )  # fmt: skip
        return per_sample_sums(
            network, loss, layout, p=p, vectorize=vectorize, max_examples=max_examples, grid=grid
        )

    if grid is not None:
        _LOG.info(
            "noise_form=grid: every record's gradient is computed by itself, since sums in "
            "floating point cannot be proven; this is slower than clipping in backward"
        )
        return by_records(vectorize)
    within_backward = functools.partial(
        clip_in_backward_sums, network, loss, layout, p=p, example=example, vectorize=vectorize,
        max_examples=max_examples,
    )  # fmt: skip
    two_steps = functools.partial(
        flat_sums, network, loss, layout, p=p, example=example, clipping=clipping,
        mechanism=mechanism, automatic=automatic, max_examples=max_examples,
    )  # fmt: skip
    try:
        one_pass, rounding = _in_one_pass(within_backward, two_steps, clipping)
    except UnsupportedLayerError as error:
        if automatic:
            raise ValueError(
                "clip_function='automatic': the network must be one that is clipped in one "
                f"backward pass ({error})"
            ) from error
        _LOG.info(
            f"clipping={clipping}: every record's gradient is computed by itself, which is slower "
            f"than clipping in backward, because {error}"
        )
        return by_records(vectorize)
    if automatic:
        return one_pass
    return _or_by_records(one_pass, _rounded_like_one_pass(by_records(False), rounding))


def _in_one_pass(
    within_backward: Callable[[], ClippedSums], two_steps: Callable[[], ClippedSums], clipping: str
) -> tuple[ClippedSums, str]:
    """Sums from one backward pass, and the clipping whose factors' rounding they have."""
    if clipping != "layer":
        return two_steps(), clipping
    try:
        return within_backward(), clipping
    except UnsupportedLayerError:  # a layer's norms are known only once others have run
        return two_steps(), "flat"


def _rounded_like_one_pass(by_records: ClippedSums, clipping: str) -> ClippedSums:
    """Sums by per-sample gradients, with clip factors that are rounded down as in one pass.

    Which way a batch goes can depend on one record. With other factors, every other record's part
    would move with it; without numba they still do, by the error bounds of float32 norms.
    """

    def run(
        params: Params, shared: bool, batch: Batch, policy: LayerPolicy
    ) -> tuple[Params, Tensor]:
        if clipping == "layer":
            epsilon = torch.finfo(next(iter(params.values())).dtype).eps
            shorter = policy.clip_norm * (1 - LAYER_ROUNDING * epsilon)
            policy = replace(policy, clip_norm=shorter)
        sums, counts = by_records(params, shared, batch, policy)
        if clipping == "flat":
            sums = {name: value * ROUNDING for name, value in sums.items()}
        return sums, counts

    return run


def _or_by_records(one_pass: ClippedSums, by_records: ClippedSums) -> ClippedSums:
    """`one_pass`, and `by_records` for every batch whose forward it refuses.

    What a batch is computed by is a function of the batch: a repeated round gives the same bits.
    Per-sample gradients go record by record, since a forward that changes its ways seldom maps.
    """
    said: list[str] = []

    @functools.wraps(one_pass)
    def run(
        params: Params, shared: bool, batch: Batch, policy: LayerPolicy
    ) -> tuple[Params, Tensor]:
        try:
            return one_pass(params, shared, batch, policy)
        except UnsupportedLayerError as error:
            if not said:
                said.append(str(error))
                # It depends on records: for the console of who holds them, in no file of the run.
                _LOG.info(
                    "private, not released: some batches are clipped by per-sample gradients, "
                    f"which is slower: {error}"
                )
        return by_records(params, shared, batch, policy)

    setattr(run, _REFUSALS, said)
    return run


def changes_its_way(sums: ClippedSums) -> bool:
    """Whether some batch so far was clipped by per-sample gradients, and others need not be."""
    return bool(getattr(sums, _REFUSALS, ()))


def round_down(clip_norm: Tensor) -> Tensor:
    """Clip norms in float32, never above what the noise is scaled to."""
    rounded = clip_norm.float()
    below = torch.nextafter(rounded, torch.zeros_like(rounded))
    return torch.where(rounded.double() > clip_norm, below, rounded)


def clip_in_backward_sums(
    network: nn.Module,
    loss: Loss,
    layout: Layout,
    *,
    p: int,
    example: Tensor,
    vectorize: bool,
    max_examples: int,
) -> ClippedSums:
    """Sums of clipped gradients from one backward pass; no per-sample gradient is kept.

    Args:
        network, loss, layout: what is trained; layers are named like the modules.
        p: norm of the clipping.
        example: some records.
        vectorize, max_examples: see `CohortGradient`.

    Raises:
        UnsupportedLayerError: now, if the network or the path that the example takes through it
            cannot be clipped so; in any later call, if that of a batch cannot.
    """
    if any("." not in name for name in layout.names):
        raise UnsupportedLayerError("the network is one layer, which cannot carry buffers")
    clipped = with_clipping(network, p=p).to(example.device)
    watch = WatchedForward(clipped)
    watch.check(example)
    layers = layout.layer_names
    gradient = CohortGradient(
        clipped,
        loss,
        vectorize=vectorize,
        max_examples=max_examples,
        mask_names=tuple(f"{name}.mask" for name in layers),
        watch=watch,
    )

    def run(
        params: Params, shared: bool, batch: Batch, policy: LayerPolicy
    ) -> tuple[Params, Tensor]:
        k, device = len(batch.x), batch.x.device
        clip = round_down(policy.clip_norm).to(device)
        votes_at = torch.full_like(clip, torch.nan)  # no votes
        if policy.votes_at is not None:
            votes_at = policy.votes_at.to(device, torch.float32)
        constants = {f"{n}.clip_norm": clip[:, i] for i, n in enumerate(layers)}
        constants |= {f"{n}.votes_at": votes_at[:, i] for i, n in enumerate(layers)}
        probes = {f"{n}.probe": torch.zeros(k, 3, device=device) for n in layers}
        sums, seen = gradient(params, batch, shared=shared, probes=probes, constants=constants)
        return sums, torch.stack([seen[f"{n}.probe"] for n in layers], 1)

    return run


def per_sample_gradients(
    network: nn.Module, loss: Loss, vectorize: bool
) -> Callable[[Params, Tensor, Tensor], Params]:
    """(params, x [B, ...], y [B]) -> gradients [B, ...] of any network without batch statistics.

    One vmap over the records, or a loop over them if the network cannot be vmapped.
    """

    def record_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return loss(apply_with(network, params, x[None]), y[None]).sum()

    per_sample = vmap(grad(record_loss), in_dims=(None, 0, 0), randomness="different")

    def looped(params: Params, x: Tensor, y: Tensor) -> Params:
        rows = []
        for one_x, one_y in zip(x, y, strict=True):
            leaves = {n: v.detach().requires_grad_() for n, v in params.items()}

            def work(
                held: nn.Module,
                x: Tensor = one_x,
                y: Tensor = one_y,
                wanted: tuple[Tensor, ...] = tuple(leaves.values()),
            ) -> tuple[Tensor, ...]:
                value = loss(held(x[None]), y[None]).sum()
                return torch.autograd.grad(
                    value, list(wanted), allow_unused=True, materialize_grads=True
                )

            with torch.enable_grad():
                rows.append(with_parameters(network, leaves, work))
        return {n: torch.stack(c) for n, c in zip(params, zip(*rows, strict=True), strict=True)}

    return per_sample if vectorize else looped


def joint_sample_sums(
    network: nn.Module,
    loss: Loss,
    layout: Layout,
    *,
    p: int,
    mechanism: str,
    vectorize: bool,
    max_examples: int,
) -> ClippedSums:
    """Joint clipping (see `privacy.flat`) by per-sample gradients, for networks of any layers."""
    gradients = per_sample_gradients(network, loss, vectorize)
    order = 1 if mechanism == "laplace" else 2

    def part_sums(
        own: Params, x: Tensor, y: Tensor, real: Tensor, units: Tensor, votes_at: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        grads = gradients(own, x, y)
        values = [grads[n] for n in layout.names]
        l1, sizes = (
            layer_norms(values, layout=layout, p=order_, cohort=True).double().T
            for order_ in (1, p)
        )
        finite = sizes.isfinite().all(0)
        sizes = sizes.masked_fill(~finite, 0.0)
        (factor,) = clip_factors(sizes, units, order=order, automatic=False)
        clipped = ((factor < 1) & finite & real)[None]
        counts = count_layers(l1, votes_at, clipped, finite.expand(sizes.shape), real)
        factor = (factor * ROUNDING * (finite & real)).float()
        sums = [
            torch.tensordot(
                factor.to(g.dtype), g.nan_to_num(0.0, 0.0, 0.0) if not finite.all() else g, 1
            )
            for g in values
        ]
        return sums, counts

    def run(
        params: Params, shared: bool, batch: Batch, policy: LayerPolicy
    ) -> tuple[Params, Tensor]:
        rows, counts = [], []
        units = layer_units(policy, "joint", mechanism).to(batch.x.device)
        votes_at = vote_levels(policy, units)
        for i in range(len(batch.x)):
            own = params if shared else {n: v[i] for n, v in params.items()}
            parts = [
                part_sums(own, x, y, mask > 0, units[i], votes_at[i])
                for x, y, mask in zip(
                    *(t[i].split(max_examples) for t in (batch.x, batch.y, batch.mask)),
                    strict=True,
                )
            ]
            rows.append([torch.stack(t).sum(0) for t in zip(*(s for s, _ in parts), strict=True)])
            counts.append(torch.stack([c for _, c in parts]).sum(0))
        sums = [torch.stack(column) for column in zip(*rows, strict=True)]
        return dict(zip(layout.names, sums, strict=True)), torch.stack(counts)

    return run


def per_sample_sums(
    network: nn.Module,
    loss: Loss,
    layout: Layout,
    *,
    p: int,
    vectorize: bool,
    max_examples: int,
    grid: str | None = None,
) -> ClippedSums:
    """Sums of clipped gradients for any network without batch statistics, by per-sample gradients.

    One vmap over the records of a client, or a loop over them if the network cannot be vmapped.
    Memory grows with records × parameters; `max_examples` bounds the records held at once. With
    `grid` each clipped record is cut to whole quanta of that mechanism's noise and the sums are
    int64, unless there is no noise.
    """

    gradients = per_sample_gradients(network, loss, vectorize)

    def run(
        params: Params, shared: bool, batch: Batch, policy: LayerPolicy
    ) -> tuple[Params, Tensor]:
        sums, counts = [], []
        noisy = grid is not None and bool((policy.noise_scale > 0).any())
        for i in range(len(batch.x)):
            own = params if shared else {n: v[i] for n, v in params.items()}
            total: list[Tensor] | None = None
            seen = torch.zeros(layout.num_layers, 3)
            for start in range(0, batch.x.shape[1], max_examples):
                part = slice(start, start + max_examples)
                grads = gradients(own, batch.x[i, part], batch.y[i, part])
                total, stats = clip_sum_noise(
                    [grads[n] for n in layout.names],
                    layout=layout,
                    clip=policy.clip_norm[i],
                    scale=policy.noise_scale[i] if noisy else None,
                    p=p,
                    mechanism=grid or "gaussian",
                    form="grid" if noisy else "wide",
                    mask=batch.mask[i, part],
                    votes_at=None if policy.votes_at is None else policy.votes_at[i],
                    accumulate=total,
                    last=False,
                )
                seen += torch.stack([stats.votes, stats.clipped, stats.nonfinite], 1).cpu()
            assert total is not None
            sums.append(total)
            counts.append(seen)
        stacked = {n: torch.stack([s[j] for s in sums]) for j, n in enumerate(layout.names)}
        return stacked, torch.stack(counts)

    return run
