"""Norms, certified clipping and noise of updates in numba.

The wide form has the bits of plain torch, norms too (`aadp_kernels._torch.ordered_sums`), whatever
the threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu import grid_release
from aadp_kernels._cpu.clip import FACTOR, ReleaseCall
from aadp_kernels._cpu.clip import privatize as run
from aadp_kernels._cpu.noise_plan import NoiseKind, words_of
from aadp_kernels._cpu.sum_and_write import layer_sums
from aadp_kernels._cpu.tensor_table import (
    TensorTable,
    address,
    copy_back,
    cuts_of,
    entries_of,
    native,
    target,
)
from aadp_kernels.certified import coarsest
from aadp_kernels.contract import Bounds, ClipStats, Noise, Precision
from aadp_kernels.layout import Layout


@lru_cache(maxsize=64)
def _precision(dtypes: tuple[torch.dtype, ...], layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """eps and smallest normal number of the coarsest dtype of each layer's tensors, [1, L]."""
    infos = [torch.finfo(coarsest([dtypes[i] for i in m])) for m in layout.members]
    return np.array([[i.eps for i in infos]]), np.array([[i.smallest_normal for i in infos]])


def norms(table: TensorTable, rows: int, p: int) -> tuple[Tensor, Tensor]:
    """L1 norms, and norms of order p, of the layers of every row: float64 [K, L]."""
    sums = torch.from_numpy(layer_sums(table, rows, p))
    return sums[0], sums[0] if p == 1 else sums[1].sqrt()


def layer_norms(
    tensors: Sequence[Tensor], layout: Layout, p: int, reference: Sequence[Tensor] | None
) -> Tensor:
    """`HostBackend.layer_norms`."""
    minus = None if reference is None else [native(t) for t in reference]
    rows = tensors[0].shape[0] if tensors[0].dim() > len(layout.shapes[0]) else 1
    return norms(TensorTable.of_layout(layout, [native(t) for t in tensors], minus), rows, p)[1]


def privatize(
    tensors: Sequence[Tensor],
    out: Sequence[Tensor],
    layout: Layout,
    *,
    bounds: Bounds,
    scale: Tensor,
    noise: Noise | None,
    reference: Sequence[Tensor] | None,
) -> ClipStats:
    """`Backend.privatize`."""
    clip, p, votes_at = bounds
    minus = None if reference is None else [native(t) for t in reference]
    values = [native(t) for t in tensors]
    targets = values if out is tensors else [target(t) for t in out]
    eps, smallest = _precision(tuple([t.dtype for t in out]), layout)
    if noise is not None and noise.form == "grid":
        table = TensorTable.of_layout(layout, values, minus, targets)
        dtypes = Precision(torch.from_numpy(eps), torch.from_numpy(smallest))
        stats = grid_release.privatize(table, layout, dtypes, noise, bounds=bounds, scale=scale)
        copy_back(targets, out)
        return stats
    layers, one_update = layout.num_layers, clip.dim() == 1
    rows = 1 if one_update else len(clip)
    if noise is None:
        noise = Noise(
            "philox10", (0, 0), "laplace", "wide", 0, torch.zeros(rows, dtype=torch.int64)
        )
    words, coefficients = words_of(noise)
    words += np.array(coefficients).view(np.int64).tolist()
    numbers, flags = np.empty((3, rows, layers)), np.empty((2, rows, layers), np.int64)
    clip, scale, clients = clip.contiguous(), scale.contiguous(), noise.clients.contiguous()
    levels = None if votes_at is None else votes_at.contiguous()
    call = ReleaseCall(
        np.array(entries_of(layout, values, minus, targets) + words, np.int64), len(values),
        cuts_of(layout), NoiseKind.of(noise.rng, noise.mechanism, noise.form, 0, layers), eps,
        smallest, p, address(clip), address(scale), address(clients),
        0 if levels is None else address(levels), numbers, flags,
    )  # fmt: skip
    run(call)
    copy_back(targets, out)
    if one_update:
        numbers, flags = numbers[:, 0], flags[:, 0]
    return ClipStats(*map(torch.from_numpy, (*numbers[:FACTOR], *flags)))
