"""Functions that kernels call, compiled into each kernel and never alone.

Numba links what a function calls into it and then optimises the whole and makes machine code of it,
at every level of calls anew: five times for what five functions call in turn. A part has no machine
code of its own, nor wrappers for Python, and is optimised alone only where its options ask for what
its callers' do not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.registry import CPUDispatcher


class _Library(JITCodeLibrary):
    """LLVM code to be linked into that of callers."""

    optimised = False

    def _optimize_final_module(self) -> None:
        if self.optimised:
            super()._optimize_final_module()

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """Of a wrapper that no one calls, see `Part.__call__`."""
        return 0

    @property
    def codegen(self) -> Any:
        """Asked to fill in a variable of machine code, of which there is none."""
        return _NoVariables


class _NoVariables:
    @staticmethod
    def set_env(name: str, env: Any) -> None:
        pass


class _Compiler(CompilerBase):
    def __init__(self, typingctx: Any, targetctx: Any, library: Any, *others: Any) -> None:
        library = _Library(targetctx.codegen(), "part")
        super().__init__(typingctx, targetctx, library, *others)
        library.optimised = bool(self.state.flags.fastmath)

    def define_pipelines(self) -> list[Any]:
        return [DefaultPassBuilder.define_nopython_pipeline(self.state)]


class Part(CPUDispatcher):
    """A function of kernels; called from Python it is a kernel itself, compiled by `whole`."""

    def __init__(
        self, function: Callable[..., Any], options: dict[str, Any], whole: Callable[..., Any]
    ) -> None:
        alone = {"nopython": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
        super().__init__(function, targetoptions=options | alone, pipeline_class=_Compiler)
        self._whole = whole

    @cached_property
    def kernel(self) -> Any:
        return self._whole(self.py_func)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.kernel(*args, **kwargs)
