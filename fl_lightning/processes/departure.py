"""Ends the process of a run that was stopped: exit functions run, the interpreter is left as it is.

To take the interpreter with PyTorch apart takes seconds of a processor, and more on a busy machine.
A run that was stopped has a few seconds in all.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys

_status: int | None = None


def leave_with(status: int) -> None:
    """End the process with a status as soon as it has done what is registered for its exit."""
    global _status
    _status = status


def _leave() -> None:
    if _status is None:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # none, broken, closed
            stream.flush()
    os._exit(_status)


# What is registered first is called last: the package imports this before anything else.
atexit.register(_leave)
