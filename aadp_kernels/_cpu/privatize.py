"""Norms, certified clipping and noise of updates in numba, in place, without large temporaries.

Factors, votes and counts come from the functions of `_torch.privatize`. Norms are added in an
order of their own, fixed whatever the threads: they can differ from `_torch` in the last bits, and
so can an element of a layer that is clipped; everything else has the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu._jit import jit, spread
from aadp_kernels._cpu.noise import SCALE, SUBTRACT, write_noise
from aadp_kernels._cpu.rng import LANES
from aadp_kernels._torch.privatize import ClipStats, Noise, ballots, clip_factors
from aadp_kernels.layout import Layout

_CHUNK = 1 << 16
_NATIVE = (torch.float32, torch.float64)


@jit
def sum_chunks(value, reference, mode, sums, begin, end):
    """Sums of |x| and x^2 of the chunks [begin, end) of the rows of `value`: sums [2, K, chunks].

    64 running sums a chunk, added up in order.
    """
    n, chunks = value.shape[1], sums.shape[2]
    absolute = np.empty(LANES, np.float64)
    squares = np.empty(LANES, np.float64)
    for unit in range(begin, end):
        row, chunk = unit // chunks, unit % chunks
        absolute[:] = 0.0
        squares[:] = 0.0
        stop = min(n, (chunk + 1) * _CHUNK)
        for start in range(chunk * _CHUNK, stop, LANES):
            count = min(LANES, stop - start)
            if mode == SUBTRACT:
                for j in range(count):
                    x = np.float64(value[row, start + j]) - np.float64(reference[start + j])
                    absolute[j] += abs(x)
                    squares[j] += x * x
            else:
                for j in range(count):
                    x = np.float64(value[row, start + j])
                    absolute[j] += abs(x)
                    squares[j] += x * x
        total1, total2 = 0.0, 0.0
        for j in range(LANES):
            total1 += absolute[j]
            total2 += squares[j]
        sums[0, row, chunk] = total1
        sums[1, row, chunk] = total2


class _Piece(NamedTuple):
    """One tensor of a layer as contiguous float32 or float64."""

    value: Tensor  # [K, n]
    reference: Tensor | None  # [n]
    target: Tensor  # [K, n], over `out` where that is possible


def _piece(tensor: Tensor, reference: Tensor | None, out: Tensor, rows: int, size: int) -> _Piece:
    """Views where dtype and strides allow it, float64 copies elsewhere."""
    dtypes = {tensor.dtype, out.dtype} | (set() if reference is None else {reference.dtype})
    dtype = tensor.dtype if len(dtypes) == 1 and tensor.dtype in _NATIVE else torch.float64
    value = tensor.detach().to(dtype).contiguous().view(rows, size)
    if reference is not None:
        reference = reference.detach().to(dtype).contiguous().view(size)
    if out.dtype == dtype and out.is_contiguous():
        return _Piece(value, reference, out.detach().view(rows, size))
    return _Piece(value, reference, torch.empty((rows, size), dtype=dtype))


def _sums(piece: _Piece) -> np.ndarray:
    """Sums of |x| and x^2 of every row: float64 [2, K]."""
    rows, size = piece.value.shape
    chunks = -(-size // _CHUNK)
    sums = np.zeros((2, rows, chunks))
    if sums.size == 0:
        return np.zeros((2, rows))
    value = piece.value.numpy()
    mode = SCALE if piece.reference is None else SUBTRACT
    reference = value[0, :0] if piece.reference is None else piece.reference.numpy()

    def work(begin: int, end: int) -> None:
        sum_chunks(value, reference, mode, sums, begin, end)

    spread(work, rows * chunks, align=1, elements=rows * size)
    return np.add.accumulate(sums, axis=2)[:, :, -1]


def privatize(
    tensors: Sequence[Tensor],
    out: Sequence[Tensor],
    layout: Layout,
    *,
    clip: Tensor,
    scale: Tensor,
    p: int,
    noise: Noise | None,
    reference: Sequence[Tensor] | None,
    votes_at: Tensor | None,
) -> ClipStats:
    """Clip and noise K updates layer by layer into `out`; clip, scale and votes_at are [K, L]."""
    rows = clip.shape[0]
    ids = np.zeros(rows, dtype=np.int64)
    if noise is not None:
        ids = np.ascontiguousarray(noise.clients.numpy())
    columns = []
    for layer, members in enumerate(layout.members):
        pieces = [
            _piece(
                tensors[i], None if reference is None else reference[i], out[i], rows,
                layout.sizes[i],
            )
            for i in members
        ]  # fmt: skip
        norm1, squares = torch.from_numpy(sum(_sums(piece) for piece in pieces))
        norm = norm1 if p == 1 else squares.sqrt()
        finite = torch.isfinite(norm) & torch.isfinite(norm1)
        dtype = max((out[i].dtype for i in members), key=lambda d: torch.finfo(d).eps)
        factor, clipped = clip_factors(norm, clip[:, layer], finite, layout.dims[layer], dtype)
        weights = torch.where(finite, factor, torch.nan).numpy()
        for i, piece in zip(members, pieces, strict=True):
            write_noise(
                piece.target, value=piece.value, reference=piece.reference, factor=weights,
                scale=scale[:, layer].contiguous().numpy(),
                rng="philox7" if noise is None else noise.rng,
                key_words=(0, 0) if noise is None else noise.key_words,
                mechanism="laplace" if noise is None else noise.mechanism,
                step=0 if noise is None else int(noise.step),
                clients=ids, layer=layer, start=layout.offsets[i],
            )  # fmt: skip
            if piece.target.data_ptr() != out[i].data_ptr():
                out[i].detach().copy_(piece.target.view(out[i].shape))
            elif not out[i].is_inference():
                torch.autograd.graph.increment_version(out[i])
        votes = ballots(norm1, None if votes_at is None else votes_at[:, layer], finite)
        columns.append((norm1, votes, clipped.to(torch.int64), (~finite).to(torch.int64)))
    return ClipStats(*(torch.stack(column, -1) for column in zip(*columns, strict=True)))
