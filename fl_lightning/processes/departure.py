"""The exit of a run that was stopped: all that was asked for at exit is done, and nothing more.

To take the interpreter apart, with all that PyTorch has in it, takes seconds of a processor, and
many more where the machine is busy. A run that was stopped has a few seconds in all.
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
