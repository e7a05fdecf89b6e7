"""Loops of kernels on torch's OpenMP threads, without the interpreter."""

from __future__ import annotations

from typing import Any

from aadp_kernels import threads
from aadp_kernels._cpu._fence import has
from aadp_kernels._cpu._jit import intrinsic_or

# More parts than threads: a thread that is late leaves some to the others.
_PARTS_PER_THREAD = 4
_USABLE = has("loops on torch's threads")


def region_for(elements: int) -> tuple[int, int]:
    """`threads.region_for`; address 0 also where numba cannot call it."""
    count, region = threads.region_for(elements)
    return count, region if _USABLE else 0


def _body(context: Any, builder: Any, compiled: Any, kind: Any) -> tuple[Any, Any]:
    """The function of a thread: parts of the loop, one after another, until there are no more.

    It reads a structure of the arguments, the length of the loop, that of a part, where the next
    part begins, and whether a part has failed.
    """
    from llvmlite import ir
    from numba.core import cgutils

    long, address = ir.IntType(64), ir.IntType(8).as_pointer()
    job = ir.LiteralStructType([kind, long, long, long, long])
    function = ir.Function(
        builder.module, ir.FunctionType(ir.VoidType(), [address]),
        builder.module.get_unique_name("body"),
    )  # fmt: skip
    function.linkage = "internal"
    inner = ir.IRBuilder(function.append_basic_block("entry"))
    shared = inner.bitcast(function.args[0], job.as_pointer())
    *fixed, place, failed = (cgutils.gep_inbounds(inner, shared, 0, i) for i in range(5))
    given, count, step = (inner.load(each) for each in fixed)
    loop, work, done = (function.append_basic_block(name) for name in ("loop", "work", "done"))
    inner.branch(loop)
    inner.position_at_end(loop)
    begin = inner.atomic_rmw("add", place, step, "monotonic")
    inner.cbranch(inner.icmp_signed("<", begin, count), work, done)
    inner.position_at_end(work)
    end = inner.add(begin, step)
    end = inner.select(inner.icmp_signed("<", end, count), end, count)
    values = [inner.extract_value(given, i) for i in range(len(compiled.signature.args) - 2)]
    kernel = context.declare_function(builder.module, compiled.fndesc)
    status, _ = context.call_conv.call_function(
        inner, kernel, compiled.fndesc.restype, compiled.fndesc.argtypes, [*values, begin, end]
    )
    with inner.if_then(status.is_error, likely=False):
        inner.atomic_rmw("or", failed, long(1), "monotonic")
    inner.branch(loop)
    inner.position_at_end(done)
    inner.ret_void()
    return function, job


def _parallel(_context, kernel, arguments, count, threads, region):
    """parallel(kernel, arguments, count, threads, region): kernel(*arguments, begin, end).

    Covers [0, count) on threads of `threads.region_for`. The kernel is compiled, and gives the
    same result however the range is cut. Where a part of it raises (it finds no memory), the others
    are done and then a MemoryError is raised.
    """
    from llvmlite import ir
    from numba.core import cgutils, types

    long, address = ir.IntType(64), ir.IntType(8).as_pointer()
    kinds = (*arguments.types, types.int64, types.int64)
    kernel.dispatcher.compile(kinds)
    compiled = kernel.dispatcher.overloads[kinds]

    def emit(context, builder, signature, values):
        _, given, count, threads, region = values
        context.add_linking_libs([compiled.library])
        body, kind = _body(context, builder, compiled, given.type)
        shared = cgutils.alloca_once(builder, kind)
        parts = builder.mul(threads, long(_PARTS_PER_THREAD))
        step = builder.add(builder.sdiv(count, parts), long(1))
        for i, value in enumerate((given, count, step, long(0), long(0))):
            builder.store(value, cgutils.gep_inbounds(builder, shared, 0, i))
        number = ir.IntType(32)
        call = ir.FunctionType(ir.VoidType(), [body.type, address, number, number])
        builder.call(
            builder.inttoptr(region, call.as_pointer()),
            [body, builder.bitcast(shared, address), builder.trunc(threads, number), number(0)],
        )
        failed = builder.load(cgutils.gep_inbounds(builder, shared, 0, 4))
        with builder.if_then(builder.icmp_signed("!=", failed, long(0)), likely=False):
            context.call_conv.return_user_exc(builder, MemoryError, ("a thread failed",))
        return context.get_dummy_value()

    return types.void(kernel, arguments, count, threads, region), emit


def _plain(kernel, arguments, count, threads, region):
    """The whole range in one thread: larger ones go through `threads.run_on_threads`."""
    kernel(*arguments, 0, count)


parallel: Any = intrinsic_or("loops on torch's threads", _parallel, _plain)
