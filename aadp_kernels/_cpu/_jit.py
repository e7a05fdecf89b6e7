"""Compilation and memory of the numba kernels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_OPTIONS = {"nogil": True, "error_model": "numpy"}
_SOURCES = sorted(Path(__file__).parent.glob("*.py"))
_STAMP = hashlib.blake2b(b"\0".join(path.read_bytes() for path in _SOURCES)).hexdigest()


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """Compile without the interpreter lock; cached on disk until any file of this folder changes.

    Floating point follows IEEE 754 operation by operation. Where no folder for the cache can be
    written, every process compiles anew.
    """
    options = {**_OPTIONS, **options}
    try:
        kernel: Any = numba.njit(cache=True, **options)(function)
        # Numba itself looks at the file of the kernel only, not at those of kernels that it calls.
        index = kernel._cache._cache_file
        if not hasattr(index, "_source_stamp"):
            raise AttributeError("numba keeps its stamps elsewhere")
        index._source_stamp = _STAMP
        index._load_index = partial(_index_or_nothing, index._load_index)
        return kernel
    except (RuntimeError, AttributeError):
        return numba.njit(**options)(function)


def _index_or_nothing(load: Callable[[], dict]) -> dict:
    """A cache's index; nothing where it names classes that an older version of this folder had."""
    try:
        return load()
    except (AttributeError, ImportError):
        return {}


def jit_contract(function: Callable[..., Any]) -> Any:
    """`jit` with fused multiply-adds."""
    return jit(function, fastmath={"contract"})


def jit_inline(function: Callable[..., Any]) -> Any:
    """For parts of a kernel: never compiled alone, since that would double the time."""
    return numba.njit(inline="always", **_OPTIONS)(function)


def _wide_vectors(_context):
    """wide_vectors(): the loops of this kernel may use vectors of 512 bits where there are any."""

    def mark(context, builder, _signature, _arguments):
        # Of two equal widths LLVM prefers 256 bits, for the sake of old processors' clock rates.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.none(), mark


wide_vectors: Any = intrinsic(_wide_vectors)


def _leading_zeros(_context, _number):
    """leading_zeros(number): zeros before the first one of 64 bits; 64 where there is none."""

    def count(_context, builder, _signature, arguments):
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), count


leading_zeros: Any = intrinsic(_leading_zeros)


def _pointer(_context, address, dtype):
    """pointer(address, dtype): an integer as a pointer to a numpy dtype."""

    def cast(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(types.int64, dtype), cast


pointer: Any = intrinsic(_pointer)
