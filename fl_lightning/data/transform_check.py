"""Whether a transform makes each record from that record alone."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fl_lightning.data.arrays import Arrays
from fl_lightning.data.differences import different_records
from fl_lightning.data.fields import Fields
from fl_lightning.data.sources import resolve
from fl_lightning.data.transform import ALONE, TRANSFORMS, applied, kept_in

_ALONE = 16
_TOGETHER = 512
# Of the norms that are compared: what float32 sums in another order may differ by.
_RTOL = 1e-4

Apply = Callable[[Tensor], Tensor]


def why_not_alone(
    arrays: Arrays, used: Tensor, transform: str, arguments: Mapping[str, Any] | None = None
) -> str:
    """Why a transform's values are not each of one record alone; "" if they are.

    The values that a run uses are compared with those of the most different records, transformed
    alone and in part. A transform that draws random numbers gives other values there; its values
    of a record are compared under other records beside it.

    Args:
        arrays: before the transform; their N training records are looked at.
        used: what the transform made of all of them at once [N, ...].
        transform: name or import path.
        arguments: its further arguments.

    Guarantees:
        The check of a transform, its arguments and its records is made once: that they passed is
        kept beside the transform's values in the cache.
    """
    x, y, fields = arrays.x_train, arrays.y_train, arrays.fields
    if not len(x):
        return ""
    arguments = dict(arguments or {})
    function = resolve(transform, TRANSFORMS, argument="transform")
    passed = kept_in(x, fields, function, transform, arguments).with_suffix(ALONE)
    if passed.is_file():
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as that of the deviation of one number
            problem = _problem(partial(_apply, function, arguments, fields), x, y, used)
    except Exception as error:
        text = str(error).strip().splitlines() or [repr(error)]
        problem = f"it cannot be applied to a record alone ({text[0][:120]})"
    if not problem:
        with contextlib.suppress(OSError):
            passed.touch(0o600)
    return problem


def _apply(
    function: Apply, arguments: Mapping[str, Any], fields: Fields | None, x: Tensor
) -> Tensor:
    return applied(function, x, arguments, fields)


def _problem(apply: Apply, x: Tensor, y: Tensor, used: Tensor) -> str:
    rows = different_records(x, y, _ALONE)
    few = x[rows]
    values = apply(few)
    if not _equal(apply(few), values):
        return "it gives other values when it is applied again, so that nothing can be compared"
    alone = torch.cat([apply(x[i : i + 1]) for i in rows])
    if _equal(alone, used[rows]):
        part = max(1, min(_TOGETHER, len(x) // 2))
        return "" if _equal(apply(x[:part]), used[:part]) else _BESIDE
    # Random numbers are drawn for places, so that a record keeps its own at its place alone.
    if not _draws(apply, few[:1]):
        return _BESIDE
    for place in (0, len(few) // 2, len(few) - 1):
        for other in (0, len(few) - 1):
            beside = few[[other]].expand_as(few).clone()
            beside[place] = few[place]
            if not _equal(apply(beside)[[place]], values[[place]]):
                return _BESIDE
    return ""


_BESIDE = "its value of a record changes with the records beside it"


def _draws(apply: Apply, record: Tensor) -> bool:
    """Whether equal records at several places get several values."""
    values = apply(record.expand(_ALONE, *record.shape[1:]))
    return not _equal(values, values[:1].expand_as(values))


def _equal(have: Tensor, want: Tensor) -> bool:
    """Whether rows are equal but for rounding, NaN and infinity included."""
    if have.shape != want.shape or have.dtype != want.dtype:
        return False
    a, b = (v.reshape(len(v), -1).double() for v in (have, want))
    finite = a.isfinite() & b.isfinite()
    same = (a == b) | (a.isnan() & b.isnan()) | finite
    if not bool(same.all()):
        return False
    a, b = (v.where(finite, torch.zeros_like(v)) for v in (a, b))
    size = b.norm(dim=1)
    return bool(((a - b).norm(dim=1) <= _RTOL * size + 0.1 * _RTOL * size.amax() + 1e-12).all())
