"""Derives the noise key of a release from everything that the release depends on.

Two releases of equal inputs get equal noise; any other input gets other noise. If equal noise met
two different values, their difference would be public. So secret noise depends on every bit that
the values depend on, and on the values themselves. Noise of a public seed hides nothing. It
depends on seed, rules and round alone, so a simulated run has the same noise on another machine,
with other threads and in any number of processes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from aadp_kernels import NoiseKey
from fl_lightning.keys import digests


def round_context(
    network: nn.Module,
    loss: object,
    *,
    data: str,
    rules: tuple[str, ...],
    execution: tuple[str | int, ...],
    cohort: Tensor,
    processes: Sequence[int],
    bits: bool,
) -> str:
    """Digest of all that the updates of a round depend on and that the round itself does not hold.

    Args:
        network: its structure, source and untrained tensors count; trained ones are not read.
        loss: function or module.
        data: digest of records and partition, private.
        rules: of privacy and of local training, by name.
        execution: how clients are computed together.
        cohort: ids of the clients that take part.
        processes: how many the run began with, then how many it went on with wherever that
            changed: from there on all noise is fresh.
        bits: whether what decides no more than the last bits counts too: platform, threads,
            execution, the source of both packages. Left out of simulated runs.
    """
    fixed = [*network.buffers(), *(p for p in network.parameters() if not p.requires_grad)]
    if isinstance(loss, nn.Module):
        fixed += [*loss.buffers(), *loss.parameters()]
    return digests.digest(
        [
            data,
            *rules,
            describe(network),
            describe(loss),
            *([*digests.platform_facts(), *execution, digests.source_digest()] if bits else []),
            cohort,
            # A run that never changed has the noise of one process, from a public seed.
            *([repr(processes)] if bits or len(processes) > 1 else []),
            *fixed,
        ]
    )


def round_key(
    key: NoiseKey, context: str, round: int, redraw: int, *inputs: Tensor | float
) -> NoiseKey:
    """The key of coins and noise of a release.

    Args:
        key: the run's.
        context: digest that `round_context` gives.
        round: round number.
        redraw: how often equal inputs gave other bytes.
        inputs: all else that the release depends on, bit by bit. Ignored under a public seed.
    """
    bound = digests.digest([context, round, *(() if key.simulated else inputs)])
    return key.derive("round", bound, redraw)


def step_key(key: NoiseKey, step: int, values: Iterable[Tensor | float | str]) -> NoiseKey:
    """The key of the noise of one step on the given values.

    Other values can never meet the same secret noise, whatever else was forgotten in the key.
    """
    if key.simulated:
        return key.derive("step", step)
    return key.derive("values", step, digests.bulk_digest(values))


def describe(thing: object) -> str:
    """Structure and source of a network or loss, the same in every process."""
    if not isinstance(thing, nn.Module):
        name = getattr(thing, "__qualname__", type(thing).__qualname__)
        return f"{thing.__module__}.{name}\n{_source(thing)}"
    plain = (bool, int, float, str, tuple, type(None))
    parts = [repr(thing)]
    for name, module in thing.named_modules():
        options = {k: v for k, v in vars(module).items() if isinstance(v, plain)}
        classes = [c for c in type(module).__mro__ if not c.__module__.startswith("torch.")]
        parts += [name, repr(sorted(options.items())), *map(_source, classes)]
    return "\n".join(parts)


@functools.cache
def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""
