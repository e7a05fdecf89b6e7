"""Whether a run pays back the compiler of its kernels, by what is planned before it begins.

The choice follows from the plan alone, never from a clock: a run that goes on takes the kernels
that it began with.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor

from aadp_kernels import Layout, compiling
from fl_lightning.rules import Rules

# Measured on two cores: plain torch takes 0.2 µs more than numba for a number of noise and 0.8 ms
# more for a tensor; numba compiles for 20 to 40 s, once, and takes 2 s to load what is compiled.
_NUMBERS_A_TENSOR = 4096
# Clipping draws nothing: so many numbers of records' gradients take the time of one of noise.
_GRADIENTS_A_NUMBER = 64
_WORTH_COMPILING = 1 << 26


def worth_compiling(rules: Rules, layout: Layout, client_sizes: Tensor, rounds: int) -> bool:
    """Whether compiled kernels save a run more time than compiling them takes.

    Args:
        rules: of the run.
        layout: trained parameters.
        client_sizes: records of each client, [K].
        rounds: planned.
    """
    clients = len(client_sizes)
    releases = rounds * rules.cohort_size(clients) * rules.steps_a_release
    numbers = layout.elements + _NUMBERS_A_TENSOR * len(layout.names)
    if rules.privacy.unit == "record":
        records = (rules.sampling_rate or 1.0) * float(client_sizes.double().mean())
        numbers += int(records * layout.elements) // _GRADIENTS_A_NUMBER
    return releases * numbers > _WORTH_COMPILING


def kernels_for(
    rules: Rules, layout: Layout, client_sizes: Tensor, rounds: int
) -> AbstractContextManager[None]:
    """What the rounds of a run, and its dry round, are computed in; see `worth_compiling`."""
    worth = worth_compiling(rules, layout, client_sizes, rounds)
    return compiling("now" if worth else "never")
