"""What a back end offers, and the data that cross to it. Nothing here computes.

A back end is a package `_<name>` with `FORMS`, the forms that it has of each operation,
`missing(device, form)`, why that cannot run there, and a module `backend` with the functions of
`Backend`. It imports what all of them share (this file, `addresses`, `certified`, `grid`, `layout`,
`threads`) and never another back end. Arguments have been checked, and noise has been claimed,
before a call comes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from aadp_kernels.layout import Layout

Segment = tuple[int, int, int]  # layer, first element, number of elements


class ClipStats(NamedTuple):
    """What clipping saw. PRIVATE: never release, log or branch on it outside a simulation.

    Attributes:
        l1_norm: float64 L1 norms before clipping, [L] or [K, L] (updates), [B, L] (records); None
            where they were not needed. NaN or inf for a unit that is not finite.
        votes: float64 [L] or [K, L], sum over units of 1[L1 norm <= votes_at] - 1/2.
        clipped: int64 [L] or [K, L], units whose norm passed the clip norm.
        nonfinite: int64 [L] or [K, L], units that were zeroed.
    """

    l1_norm: Tensor | None
    votes: Tensor
    clipped: Tensor
    nonfinite: Tensor


class DrawnAgain(NamedTuple):
    """Noise of an earlier step that is part of this one's.

    Attributes:
        coefficient: What it is multiplied by; float64 0-d where the step is on an accelerator.
        key_words, step: Its address, as in `Noise`; the rest of the address is the same.
    """

    coefficient: float | Tensor
    key_words: Sequence[int]
    step: int | Tensor


class Noise(NamedTuple):
    """Where the noise of a release comes from. With layer and element it is an address.

    Standard noise is z(step) + sum_j coefficient_j * z(step_j), added in order, each product and
    each sum rounded.

    Attributes:
        rng: Generator, one of `addresses.RNGS`.
        key_words: Secret. `addresses.key_words_needed(rng)` unsigned 32-bit words.
        mechanism: "gaussian", "laplace" or "coins".
        form: "wide", "fast" or "grid".
        step: Step of the release; a 0-d int64 tensor on an accelerator.
        clients: int64 [K], ids of the rows.
        again: Noise of earlier steps (wide and fast forms).
    """

    rng: str
    key_words: Sequence[int]
    mechanism: str
    form: str
    step: int | Tensor
    clients: Tensor
    again: tuple[DrawnAgain, ...] = ()


class Bounds(NamedTuple):
    """What every unit of a release is held to.

    Attributes:
        clip: float64 clip norms, [L], or [K, L] of K updates.
        p: Norm of the clipping, 1 or 2.
        votes_at: float64 L1 thresholds of the votes, of the shape of `clip`; None: no votes.
    """

    clip: Tensor
    p: int
    votes_at: Tensor | None


class Precision(NamedTuple):
    """`torch.finfo` of the dtype of each of several layers: float64 [L]."""

    eps: Tensor
    smallest_normal: Tensor


@dataclass(frozen=True)
class GradientsNeeded:
    """Which results a backward owes, and the norm of the clipping. All of it is public.

    Weight and bias count in a record's norm if they are needed: what gets no gradient needs none.
    """

    p: int
    x: bool
    weight: bool
    bias: bool
    counts: bool


@dataclass(frozen=True)
class ClipRule:
    """Clip norms [K], which records count [K, B] and vote thresholds [K] (None: no votes)."""

    needed: GradientsNeeded
    clip: Tensor
    mask: Tensor
    votes_at: Tensor | None


class OneClient(NamedTuple):
    """How to clip one client's records.

    Attributes:
        clip: Clip norm, 0-d.
        mask: [B] or [1], 0 marks padding; None: no padding.
        votes_at: Threshold of the votes, 0-d and NaN for none; None: no votes.
    """

    clip: Tensor
    mask: Tensor | None
    votes_at: Tensor | None


class Geometry(NamedTuple):
    """How a layer's positions and columns lie in a record, public and hashable.

    Attributes:
        channels: Channels of the input.
        size: Spatial sizes of the input, two axes; a linear layer has (positions, features).
        padding: Zeros on each side of each axis.
        groups: Groups of channels.
        positions: Positions along each axis.
        step: Rows or elements between neighbouring positions along each axis.
        kernel: Columns along each axis, within a channel.
        gap: Rows or elements between neighbouring columns along each axis.
        last: Whether the output gradient has its features in the last axis.
    """

    channels: int
    size: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    positions: tuple[int, int]
    step: tuple[int, int]
    kernel: tuple[int, int]
    gap: tuple[int, int]
    last: bool


class Backend(Protocol):
    """The functions of a module `backend`. K rows are clients, B rows records, L layers."""

    def scaled_noise(
        self, noise: Noise, segment: Segment, scale: float | Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Noise of a scale, a number or float64 [K, count]: `dtype` [K, count].

        In the grid form int64 gives counts of quanta.
        """
        ...

    def layer_integers(
        self, noise: Noise, layout: Layout, scale: Tensor
    ) -> Sequence[Tensor | None]:
        """Noise of the grid form in quanta, int64 [K, d_l] of each layer; None where nobody's scale
        is positive. `scale` is [L] or [K, L].
        """
        ...

    def privatize(
        self,
        tensors: Sequence[Tensor],
        out: Sequence[Tensor],
        layout: Layout,
        *,
        bounds: Bounds,
        scale: Tensor,
        noise: Noise | None,
        reference: Sequence[Tensor] | None,
    ) -> ClipStats:
        """`privatize_`. Bounds, scales and statistics are [K, L], or [L] of one update."""
        ...

    def clip_sum(
        self,
        per_sample: Sequence[Tensor],
        layout: Layout,
        *,
        bounds: Bounds,
        mask: Tensor,
        weights: Tensor | None,
        sums: Sequence[Tensor] | None,
        quanta: Tensor | None,
    ) -> tuple[list[Tensor], ClipStats]:
        """Add clipped records to `sums` in place, or to zeros: float64, or int64 of the quanta [L].

        `mask` is bool [B]; `weights` float64 [B], None: all are 1.
        """
        ...

    def clip_sum_noise(
        self,
        per_sample: Sequence[Tensor],
        layout: Layout,
        *,
        bounds: Bounds,
        mask: Tensor,
        weights: Tensor | None,
        sums: Sequence[Tensor] | None,
        scale: Tensor,
        noise: Noise | None,
    ) -> tuple[list[Tensor], ClipStats]:
        """`clip_sum` of the wide or fast form, with noise, in the dtypes of the records."""
        ...


