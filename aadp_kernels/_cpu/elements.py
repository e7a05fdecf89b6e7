"""Elements of a table of tensors, to and from a thread's working memory in float64."""

from __future__ import annotations

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from aadp_kernels._cpu._jit import jit, jit_inline, pointer, wide_vectors
from aadp_kernels._cpu.tensor_table import (
    MINUS,
    MINUS_BYTES,
    OUT,
    OUT_BYTES,
    SIZE,
    VALUE,
    VALUE_BYTES,
)


@jit_inline
def array_at(address, dtype, count):
    """An array without a reference count; numba also lets no index of it count from the end."""
    return carray(pointer(address, dtype), (count,))


@jit_inline
def first_line(scratch):
    """The address of the first cache line in an array of bytes."""
    return (scratch.ctypes.data + 63) & -64


@jit
def load(x, address, bytes_each, start, count):
    wide_vectors()
    if bytes_each == 4:
        single = array_at(address + 4 * start, np.float32, count)
        for i in range(count):
            x[i] = single[i]
    else:
        double = array_at(address + 8 * start, np.float64, count)
        for i in range(count):
            x[i] = double[i]


@jit_inline
def load_difference(x, minus, table, k, row, start, count):
    """x = value - reference of the elements start .. start + count - 1 of a row."""
    at = row * table[k, SIZE] + start
    load(x, table[k, VALUE], table[k, VALUE_BYTES], at, count)
    if table[k, MINUS] != 0:
        load(minus, table[k, MINUS], table[k, MINUS_BYTES], start, count)
        for i in range(count):
            x[i] -= minus[i]


@jit_inline
def store(x, table, k, row, start, count):
    """The elements start .. start + count - 1 of a row's output = x, rounded."""
    bytes_each = table[k, OUT_BYTES]
    address = table[k, OUT] + (row * table[k, SIZE] + start) * bytes_each
    if bytes_each == 4:
        single = array_at(address, np.float32, count)
        for i in range(count):
            single[i] = x[i]
    else:
        double = array_at(address, np.float64, count)
        for i in range(count):
            double[i] = x[i]
