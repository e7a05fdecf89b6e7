"""The first program of a process that process 0 starts: `child.py PARENT COMMAND ...`.

A process hears of a stop when it has imported its packages. Until then the kernel has to end it
when process 0 is killed. This program imports nothing that takes time, asks the kernel for that and
becomes the command. Only Linux can do it; elsewhere the process ends when it has imported.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

PARENT = "AADP_FL_PARENT"  # environment: process 0 and the process that it started
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def behind(command: Sequence[str]) -> list[str]:
    """The command, in a process that ends with this one until it calls `outlive_parent`."""
    # Neither the environment nor installed packages have a say before the kernel is asked.
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), *command]


def parent() -> int:
    """Number of process 0 if it started this process itself; else 0."""
    first, _, own = os.environ.get(PARENT, "").partition(":")
    return int(first) if own == str(os.getpid()) else 0


def outlive_parent() -> None:
    """From here on this process notices itself that its parent is gone."""
    _end_with_parent(0)


def _end_with_parent(signum: int) -> None:
    """Let the kernel send a signal when the parent ends; 0 for none."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, *map(ctypes.c_ulong, (signum, 0, 0, 0)))


def main(arguments: Sequence[str]) -> None:
    """Become a command that ends with its parent; never returns."""
    first, *command = arguments
    _end_with_parent(signal.SIGKILL)
    if os.getppid() != int(first):  # it ended before the kernel was asked
        raise SystemExit(1)
    os.environ[PARENT] = f"{first}:{os.getpid()}"
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
