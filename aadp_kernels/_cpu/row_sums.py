"""Sums over a row, and sums of rows, as parts of other kernels."""

from __future__ import annotations

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from aadp_kernels._cpu._jit import jit, jit_inline, pointer, wide_vectors


def jit_sums(function):
    """Compile with sums in any order, so that they become vector instructions."""
    return jit(function, fastmath={"reassoc", "nsz", "contract"})


@jit_inline
def memory(address, count, dtype):
    """The array at an address, without a reference count."""
    return carray(pointer(address, dtype), (count,))


@jit_inline
def rows_at(address, count, size, dtype):
    """`memory` of rows [count, size]."""
    return carray(pointer(address, dtype), (count, size))


@jit_inline
def bytes_of(dtype):
    """Bytes an element."""
    return memory(0, 0, dtype).itemsize


@jit_sums
def square(x):
    """Sum of x^2, float64."""
    wide_vectors()
    total = 0.0
    for i in range(len(x)):
        value = np.float64(x[i])
        total += value * value
    return total


@jit_sums
def absolute(x):
    """Sum of |x|, float64."""
    wide_vectors()
    total = 0.0
    for i in range(len(x)):
        total += abs(np.float64(x[i]))
    return total


@jit_sums
def add_scaled(total, factor, x):
    """total += factor * x."""
    wide_vectors()
    for i in range(len(total)):
        total[i] += factor * x[i]
