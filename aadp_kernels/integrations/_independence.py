"""Whether a record's gradient is its own: compared alone and among others before a release.

Clipping bounds what one record adds to the gradient of its own row. A model that mixes records, in
its forward or only on the way back, puts one record into the rows of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from aadp_kernels.clip_in_backward.modules import UnsupportedLayerError
from aadp_kernels.integrations._comparison import Comparison
from aadp_kernels.integrations._lending import Lender
from aadp_kernels.integrations._records import hold_records, most_different, taken

# Compared at once: more than two, and a prime, so that few shifts of rows look like none.
_COUNT = 5
Modes = Sequence[tuple[nn.Module, bool]]

_UNREPEATABLE = (
    "the model gives other outputs for equal records when it is run again, so it is not known "
    "whether it mixes records; draw random numbers from torch's own generators alone, and keep "
    "nothing of the records that were seen"
)


class Independence:
    """Compares gradients of records alone with those among others, once for each kind of input.

    Args:
        lender: Of the model's gradients.
        axis: Axis of the records in inputs.
        training: Layers that stay in the mode they are in when all others are put into eval mode.

    Guarantees:
        Random states, modes, buffers, parameters and `.grad` are left as they were.

    Edge cases:
        | batch | what happens |
        |---|---|
        | one record, or equal records | nothing is shown; a later batch is compared |
        | more records than were compared before, up to five | compared again |
        | outputs that hold no axis of records | left out; if there are no others, one number is |
        | | taken for the sum or the mean of the records' losses |
        | dropout | switched off |
        | other random numbers | the change by one record must not depend on another record; then |
        | | all is compared in eval mode |
        | a record without a finite gradient | left out |
    """

    def __init__(
        self, lender: Lender, *, axis: int = 0, training: Sequence[nn.Module] = ()
    ) -> None:
        self._lender, self._axis = lender, axis
        self._training = {id(layer) for layer in training}
        self._compared: dict[object, int] = {}

    def check(self, kind: object, model: nn.Module, args: Any, kwargs: Any, records: int) -> None:
        """Raise UnsupportedLayerError if a record's gradient changes with those beside it.

        Args:
            kind: What may decide the way through the model; inputs of one kind are compared once.
            model: Its modes and buffers are put back.
            args: Inputs of the forward that has ended.
            kwargs: See args.
            records: Their number.
        """
        wanted = min(records, _COUNT)
        if wanted < 2 or self._compared.get(kind, 0) >= wanted:
            return
        inputs = args, kwargs
        where = {"records": records, "axis": self._axis}
        if not hold_records(inputs, **where):
            return
        rows = most_different(inputs, count=wanted, **where)
        differ = len(rows) > 1
        take = partial(taken, inputs, **where)
        with torch.enable_grad():
            reason = self._reason(model, take, rows if differ else [0, 1])
        if reason:
            raise UnsupportedLayerError(reason)
        if differ and reason is not None:
            self._compared[kind] = wanted

    def _reason(
        self, model: nn.Module, take: Callable[[Sequence[int]], Any], rows: list[int]
    ) -> str | None:
        """Why the model cannot be clipped by records; "" if it can, None if nothing was shown."""
        modes = [(layer, layer.training) for layer in model.modules()]
        try:
            return self._compare(Comparison(model, self._lender, take), modes, rows)
        except UnsupportedLayerError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return _failed(error, len(rows))
        finally:
            _set_modes(modes)

    def _compare(self, comparison: Comparison, modes: Modes, rows: list[int]) -> str | None:
        """As `_reason`; leaves modules in other modes."""
        layers = [layer for layer, _ in modes]
        self._quiet(layer for layer in layers if "drop" in type(layer).__name__.lower())
        if not comparison.draws(rows):
            return comparison.mixed(rows)
        _set_modes(modes)
        repeats = comparison.repeats(rows)
        reason = comparison.interacting(rows) if repeats and len(rows) > 2 else ""
        if reason:
            return reason
        self._quiet(layers)
        if comparison.draws(rows):
            return "" if repeats else _UNREPEATABLE
        return comparison.mixed(rows)

    def _quiet(self, layers: Iterable[nn.Module]) -> None:
        """Put these into eval mode, but for those whose gradients are made in training alone."""
        for layer in layers:
            if id(layer) not in self._training:
                layer.training = False


def _set_modes(modes: Modes) -> None:
    for layer, training in modes:
        layer.training = training


def _failed(error: Exception, count: int) -> str:
    """The reason for which a comparison came to no end."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    if "use_reentrant" in text:
        return (
            "a layer is computed again in backward, with a graph of its own: checkpoint with "
            "use_reentrant=False"
        )
    return (
        f"the model cannot be run on {count} of the records and on one by itself, so it is not "
        f"known whether it mixes records: {first}"
    )
