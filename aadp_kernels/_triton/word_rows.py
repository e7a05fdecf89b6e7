"""Words in rows: how the blocks of a tile lie in the threads, for both forms of noise."""

# Triton's constexpr arguments, ranges and launch options have no types that fit.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from aadp_kernels._triton.rng import philox


@triton.jit
def join4(a, b, c, d):
    """[..., 4] with a, b, c, d along the new dimension."""
    pair = tl.join(tl.join(a, c), tl.join(b, d))
    if len(a.shape) == 1:
        return tl.reshape(pair, [a.shape[0], 4])
    else:
        return tl.reshape(pair, [a.shape[0], 4 * a.shape[1]])


@triton.jit
def join2(a, b):
    """[n, 2], or [n, 2m] for [n, m]."""
    pair = tl.join(a, b)
    if len(a.shape) == 1:
        return pair
    else:
        return tl.reshape(pair, [a.shape[0], 2 * a.shape[1]])


@triton.jit
def split_columns(x):
    """The columns of [rows, 2^n], a tuple of [rows]."""
    if x.shape[1] == 2:
        return tl.split(x)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        a = split_columns(even)
        b = split_columns(odd)
        columns = ()
        for i in tl.static_range(x.shape[1] // 2):
            columns += (a[i], b[i])
        return columns


@triton.jit
def join_columns(columns):
    """[rows, 2^n] of its columns."""
    if len(columns) == 2:
        return tl.join(columns[0], columns[1])
    else:
        even = ()
        odd = ()
        for i in tl.static_range(len(columns) // 2):
            even += (columns[2 * i],)
            odd += (columns[2 * i + 1],)
        return join2(join_columns(even), join_columns(odd))


@triton.jit
def signed(word):
    return word.to(tl.int32, bitcast=True)


@triton.jit
def philox_rows(
    start, step, client, word, key, ROUNDS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    ONLY: tl.constexpr,
):  # fmt: skip
    """The 4 words of the blocks of a tile, from block `start` on: [ROWS], or [ROWS, BLOCKS].

    ONLY: those of one block of each row, [ROWS]; None: of all.
    """
    row = tl.arange(0, ROWS).to(tl.uint32)
    if ONLY is not None:
        return philox(start + BLOCKS * row + ONLY, step, client, word, key, ROUNDS)
    elif BLOCKS == 1:
        return philox(start + row, step, client, word, key, ROUNDS)
    elif BLOCKS == 2:
        # Joined, both blocks of a row are in one thread, as its elements will be.
        a = philox(start + 2 * row, step, client, word, key, ROUNDS)
        b = philox(start + 2 * row + 1, step, client, word, key, ROUNDS)
        return tl.join(a[0], b[0]), tl.join(a[1], b[1]), tl.join(a[2], b[2]), tl.join(a[3], b[3])
    else:
        block = start + row[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :].to(tl.uint32)
        return philox(block, step, client, word, key, ROUNDS)