class HostBackend(Backend, Protocol):
    """A back end that also has what an accelerator leaves to plain torch."""

    def coins(self, noise: Noise, n: int, rates: Sequence[float]) -> Tensor:
        """Independent Bernoulli coins, bool [K, n]; the rate of each row is kept to 2^-63."""
        ...

    def layer_norms(
        self, tensors: Sequence[Tensor], layout: Layout, p: int, reference: Sequence[Tensor] | None
    ) -> Tensor:
        """Norms of the layers of every row, float64 [K, L]."""
        ...


class RecordKernels(Protocol):
    """Compiled parts of clip-in-backward: what `clip_in_backward` computes in torch, in one call.

    Inputs a [K, B, ...] and output gradients g [K, B, ...] are float32 or float64.
    """

    def row_sums(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of |x| and of x^2 of records [K, B, ...]: float64 [K, B] each."""
        ...

    def factors_and_counts(
        self, norm1: Tensor | None, norm: Tensor, finite: Tensor, rule: ClipRule, slack: float
    ) -> tuple[Tensor, Tensor]:
        """Clip factors [K, B] and counts [K, 3], float64."""
        ...

    def scale_linear(self, a: Tensor, g: Tensor, rule: ClipRule) -> Any:
        """g times the clip factors of the records of g aᵀ: (g, its sum, whether clean, counts)."""
        ...

    def scale_single(self, a: Tensor, g: Tensor, needed: GradientsNeeded, one: OneClient) -> Any:
        """`scale_linear` of one client: a [B, in], g [B, out]."""
        ...

    def product_sums(
        self, a: Tensor, g: Tensor, geometry: Geometry, out: int, rule: ClipRule
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Clipped sums of products over positions: weight, bias and counts; None: too large."""
        ...

    def product_single(
        self,
        a: Tensor,
        g: Tensor,
        geometry: Geometry,
        out: int,
        needed: GradientsNeeded,
        one: OneClient,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """`product_sums` of one client: weight [out, columns], bias [out], counts [3]."""
        ...

    def gram_squares(
        self, a: Tensor, g: Tensor, bias: bool, bound: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Squared norms, float64 [R], of g[r]ᵀ a[r], a [R, P, columns] and g [R, P, out].

        Σ_st (a_s·a_t)(g_s·g_t), and `bound` times (Σ_t ‖a_t‖‖g_t‖)² for what cancels. Then those
        of a[r] and of g[r].
        """
        ...

    def norm_layer_sums(
        self, a: Tensor, g: Tensor, n: int, rule: ClipRule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Clipped sums of a normalisation layer's weight and bias [K, n], and counts [K, 3]."""
        ...

    def norm_layer_single(
        self,
        x: Tensor,
        g: Tensor,
        mean: Tensor,
        scale: Tensor,
        n: int,
        needed: GradientsNeeded,
        one: OneClient,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`norm_layer_sums` of one client, [n], [n] and [3].

        x and g are [B, ..., n elements]; mean and scale, one a position, normalise x.
        """
        ...

    def embedding_sums(
        self, index: Tensor, g: Tensor, tokens: int, padding: int | None, rule: ClipRule
    ) -> tuple[Tensor, Tensor]:
        """Clipped sums [K, tokens, D] of rows g [K, B, T, D] of tokens [K, B, T]; counts [K, 3]."""
        ...

    def embedding_norms(
        self, index: Tensor, g: Tensor, padding: int | None, l1: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """L1 norms (0 if not asked for) and squared L2 norms of records' gradients, float64 [B].

        Of one client's index [B, T] and g [B, T, D]; then the squared norms of g.
        """
        ...

    def embedding_single(
        self,
        index: Tensor,
        g: Tensor,
        tokens: int,
        padding: int | None,
        needed: GradientsNeeded,
        one: OneClient,
    ) -> tuple[Tensor, Tensor]:
        """`embedding_sums` of one client: index [B, T], g [B, T, D]."""
        ...
