"""Norms of products over positions by their Gram matrices, in numba.

Gram matrices are symmetric: half of their entries are computed, in float64, from rows that are
widened while they stay in the cache.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._cpu._jit import jit, wide_vectors
from aadp_kernels._cpu._parallel import parallel, region_for
from aadp_kernels._cpu.gather_gemm import FEW_REGISTERS
from aadp_kernels._cpu.row_sums import jit_sums
from aadp_kernels.threads import run_on_threads

# Columns that are widened at once, and rows of a tile of products.
_WIDTH, _TILE = 512, 4


@jit
def _add(found, s, t, out):
    """Add a tile of sums to out [rows, rows] at (s, t)."""
    for i in range(len(found)):
        for j in range(len(found[0])):
            out[s + i, t + j] += found[i][j]


@jit_sums
def _wide_tile(x, s, t, count, out):
    """out[s + i, t + j] += x[s + i] . x[t + j] of the first `count` columns; i and j below 4."""
    wide_vectors()
    r00 = r01 = r02 = r03 = r10 = r11 = r12 = r13 = 0.0
    r20 = r21 = r22 = r23 = r30 = r31 = r32 = r33 = 0.0
    for k in range(count):
        a0, a1, a2, a3 = x[s, k], x[s + 1, k], x[s + 2, k], x[s + 3, k]
        b0, b1, b2, b3 = x[t, k], x[t + 1, k], x[t + 2, k], x[t + 3, k]
        r00, r01, r02, r03 = r00 + a0 * b0, r01 + a0 * b1, r02 + a0 * b2, r03 + a0 * b3
        r10, r11, r12, r13 = r10 + a1 * b0, r11 + a1 * b1, r12 + a1 * b2, r13 + a1 * b3
        r20, r21, r22, r23 = r20 + a2 * b0, r21 + a2 * b1, r22 + a2 * b2, r23 + a2 * b3
        r30, r31, r32, r33 = r30 + a3 * b0, r31 + a3 * b1, r32 + a3 * b2, r33 + a3 * b3
    found = ((r00, r01, r02, r03), (r10, r11, r12, r13), (r20, r21, r22, r23), (r30, r31, r32, r33))
    _add(found, s, t, out)


@jit_sums
def _narrow_tile(x, s, t, count, out):
    """`_wide_tile` in two halves: all its sums and factors at once want more than 16 registers."""
    for half in range(t, t + 4, 2):
        r00 = r01 = r10 = r11 = r20 = r21 = r30 = r31 = 0.0
        for k in range(count):
            a0, a1, a2, a3 = x[s, k], x[s + 1, k], x[s + 2, k], x[s + 3, k]
            b0, b1 = x[half, k], x[half + 1, k]
            r00, r01, r10, r11 = r00 + a0 * b0, r01 + a0 * b1, r10 + a1 * b0, r11 + a1 * b1
            r20, r21, r30, r31 = r20 + a2 * b0, r21 + a2 * b1, r30 + a3 * b0, r31 + a3 * b1
        _add(((r00, r01), (r10, r11), (r20, r21), (r30, r31)), s, half, out)


_products = _narrow_tile if FEW_REGISTERS else _wide_tile


@jit_sums
def _widen(x, low, out):
    """out [positions and more, columns] = columns of x [positions, n] from `low` on, in float64."""
    wide_vectors()
    count = min(out.shape[1], x.shape[1] - low)
    for t in range(len(x)):
        for k in range(count):
            out[t, k] = np.float64(x[t, low + k])


@jit
def _gram(x, wide, out):
    """The upper triangle of x xᵀ in `out`, whose rows are whole tiles; of x [positions, n]."""
    out[:] = 0
    for low in range(0, x.shape[1], wide.shape[1]):
        _widen(x, low, wide)
        count = min(wide.shape[1], x.shape[1] - low)
        for s in range(0, len(wide), _TILE):
            for t in range(s, len(wide), _TILE):
                _products(wide, s, t, count, out)


@jit
def _squares(of_a, of_g, bias, positions, bound):
    """Σ_st of_a[s, t] of_g[s, t] and what its rounding may have hidden; `bias` adds to of_a.

    Also the traces of both, without the bias.
    """
    total = lengths = trace_a = trace_g = 0.0
    for s in range(positions):
        trace_a += of_a[s, s]
        trace_g += of_g[s, s]
        own = (of_a[s, s] + bias) * of_g[s, s]
        lengths += np.sqrt(own)
        rest = 0.0
        for t in range(s + 1, positions):
            rest += (of_a[s, t] + bias) * of_g[s, t]
        total += own + 2 * rest
    return max(total, 0.0) + bound * lengths * lengths, trace_a, trace_g


@jit
def gram_records(a, g, bias, bound, squares, begin, end):
    """Squared norms of g[r]ᵀ a[r], of a [R, positions, n] and of g [R, positions, m]: [3, R]."""
    positions = a.shape[1]
    rows = -(-positions // _TILE) * _TILE
    wide = np.zeros((rows, min(_WIDTH, max(a.shape[2], g.shape[2]))))
    of_a, of_g = np.empty((rows, rows)), np.empty((rows, rows))
    for r in range(begin, end):
        _gram(a[r], wide, of_a)
        _gram(g[r], wide, of_g)
        squares[0, r], squares[1, r], squares[2, r] = _squares(of_a, of_g, bias, positions, bound)


@jit
def _gram_parallel(given, records, threads, region):
    if region != 0:
        parallel(gram_records, given, records, threads, region)
    else:
        gram_records(*given, np.int64(0), records)


def gram_squares(a: Tensor, g: Tensor, bias: bool, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """`RecordKernels.gram_squares`."""
    rows, slopes = (np.ascontiguousarray(t.detach().numpy()) for t in (a, g))
    squares = np.empty((3, len(rows)))
    given = rows, slopes, float(bias), bound, squares
    elements = rows.shape[1] * (rows.size + slopes.size) // 8
    threads, region = region_for(elements)
    if threads == 1 or region:
        _gram_parallel(given, len(rows), threads, region)
    else:
        run_on_threads(partial(gram_records, *given), len(rows), elements=elements)
    square, of_a, of_g = torch.from_numpy(squares)
    return square, of_a, of_g
