"""A fence around numba's internals: where a name has moved, that feature takes its plain path.

Numba promises `njit` and little more. What is used beyond that stands in `FEATURES`, each feature
by itself. `has` looks every name up before it is used and warns once, so a new numba costs speed
and never a result.

Why not numba's own threads (`prange`)? Its OpenMP layer starts a second set of workers beside
torch's, which spin on the same cores, and GNU OpenMP ends forked children that use it; its
workqueue layer allows one caller at a time. `_parallel` uses the workers that torch has already.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module

import numba

_PLACES = {
    "builder": "llvmlite.ir.IRBuilder",
    "cgutils": "numba.core.cgutils",
    "context": "numba.core.cpu.CPUContext",
    "ir": "llvmlite.ir",
    "types": "numba.core.types",
}


def _names(*others: str, **places: str) -> tuple[str, ...]:
    """Full names of what a function that writes LLVM code needs."""
    found = (f"{_PLACES[at]}.{name}" for at, names in places.items() for name in names.split())
    return ("numba.extending.intrinsic", *others, *found)


# Each feature: what it costs to be without it, and the names that it needs.
FEATURES = {
    "addresses": (
        "everything runs in plain torch",
        _names(
            "numba.carray", builder="inttoptr", context="get_value_type", types="CPointer int64"
        ),
    ),
    "a cache on disk": (
        "every process compiles anew",
        (
            "numba.core.dispatcher.Dispatcher.enable_caching",
            "numba.core.caching.IndexDataCacheFile._load_index",
        ),
    ),
    "parts of kernels": (
        "what kernels call is compiled anew at every level",
        (
            "numba.core.codegen.JITCodeLibrary.get_pointer_to_function",
            "numba.core.codegen.CPUCodeLibrary._optimize_final_module",
            "numba.core.codegen.CPUCodeLibrary._finalize_dynamic_globals",
            "numba.core.codegen.CPUCodeLibrary._finalize_final_module",
            "numba.core.codegen.CodeLibrary.codegen",
            "numba.core.compiler.CompilerBase",
            "numba.core.compiler.DefaultPassBuilder.define_nopython_pipeline",
            "numba.core.cpu.CPUContext.active_code_library",
            "numba.core.registry.CPUDispatcher",
        ),
    ),
    "word of compiling": (
        "nothing says that a kernel is compiled",
        ("numba.core.event.Listener", "numba.core.event.register"),
    ),
    "wide vectors": (
        "vectors have 256 bits",
        _names(
            "llvmlite.ir.values.FunctionAttributes", builder="function",
            context="get_dummy_value", types="none",
        ),
    ),
    "counting zeros": (
        "they are counted in a loop",
        _names(builder="ctlz", ir="Constant IntType", types="int64 uint64"),
    ),
    "loops on torch's threads": (
        "loops go through the interpreter",
        _names(
            "numba.core.callconv.CPUCallConv.call_function",
            "numba.core.callconv.CPUCallConv.return_user_exc",
            "numba.core.dispatcher.Dispatcher.compile",
            builder="add atomic_rmw bitcast branch call cbranch extract_value icmp_signed if_then "
            "inttoptr load module mul position_at_end ret_void sdiv select store trunc",
            cgutils="alloca_once gep_inbounds",
            context="add_linking_libs call_conv declare_function get_dummy_value",
            ir="Function FunctionType IRBuilder IntType LiteralStructType VoidType",
            types="int64 void",
        ),
    ),
    "a register tile": (
        "products keep their sums in memory",
        _names(
            "llvmlite.binding.get_host_cpu_features",
            builder="add call insert_element inttoptr load module mul shuffle_vector store",
            cgutils="alloca_once_value for_range get_or_insert_function",
            context="get_dummy_value get_value_type",
            ir="Constant FunctionType IntType Undefined VectorType",
            types="int64 void",
        ),
    ),
}  # fmt: skip


def missing_name(feature: str) -> str | None:
    """The first name of a feature that is not where it was; None: it is whole."""
    return next((name for name in FEATURES[feature][1] if not _found(name)), None)


@cache
def has(feature: str) -> bool:
    """Whether a feature can be used; a warning where it cannot, once in a process."""
    name = missing_name(feature)
    if name is not None:
        warnings.warn(
            f"numba {numba.__version__} has no {name}: {feature} cannot be used, so "
            f"{FEATURES[feature][0]}",
            RuntimeWarning,
            stacklevel=2,
        )
    return name is None


def _found(name: str) -> bool:
    """Whether a module or an attribute has this name."""
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        try:
            place = import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for part in parts[i:]:
            if not hasattr(place, part):
                return False
            place = getattr(place, part)
        return True
    return False
