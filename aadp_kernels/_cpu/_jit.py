"""Compilation and memory of the numba kernels."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np

from aadp_kernels._cpu._fence import FEATURES, has

_OPTIONS = {"nogil": True, "error_model": "numpy"}
_HERE = Path(__file__).parent
# Numbers of these two are constants of kernels.
_SOURCES = [*sorted(_HERE.glob("*.py")), _HERE.parent / "addresses.py", _HERE.parent / "grid.py"]
_STAMP = hashlib.blake2b(
    b"\0".join(path.read_bytes() for path in _SOURCES) + repr([*map(has, FEATURES)]).encode()
).hexdigest()

_LOG = logging.getLogger("aadp_kernels.compiler")


def _say_what_is_compiled() -> None:
    """From now on, log each kernel of this folder that is compiled, not found in the cache."""
    from numba.core import event

    class Compiling(event.Listener):
        def on_start(self, event: Any) -> None:
            function = event.data["dispatcher"].py_func
            if Path(function.__code__.co_filename).parent == _HERE:
                _LOG.info("compiling %s", function.__name__)

        def on_end(self, event: Any) -> None:
            pass

    event.register("numba:compile", Compiling())


if has("word of compiling"):
    _say_what_is_compiled()


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """Compile without the interpreter lock; cached on disk until a file of this folder changes.

    Floating point follows IEEE 754 operation by operation. Where no folder for the cache can be
    written, every process compiles anew.
    """
    options = {**_OPTIONS, **options}
    if not has("parts of kernels"):
        return _cached(function, options)
    from aadp_kernels._cpu._parts import Part

    return Part(function, options, partial(_cached, options=options))


def _cached(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    """A kernel with code of its own."""
    if not has("a cache on disk"):
        return numba.njit(**options)(function)
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


def is_compiled(kernel: Any) -> bool:
    """Whether a kernel that Python calls has machine code, in this process or in the cache."""
    kernel = getattr(kernel, "kernel", kernel)  # of a `Part`
    if kernel.overloads:
        return True
    index = getattr(kernel._cache, "_cache_file", None)
    return index is not None and bool(index._load_index())


def jit_contract(function: Callable[..., Any]) -> Any:
    """`jit` with fused multiply-adds."""
    return jit(function, fastmath={"contract"})


def jit_inline(function: Callable[..., Any]) -> Any:
    """For parts of a kernel: never compiled alone, since that would double the time."""
    return numba.njit(inline="always", **_OPTIONS)(function)


def _plain_wide_vectors():
    """wide_vectors() where a kernel cannot say so."""


def _plain_leading_zeros(number):
    """leading_zeros(number) by halves."""
    zeros = 0
    for bits in (32, 16, 8, 4, 2, 1):
        if number >> np.uint64(64 - bits) == 0:
            zeros += bits
            number = number << np.uint64(bits)
    return zeros + 1 if number >> np.uint64(63) == 0 else zeros


def _wide_vectors(_context):
    """wide_vectors(): the loops of this kernel may use vectors of 512 bits where there are any."""
    from numba.core import types

    def mark(context, builder, _signature, _arguments):
        # Of two equal widths LLVM prefers 256 bits, for the sake of old processors' clock rates.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        if has("parts of kernels"):
            context.active_code_library.optimised = True  # its callers may be without
        return context.get_dummy_value()

    return types.none(), mark


def _leading_zeros(_context, _number):
    """leading_zeros(number): zeros before the first one of 64 bits; 64 where there is none."""
    from llvmlite import ir
    from numba.core import types

    def count(_context, builder, _signature, arguments):
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), count


def _pointer(_context, address, dtype):
    """pointer(address, dtype): an integer as a pointer to a numpy dtype."""
    from numba.core import types

    def cast(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(types.int64, dtype), cast


def intrinsic_or(feature: str, emit: Callable[..., Any], plain: Callable[..., Any]) -> Any:
    """What `emit` writes for LLVM where numba has all that it needs, else a plain function."""
    if not has(feature):
        return jit_inline(plain)
    from numba.extending import intrinsic

    return intrinsic(emit)


wide_vectors: Any = intrinsic_or("wide vectors", _wide_vectors, _plain_wide_vectors)
leading_zeros: Any = intrinsic_or("counting zeros", _leading_zeros, _plain_leading_zeros)
# Without it this back end is not chosen at all, see `missing` of the package.
pointer: Any = intrinsic_or("addresses", _pointer, lambda address, dtype: address)
