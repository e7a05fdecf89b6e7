"""Words for people that cannot end a run.

A terminal may be unable to show ε, and a pipe may be closed by whoever read its first lines.
Privacy has been paid by then: the run goes on, and its files hold what could not be shown.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

_WORDS = {
    "ε": "epsilon",
    "δ": "delta",
    "≤": "<=",
    "≥": ">=",
    "∞": "infinity",
    "±": "+-",
    "…": "...",
}
_ERRORS = "fl_lightning.words"


def _in_words(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_WORDS.get(c) or f"\\u{ord(c):04x}" for c in missing), error.end


codecs.register_error(_ERRORS, _in_words)


def speak_any_encoding() -> None:
    """Let stdout and stderr write words for what their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def without_advertisements() -> None:
    """Keep Lightning's lines on other products of its makers to itself."""
    for name in ("pytorch_lightning.utilities.rank_zero", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    text = str(record.msg)
    return not ("Tip:" in text and ("litlogger" in text or "litmodels" in text))


def say(text: str, *, file: TextIO | None = None) -> None:
    """Print a line; whatever hinders that is no error.

    Args:
        text: the line, or lines.
        file: stream; None is stdout.
    """
    stream = sys.stdout if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    plain = text.encode(encoding, _ERRORS).decode(encoding)
    quietly(lambda: print(plain, file=stream, flush=True))


class _Page(io.StringIO):
    """Text in memory that takes itself for a stream of the given encoding."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._encoding


def show(thing: Any) -> None:
    """Print one of rich's tables; whatever hinders that is no error."""
    from rich.console import Console

    real = Console()
    page = _Page(getattr(sys.stdout, "encoding", None) or "utf-8")
    console = Console(file=page, width=real.width, force_terminal=real.is_terminal)
    console.print(thing)
    say(page.getvalue().rstrip("\n"))


def quietly(write: Callable[[], object]) -> None:
    """Call what writes to the terminal; a stream that is gone is silent from then on."""
    try:
        write()
    except (OSError, ValueError, SystemExit):  # rich ends a program whose pipe is closed
        for stream in (sys.stdout, sys.stderr):
            _silence_if_gone(stream)


def _silence_if_gone(stream: TextIO | None) -> None:
    """Send a stream whose reader is gone to nowhere, for the interpreter flushes it at the end."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
