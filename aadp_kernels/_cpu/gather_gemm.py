"""A register tile of a matrix product whose left factor is gathered: what BLAS has no call for.

Numba's own loops keep no tile of sums in registers, so this one is written as LLVM vectors.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numpy as np

from aadp_kernels._cpu._fence import has
from aadp_kernels._cpu._jit import jit
from aadp_kernels._cpu.row_sums import bytes_of, memory


def _has_avx512() -> bool:
    if not has("a register tile"):
        return False
    import llvmlite.binding as llvm

    return bool(llvm.get_host_cpu_features().get("avx512f"))


_WIDE = _has_avx512()
_X86 = platform.machine().lower() in ("x86_64", "amd64")
# Sixteen vector registers and not thirty-two.
FEW_REGISTERS = _X86 and not _WIDE
# Bytes of a vector register, and columns of a tile of one and of two vectors: beside its sums
# there must be registers for the entries of both factors.
VECTOR = 64 if _WIDE else 32 if _X86 else 16
COLUMNS1, COLUMNS2 = (6, 4) if FEW_REGISTERS else (12, 8)


def _address(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _splat(builder: Any, value: Any, vector: Any) -> Any:
    """A vector of one number."""
    from llvmlite import ir

    index, undefined = ir.IntType(32), ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, index(0))
    return builder.shuffle_vector(
        first, undefined, ir.Constant(ir.VectorType(index, vector.count), None)
    )


def _emit(context: Any, builder: Any, signature: Any, values: Any, rows: int, vectors: int) -> Any:
    """The loop over positions with all sums in registers."""
    from llvmlite import ir
    from numba.core import cgutils

    out, out_step, a, base, columns, g, g_step, count, _ = values
    element = context.get_value_type(signature.args[-1].dtype)
    bytes_each = signature.args[-1].dtype.bitwidth // 8
    vector, long = ir.VectorType(element, VECTOR // bytes_each), ir.IntType(64)
    muladd = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, [vector] * 3),
        f"llvm.fmuladd.v{vector.count}f{8 * bytes_each}",
    )  # fmt: skip
    sums = [
        [cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for _ in range(vectors)]
        for _ in range(rows)
    ]

    def load_long(address: Any, i: Any) -> Any:
        return builder.load(_address(builder, builder.add(address, builder.mul(i, long(8))), long))

    starts = [builder.add(a, load_long(columns, long(j))) for j in range(rows)]
    with cgutils.for_range(builder, count) as loop:
        position = load_long(base, loop.index)
        row = builder.add(g, builder.mul(loop.index, g_step))
        right = [
            builder.load(
                _address(builder, builder.add(row, long(VECTOR * v)), vector), align=bytes_each
            )
            for v in range(vectors)
        ]
        for j, start in enumerate(starts):
            one = builder.load(_address(builder, builder.add(start, position), element))
            left = _splat(builder, one, vector)
            for v in range(vectors):
                total = builder.load(sums[j][v])
                builder.store(builder.call(muladd, [left, right[v], total]), sums[j][v])
    for j in range(rows):
        row = builder.add(out, builder.mul(out_step, long(j)))
        for v in range(vectors):
            place = _address(builder, builder.add(row, long(VECTOR * v)), vector)
            builder.store(builder.load(sums[j][v]), place, align=bytes_each)
    return context.get_dummy_value()


def _tile(rows: int, vectors: int) -> Callable[..., Any]:
    """tile(out, out_step, a, base, columns, g, g_step, count, dtype)."""
    from numba.core import types
    from numba.extending import intrinsic

    def tile(_context, out, out_step, a, base, columns, g, g_step, count, dtype):
        def emit(context, builder, signature, values):
            return _emit(context, builder, signature, values, rows, vectors)

        return types.void(*[types.int64] * 8, dtype), emit

    return intrinsic(tile)


def _plain_tile(rows: int, vectors: int) -> Callable[..., Any]:
    """`_tile` whose sums are in memory."""

    @jit
    def tile(out, out_step, a, base, columns, g, g_step, count, dtype):
        lanes = vectors * VECTOR // bytes_of(dtype)
        places, starts = memory(base, count, np.int64), memory(columns, rows, np.int64)
        for j in range(rows):
            total = memory(out + j * out_step, lanes, dtype)
            total[:] = 0
            for t in range(count):
                left = memory(a + starts[j] + places[t], 1, dtype)[0]
                right = memory(g + t * g_step, lanes, dtype)
                for i in range(lanes):
                    total[i] += left * right[i]

    return tile


# out[j] = sum over t < count of a[base[t] + columns[j]] * g[t], for a tile's columns j and one or
# two vectors of g. Everything but the count is an address or a number of bytes; base and columns
# point to int64. The terms are added one after the other in t.
_make = _tile if has("a register tile") else _plain_tile
tile1: Any = _make(COLUMNS1, 1)
tile2: Any = _make(COLUMNS2, 2)
