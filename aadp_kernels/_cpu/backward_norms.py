"""Clipped sums of the gradients of normalisation layers over the last axes, in numba."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu._jit import jit, wide_vectors
from aadp_kernels._cpu.backward_linear import array_of, clip_factor, levels
from aadp_kernels._cpu.backward_products import SLACK, rows_of, split_records, total_of
from aadp_kernels._cpu.row_sums import absolute, add_scaled, jit_sums, square
from aadp_kernels.certified import largest
from aadp_kernels.contract import ClipRule
from aadp_kernels.threads import run_on_threads


@jit_sums
def _gradient(a, g, own):
    """own[0] = sum over positions of a * g, own[1] = that of g; a and g are [positions * n]."""
    wide_vectors()
    n = own.shape[1]
    own[:] = 0
    for start in range(0, len(g), n):
        for j in range(n):
            own[0, j] += a[start + j] * g[start + j]
            own[1, j] += g[start + j]


@jit
def clip_units(
    a, g, first, last, largest, shrink, p, mask, clip, votes_at, per_client, each, sums, counts,
    begin, end,
):  # fmt: skip
    """Clipped sums of units of `each` records of a client: sums [units, 2, n], counts [units, 3].

    a and g are [K * B, positions * n]. Of the gradients of weight (0) and bias (1), those from
    `first` to `last` - 1 count.
    """
    batch, own = mask.shape[1], np.empty_like(sums[0])
    for unit in range(begin, end):
        k, start = unit // per_client, unit % per_client * each
        for b in range(start, min(batch, start + each)):
            if not mask[k, b]:
                continue
            x, y = a[k * batch + b], g[k * batch + b]
            norm_a, norm_g = np.sqrt(square(x)), np.sqrt(square(y))
            finite = norm_a * norm_g + norm_a + norm_g <= largest
            norm1, total = 0.0, 0.0
            if finite:
                _gradient(x, y, own)
                for i in range(first, last):
                    norm1 += absolute(own[i])
                    total += square(own[i])
            norm = norm1 if p == 1 else np.sqrt(total)
            factor = clip_factor(
                norm1, norm, finite, True, clip[k], votes_at[k], SLACK, counts[unit]
            )
            if factor == 0:
                continue
            lowered = g.dtype.type(factor * shrink if factor < 1 else factor)
            for i in range(first, last):
                add_scaled(sums[unit, i], lowered, own[i])


def norm_layer_sums(a: Tensor, g: Tensor, n: int, rule: ClipRule) -> tuple[Tensor, Tensor, Tensor]:
    """`RecordKernels.norm_layer_sums`.

    Args:
        a: normalised inputs [K, B, ..., n elements], float32 or float64.
        g: output gradients of the same shape and dtype.
        n: elements of weight and bias.
        rule: how to clip.
    """
    needed, mask = rule.needed, rule.mask
    clients, batch = mask.shape
    rows_a, rows_g = (rows_of(t) for t in (a, g))
    per_client, each = split_records(clients, batch)
    sums = np.zeros((clients * per_client, 2, n), rows_g.dtype)
    counts = np.zeros((clients * per_client, 3))

    def work(begin: int, end: int) -> None:
        clip_units(
            rows_a, rows_g, 0 if needed.weight else 1, 2 if needed.bias else 1, largest(g.dtype),
            1 - 2 * torch.finfo(g.dtype).eps, needed.p, array_of(mask), array_of(rule.clip),
            levels(rule.votes_at, clients), per_client, each, sums, counts, begin, end,
        )  # fmt: skip

    run_on_threads(work, len(sums), elements=rows_g.size)
    total = total_of(sums, clients).view(clients, 2, n)
    # Apart: views of one tensor would be written and counted together.
    return total[:, 0].clone(), total[:, 1].clone(), total_of(counts, clients)
