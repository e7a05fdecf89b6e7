"""What the noise of a round is bound to besides model, histories and the values it hides."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from fl_lightning import secrets


def round_context(
    network: nn.Module,
    loss: object,
    *,
    data: str,
    rules: tuple[object, ...],
    execution: tuple[str | int, ...],
    cohort: Tensor,
    code: bool,
) -> str:
    """Digest of all that the updates of a round depend on and that the round itself does not hold.

    Args:
        network: its structure, source and untrained tensors count; trained ones are not read.
        loss: function or module.
        data: digest of records and partition, private.
        rules: frozen dataclasses of privacy and local training.
        execution: how clients are computed together.
        cohort: ids of the clients that take part.
        code: whether the source of both packages counts too. Left out of simulated runs, which
            would otherwise change with every edit and protect nobody anyway.
    """
    fixed = [*network.buffers(), *(p for p in network.parameters() if not p.requires_grad)]
    if isinstance(loss, nn.Module):
        fixed += [*loss.buffers(), *loss.parameters()]
    return secrets.digest(
        [
            data,
            *map(repr, rules),
            describe(network),
            describe(loss),
            *secrets.platform_facts(),
            *execution,
            *([secrets.source_digest()] if code else []),
            cohort,
            *fixed,
        ]
    )


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


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""
