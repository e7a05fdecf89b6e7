"""What a run waits for where nothing would be seen: the compiler of the kernels."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from fl_lightning.output.console import say

WORDS = (
    "compiling kernels for this processor: once, for up to a minute; they are kept for later runs"
)


@contextlib.contextmanager
def told_of_compiling() -> Iterator[None]:
    """Within it, the first kernel that is compiled, rather than found on the disk, is announced."""
    compiler = logging.getLogger("aadp_kernels.compiler")

    class Telling(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            compiler.removeHandler(self)
            say(WORDS)

    telling, before = Telling(), compiler.level
    compiler.addHandler(telling)
    compiler.setLevel(logging.INFO)
    try:
        yield
    finally:
        compiler.removeHandler(telling)
        compiler.setLevel(before)
