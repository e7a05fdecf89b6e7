"""Records of a batch: taking some out of a model's inputs, finding their parts in its outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map

_COLUMNS = 1024


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def _holds(value: Any, records: int, axis: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > axis and value.shape[axis] == records


def taken(inputs: Any, rows: Sequence[int], *, records: int, axis: int) -> Any:
    """The inputs of a model for these records alone; what holds no records stays as it is.

    Args:
        inputs: A tree of tensors and packed sequences for `records` records.
        rows: Records to take, in this order.
        records: Length of the axis of records.
        axis: Where tensors have the records.
    """

    def take(value: Any) -> Any:
        if _is_packed(value):
            padded, lengths = pad_packed_sequence(value, batch_first=True)
            if len(lengths) != records:
                return value
            some = padded.detach()[[*rows]], lengths[[*rows]]
            return pack_padded_sequence(*some, batch_first=True, enforce_sorted=False)
        if not _holds(value, records, axis):
            return value
        index = torch.tensor([*rows], device=value.device)
        return value.detach().index_select(axis, index).requires_grad_(value.requires_grad)

    return tree_map(take, inputs, is_leaf=_is_packed)


def hold_records(inputs: Any, *, records: int, axis: int) -> bool:
    """Whether `taken` would find records in the inputs."""
    return any(True for _ in _tables(inputs, records, axis))


def _tables(inputs: Any, records: int, axis: int) -> Iterator[Tensor]:
    """Every input that holds records, as numbers [records, columns]."""
    for value in tree_leaves(inputs, is_leaf=_is_packed):
        if _is_packed(value):
            padded, lengths = pad_packed_sequence(value, batch_first=True)
            if len(lengths) == records:
                yield padded.detach().reshape(records, -1)
        elif _holds(value, records, axis):
            found = torch.view_as_real(value) if value.is_complex() else value
            yield found.detach().movedim(axis, 0).reshape(records, -1)


def most_different(inputs: Any, *, records: int, axis: int, count: int) -> list[int]:
    """Up to `count` finite records, no two equal: the largest, then always the farthest one.

    Records that look alike hide that they are mixed.
    """
    columns = []
    for table in _tables(inputs, records, axis):
        some = table[:, :: max(1, table.shape[1] // _COLUMNS)].double()
        size = some.nan_to_num(0, 0, 0).abs().amax() if some.numel() else some.new_ones(())
        columns.append((some / size.clamp_min(1e-300)).cpu())
    if not columns:
        return []
    points = torch.cat(columns, 1)
    finite = points.isfinite().all(1)
    points = points.nan_to_num(0, 0, 0)
    distance = torch.where(finite, 1 + points.norm(dim=1), -1.0)
    found: list[int] = []
    while len(found) < count:
        row = int(distance.argmax())
        if not distance[row] > 0:
            break
        found.append(row)
        away = (points - points[row]).norm(dim=1)
        distance = (
            torch.minimum(distance, away) if len(found) > 1 else torch.where(finite, away, -1.0)
        )
    return found


def tensors_of(output: Any) -> list[Tensor]:
    """Floating-point tensors of a model's output in its order; complex ones as pairs of numbers."""
    if isinstance(output, Tensor):
        if output.is_complex():
            return [torch.view_as_real(output)]
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = [*output.values()]
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    elif not isinstance(output, list | tuple):
        output = [v for v in getattr(output, "__dict__", {}).values() if isinstance(v, Tensor)]
    return [tensor for value in output for tensor in tensors_of(value)]


Pair = tuple[Tensor, Tensor]


def pairs(
    batch: Sequence[Tensor], alone: Sequence[Sequence[Tensor]], *, turned: bool = False
) -> list[list[Pair]]:
    """For each record its parts of a batch's outputs, each beside the same of the record alone.

    The axis of records is the first one on which the batch is as long as its records together; of
    other axes only the common part is taken, since a batch may be as long as its longest record.
    Tensors without such an axis are left out.

    Args:
        batch: Outputs for all records.
        alone: Outputs for each record by itself.
        turned: Where a record has several rows, they stand apart: rows of all records, in turn.
    """
    found: list[list[Pair]] = [[] for _ in alone]
    if all(len(one) == len(batch) for one in alone):
        for whole, *ones in zip(batch, *alone, strict=True):
            for mine, pair in zip(found, _cut(whole, ones, turned), strict=False):
                mine.append(pair)
    elif sum(map(len, alone)) == len(batch):
        rest = iter(batch)  # a list with something for each record
        for mine, ones in zip(found, alone, strict=True):
            mine += [_common(next(rest), one) for one in ones]
    return found


def _cut(whole: Tensor, ones: Sequence[Tensor], turned: bool) -> list[Pair]:
    """The parts of one output, or nothing if it has no axis of records."""
    if any(one.dim() != whole.dim() for one in ones):
        return []
    for axis, length in enumerate(whole.shape):
        sizes = [one.shape[axis] for one in ones]
        if sum(sizes) != length or not all(sizes):
            continue
        if turned and len({*sizes}) == 1:
            apart = whole.unflatten(axis, (sizes[0], len(ones)))
            parts = [apart.select(axis + 1, i) for i in range(len(ones))]
        else:
            parts = [*whole.split(sizes, axis)]
        return [_common(part, one) for part, one in zip(parts, ones, strict=True)]
    return []


def _common(part: Tensor, one: Tensor) -> Pair:
    """Both, as far as both reach."""
    if part.dim() != one.dim():
        return part[:0], part[:0]
    cut = tuple(slice(min(sizes)) for sizes in zip(part.shape, one.shape, strict=True))
    return part[cut], one[cut]
