"""Reading and writing the tiles of tensors that a table names by address."""

# Triton's constexpr arguments, ranges and launch options have no types that fit.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from aadp_kernels._triton.grid import grid_index
from aadp_kernels._triton.noise import part_index, to_element

# A norm ticket reads what will be read again, an apply ticket what will not: cache priorities.
AGAIN, LAST = tl.constexpr("evict_last"), tl.constexpr("evict_first")


@triton.jit
def _pointer(address, offset, FULL: tl.constexpr, DTYPE: tl.constexpr):
    """Pointer to an element of a tensor; that of a whole tile is a multiple of 16 bytes."""
    if FULL:
        # The offset is a multiple already; the compiler sees it in the product, where a hint on an
        # argument would be lost.
        width: tl.constexpr = 128 // DTYPE.primitive_bitwidth
        return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16) + offset // width * width
    else:
        return address.to(tl.pointer_type(DTYPE)) + offset


@triton.jit
def _load(address, offset, index, low, high, FULL: tl.constexpr, DTYPE: tl.constexpr,
          CACHE: tl.constexpr):  # fmt: skip
    """Elements at `index` of a tile, zero outside [low, high)."""
    pointer = _pointer(address, offset, FULL, DTYPE)
    if FULL:
        return tl.load(pointer + index, eviction_policy=CACHE)
    else:
        inside = (index >= low) & (index < high)
        return tl.load(pointer + index, mask=inside, other=0.0, eviction_policy=CACHE)


@triton.jit
def load_pair(
    x, x_offset, reference, reference_offset, index, low, high, FULL: tl.constexpr,
    X: tl.constexpr, REFERENCE: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Elements of a tile, and those of the reference if there is one, in their own dtypes."""
    value = _load(x, x_offset, index, low, high, FULL, X, CACHE)
    base = value
    if REFERENCE is not None:
        # Every row reads the reference: neither first nor last.
        base = _load(reference, reference_offset, index, low, high, FULL, REFERENCE, "")
    return value, base


@triton.jit
def difference(pair, REFERENCE: tl.constexpr, DTYPE: tl.constexpr):
    """x - reference, or x, of a `load_pair`."""
    value = pair[0].to(DTYPE)
    if REFERENCE is not None:
        value -= pair[1].to(DTYPE)
    return value


@triton.jit
def store(address, offset, index, low, high, value, FULL: tl.constexpr, DTYPE: tl.constexpr):
    pointer = _pointer(address, offset, FULL, DTYPE)
    value = to_element(value, DTYPE)
    if FULL:
        tl.store(pointer + index, value, eviction_policy=LAST)
    else:
        inside = (index >= low) & (index < high)
        tl.store(pointer + index, value, mask=inside, eviction_policy=LAST)


@triton.jit
def tile_index(
    part: tl.constexpr, TILE: tl.constexpr, GAUSSIAN: tl.constexpr, FORM: tl.constexpr,
    CHACHA: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Elements of a part relative to the first of its tile, whatever the form."""
    if FORM == "grid":
        return grid_index(TILE, GAUSSIAN, CHACHA)
    else:
        return part_index(part, TILE, FORM, CHACHA, BLOCKS)
