"""What a run waits for where nothing would be seen: the compiler of the kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from fl_lightning.output.console import say

WORDS = (
    "compiling kernels for this processor: once, for up to a minute; they are kept for later runs"
)


@contextlib.contextmanager
def told_of_compiling() -> Iterator[None]:
    """Within it, the first kernel that is compiled, rather than found on the disk, is announced."""
    try:
        from numba.core import event
    except ImportError:  # plain torch computes
        yield
        return

    class Telling(event.Listener):
        told = False

        def on_start(self, event: Any) -> None:
            if not self.told:
                self.told = True
                say(WORDS)

        def on_end(self, event: Any) -> None:
            pass

    with event.install_listener("numba:compile", Telling()):
        yield
