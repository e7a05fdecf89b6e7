"""Clip per-record gradients layer by layer, sum them and add noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aadp_kernels import _dispatch, _validate_tensors
from aadp_kernels._eager import eager
from aadp_kernels.certified import noisy_layers
from aadp_kernels.contract import Bounds, ClipStats, Noise
from aadp_kernels.correlation import Correlation
from aadp_kernels.grid import quantum, release
from aadp_kernels.layout import Layout
from aadp_kernels.noise_key import NoiseKey
from aadp_kernels.privatize import (
    check_kind,
    check_tensors,
    claim_layers,
    noise_source,
    per_layer,
)


@eager
def clip_sum_noise(
    per_sample: Sequence[Tensor],
    *,
    layout: Layout,
    clip: Tensor,
    scale: Tensor | None,
    p: int,
    mechanism: str = "gaussian",
    key: NoiseKey | None = None,
    step: int | Tensor = 0,
    client: int | Tensor = 0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    votes_at: Tensor | None = None,
    accumulate: Sequence[Tensor] | None = None,
    last: bool = True,
    form: str = "wide",
    correlation: Correlation | None = None,
    impl: str = "auto",
) -> tuple[list[Tensor], ClipStats]:
    """Sum of clipped per-record gradients, plus noise.

    For each layer, with g_i record i's gradient of all tensors of the layer:
    `sum_i mask_i * weights_i * min(1, clip / norm(g_i, p)) * g_i + scale * standard_noise`.

    Args:
        per_sample: Floating tensors [B, *shape], in the order of the layout. Private.
        layout: Which tensor belongs to which layer.
        clip: Clip norms C [L]; >= 0, inf means no clipping. Public.
        scale: Noise scales [L] (standard deviation or b); >= 0, finite. None or 0: no noise. The
            grid form needs all of them in every micro-batch, > 0 where clip > 0. Public.
        p: Norm of the clipping, 1 or 2.
        mechanism: "gaussian" or "laplace". Laplace noise asks for p = 1.
        key: Secret key; None only without noise, or with `last=False`.
        step: Step of the release, in [0, 2^32); also a 0-d int64 tensor.
        client: Client id, in [0, 2^32); also a 0-d int64 tensor.
        mask: [B] of 0 and 1; 0 marks padding. Private.
        weights: [B] in [0, 1], what a clipped gradient is multiplied by; votes and counts are not.
            None: 1. Not for the grid form. Public.
        votes_at: L1 thresholds [L] of the votes, or None.
        accumulate: Sums that earlier micro-batches of this step returned with `last=False`; they
            are added to in place.
        last: False: return running sums without noise (PRIVATE); True: add the noise.
        form: Form of the noise, see `sample_noise`.
        correlation: Noise of earlier steps that is added once more, see `Correlation`, or None.
        impl: As for `privatize_`.

    Returns:
        (sums, statistics). Sums have the layout's shapes; with `last=False` float64 (in the grid
        form counts of quanta, int64), else the dtypes of `per_sample`. The statistics are PRIVATE
        and of this micro-batch only.

    Raises:
        ValueError: A shape, dtype or range that does not fit; laplace with p=2; noise without a
            key; weights in the grid form; an `impl` that is unknown, cannot run here or lacks the
            form.
        ReusedNoiseError: Noise that this key object has drawn before, see `NoiseKey`.

    Guarantees:
        Each record's float64 contribution has a norm of at most weights_i * C; below C its factor
        is exactly weights_i. Products and sums are float64. Noise goes in once, with the last
        micro-batch, and equals `sample_noise` at (key, step, client, layer, element). The grid form
        quantises each record and sums integers, see `aadp_kernels.grid`.

    Edge cases:
        | record | contribution | vote |
        |---|---|---|
        | holds NaN or Inf in the layer | 0, counted as non-finite | 0 |
        | padding (mask 0), whatever it holds | 0, not counted | 0 |
        | empty batch | sums 0 (plus noise) | 0 |

    Reference:
        Abadi et al. 2016, arXiv:1607.00133, algorithm 1; per layer: McMahan et al. 2018,
        arXiv:1812.06210.
    """
    check_kind(mechanism, form, p)
    if not per_sample or per_sample[0].dim() == 0:
        raise ValueError("per_sample must be tensors [B, ...], got none or a 0-d tensor")
    batch, device = per_sample[0].shape[0], per_sample[0].device
    check_tensors("per_sample", per_sample, layout, (batch,))
    clip = per_layer("clip", clip, layout, (), device, finite=False)
    noisy = scale is not None
    scale = torch.zeros(layout.num_layers, device=device) if scale is None else scale
    scale = per_layer("scale", scale, layout, (), device, finite=True)
    if votes_at is not None:
        votes_at = per_layer("votes_at", votes_at, layout, (), device, finite=None)
    live = _counted(mask, batch, device)
    weights = _weights(weights, batch, device, form)
    ids = _validate_tensors.client_ids(client, device)
    noisy_ones = noisy_layers(layout, scale)
    drawn_from = (key, noisy_ones, mechanism, form, p, step, ids, correlation)
    noise = noise_source(*drawn_from) if last else None
    backend = _dispatch.backend(
        impl, "clip_sum", device=device, elements=layout.elements, form=form,
        correlated=correlation is not None,
    )  # fmt: skip
    quanta = _quanta(scale, clip, mechanism) if form == "grid" and noisy else None
    running = None
    if accumulate is not None:
        running = _running_sums(accumulate, layout, device, quanta is not None)
    if last:
        claim_layers(key, noise, client, layout, noisy_ones)
    given = {"bounds": Bounds(clip, p, votes_at), "mask": live, "weights": weights, "sums": running}
    if last and quanta is None:
        return backend.clip_sum_noise(per_sample, layout, **given, scale=scale, noise=noise)
    sums, stats = backend.clip_sum(per_sample, layout, **given, quanta=quanta)
    if last and quanta is not None:
        drawn = _integers(noise, layout, scale, impl, device)
        dtypes = [record.dtype for record in per_sample]
        sums = _released(sums, dtypes, layout, drawn, quanta, mechanism)
    return sums, stats


def _counted(mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """Which records count, bool [B]."""
    if mask is None:
        return torch.ones(batch, dtype=torch.bool, device=device)
    if tuple(mask.shape) != (batch,):
        raise ValueError(f"mask must have shape [{batch}], got {tuple(mask.shape)}")
    return mask.to(device) != 0


def _weights(weights: Tensor | None, batch: int, device: torch.device, form: str) -> Tensor | None:
    """Weights of the records, float64 [B]; None: all are 1."""
    if weights is None:
        return None
    if form == "grid":
        raise ValueError("weights must be None with form='grid': its records are whole quanta")
    if tuple(weights.shape) != (batch,):
        raise ValueError(f"weights must have shape [{batch}], got {tuple(weights.shape)}")
    weights = weights.to(device, torch.float64)
    if weights.is_cpu and not bool(((weights >= 0) & (weights <= 1)).all()):
        raise ValueError(
            f"weights must lie in [0, 1], got {float(weights.min())} to {float(weights.max())}"
        )
    return weights


def _quanta(scale: Tensor, clip: Tensor, mechanism: str) -> Tensor:
    """Grid steps of the layers [L]."""
    if scale.is_cpu and bool(((scale == 0) & (clip > 0)).any()):
        raise ValueError("scale must be positive with form='grid' (or None), got 0")
    return quantum(scale, mechanism)


def _integers(
    noise: Noise | None, layout: Layout, scale: Tensor, impl: str, device: torch.device
) -> Sequence[Tensor | None]:
    """Noise of the layers as whole numbers of quanta, [1, D_l] each; None where there is none."""
    if noise is None:
        return [None] * layout.num_layers
    size = layout.elements
    drawing = _dispatch.backend(
        impl, "noise", device=device, elements=size, form="grid", numbers=size
    )
    return drawing.layer_integers(noise, layout, scale)


def _released(
    sums: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    layout: Layout,
    drawn: Sequence[Tensor | None],
    quanta: Tensor,
    mechanism: str,
) -> list[Tensor]:
    """Sums of integers with their noise, in the dtypes of the records."""
    results = []
    for i, value in enumerate(sums):
        layer, start = layout.layer_of[i], layout.offsets[i]
        piece = drawn[layer]
        if piece is not None:
            piece = piece[0, start : start + layout.sizes[i]].view(value.shape)
        results.append(release(value, piece, quanta[layer], mechanism).to(dtypes[i]))
    return results


def _running_sums(
    accumulate: Sequence[Tensor], layout: Layout, device: torch.device, integers: bool
) -> list[Tensor]:
    """The sums so far, float64 or integers."""
    dtype = torch.int64 if integers else torch.float64
    if len(accumulate) != len(layout.names):
        raise ValueError(f"accumulate must be {len(layout.names)} tensors, got {len(accumulate)}")
    for name, shape, tensor in zip(layout.names, layout.shapes, accumulate, strict=True):
        if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device != device:
            raise ValueError(
                f"accumulate: {name} must be contiguous {dtype} on {device}, got {tensor.dtype} on "
                f"{tensor.device}"
            )
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"accumulate: {name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}"
            )
    return list(accumulate)
