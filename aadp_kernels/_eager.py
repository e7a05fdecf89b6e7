"""Functions that draw noise run eagerly: not in compiled graphs, torch.func or autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch._C._dynamo.eval_frame import set_eval_frame
from torch._C._functorch import peek_interpreter_stack

P = ParamSpec("P")
R = TypeVar("R")


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """The function, called as it stands wherever it is used, and without gradients.

    A compiled graph would hold the key and the step as constants and repeat the noise, so
    torch.compile breaks its graph here. `torch.compiler.disable` does the same, but imports the
    compiler with this package.

    Raises:
        RuntimeError: The call stands inside a torch.func transform, whose rows would share noise.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if peek_interpreter_stack() is not None:
            raise RuntimeError(
                f"{function.__name__} cannot run inside a torch.func transform: call it outside, "
                "with one row for each client"
            )
        compiler, grad = set_eval_frame(None), torch.is_grad_enabled()
        # What `torch.no_grad()` does, without its ten calls in Python.
        torch._C._set_grad_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(grad)
            set_eval_frame(compiler)

    marked = cast(Any, call)
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = "noise must be drawn anew in every call"
    return call
