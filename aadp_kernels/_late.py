"""When numba's compiler may begin: late, where plain torch gives the same bits meanwhile.

Numba compiles an operation for about ten seconds, once for each version of this package. Few calls
of small models never pay that back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal, get_args

from aadp_kernels import _validate

if TYPE_CHECKING:
    from aadp_kernels.layout import Layout

When = Literal["never", "late", "now"]

# Operations and forms that give the same bits in plain torch and in numba.
SAME_BITS = frozenset(
    (operation, form)
    for operation, forms in {
        "privatize": ("wide", "grid"), "noise": ("wide", "grid"), "norms": ("wide",),
        "coins": ("wide",),
    }.items()
    for form in forms
)  # fmt: skip
# Numbers that plain torch draws before numba compiles, of an operation: they take it one second to
# three, measured on two cores. A call takes as long for each tensor as for so many numbers, and one
# on the grid as long as so many others.
PATIENCE, NUMBERS_A_TENSOR, A_GRID_NUMBER = 1 << 24, 4096, 16

_WHEN: ContextVar[When] = ContextVar("when", default="late")
# What a process has done so far, as its compiled code a fact of the process.
_drawn: dict[tuple[str, str], int] = {}
_compiled: set[tuple[str, str]] = set()


@contextmanager
def compiling(when: When) -> Iterator[None]:
    """Within it, say when `impl="auto"` may wait for numba's compiler, on a CPU, in this thread.

    Args:
        when: "now": at the first call, as `impl="numba"` does; what a benchmark wants, and a long
            run. "late", as everywhere outside: operations with the same bits in plain torch begin
            there, and are compiled when they have taken it some seconds, or are compiled already;
            others at once. "never": plain torch for all that it can do.

    Raises:
        ValueError: Another word.

    Guarantees:
        `privatize_`, `layer_norms`, `sample_noise` and `poisson_mask` give the same bits whatever
        is said here, but for the fast form, which is compiled in any case. Clipped sums and
        clip-in-backward add norms in another order within "never". An inner context cannot lift an
        outer "never".
    """
    _validate.one_of("when", when, get_args(When))
    before = _WHEN.set("never" if _WHEN.get() == "never" else when)
    try:
        yield
    finally:
        _WHEN.reset(before)


def work(layout: Layout, clients: Sized | None, again: Sized = ()) -> int:
    """The `numbers` of `waits` for an update, or for the updates of some clients.

    Args:
        layout: of an update.
        clients: whose; None: one update.
        again: steps whose noise is drawn once more.
    """
    rows = 1 if clients is None else len(clients)
    return rows * (layout.elements * (1 + len(again)) + NUMBERS_A_TENSOR * len(layout.names))


def never() -> bool:
    """Whether nothing may be compiled here."""
    return _WHEN.get() == "never"


def waits(operation: str, form: str, numbers: int, at_hand: Callable[[], bool]) -> bool:
    """Whether plain torch does a call on a CPU, whose work is counted then.

    Args:
        operation: of a back end.
        form: of its noise.
        numbers: that the call draws or reads, see `work`.
        at_hand: says whether the operation is compiled, in this process or on disk.
    """
    when, what = _WHEN.get(), (operation, form)
    if when != "late" or what in _compiled:
        return when == "never"
    if what not in SAME_BITS:
        return False
    _drawn[what] = _drawn.get(what, 0) + numbers * (A_GRID_NUMBER if form == "grid" else 1)
    if _drawn[what] > PATIENCE or at_hand():
        _compiled.add(what)
        return False
    return True
