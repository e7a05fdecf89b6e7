"""Records of several named inputs, such as token ids and their mask, packed into one tensor.

Everything between the data and the network (cohorts, padding, digests, dry round) handles one
tensor a record; the fields stand apart again where the network is called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

_KINDS = {"int64": torch.int64, "bool": torch.bool, "float32": torch.float32}


@dataclass(frozen=True)
class Field:
    """One input of a network.

    Attributes:
        name: keyword of the network's forward; "0", "1", ... for inputs by position.
        shape: of one record's values.
        kind: int64, bool or float32.
    """

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def width(self) -> int:
        """Numbers that a record holds of it."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Fields:
    """The inputs of a record, in the order in which they lie in it. Public."""

    parts: tuple[Field, ...]

    @property
    def by_position(self) -> bool:
        """Whether the network takes them as positional arguments."""
        return self.parts[0].name == "0"

    @property
    def packed(self) -> torch.dtype:
        """float32 if all fields are, else int64, which holds a float32 by its bits."""
        floats = all(part.kind == "float32" for part in self.parts)
        return torch.float32 if floats else torch.int64

    @property
    def width(self) -> int:
        """Numbers of a packed record."""
        return sum(part.width for part in self.parts)

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Packed records [N, width] of each field's values [N, *shape]."""
        columns = []
        for part in self.parts:
            value = values[part.name].flatten(1) if part.shape else values[part.name][:, None]
            if part.kind == "float32" and self.packed == torch.int64:
                value = value.contiguous().view(torch.int32)
            columns.append(value.to(self.packed))
        return torch.cat(columns, 1)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """The fields [..., *shape] of packed records [..., width]."""
        values = {}
        columns = packed.split([part.width for part in self.parts], -1)
        for part, value in zip(self.parts, columns, strict=True):
            if self.packed == torch.int64:
                floats = part.kind == "float32"
                value = value.to(torch.int32).view(torch.float32) if floats else value
                value = value.to(_KINDS[part.kind])
            values[part.name] = value.reshape(*packed.shape[:-1], *part.shape)
        return values


def named_inputs(x_train: object, x_test: object) -> tuple[Fields, Tensor, Tensor | None] | None:
    """Packed records where inputs have names or positions; None where a record is one array.

    Args:
        x_train: mapping or tuple of arrays [N, ...], of any integers, bools or floats.
        x_test: the same for M records; None for none.

    Returns:
        The fields, packed training records [N, width], and packed test records.

    Raises:
        ValueError: no input, numbers of records that differ, or other fields in x_test.
    """
    if not isinstance(x_train, Mapping | tuple):
        return None
    given = _tensors("x_train", x_train)
    fields = Fields(
        tuple(Field(name, tuple(v.shape[1:]), str(v.dtype)[6:]) for name, v in given.items())
    )
    train = fields.pack(given)
    if x_test is None:
        return fields, train, None
    held = _tensors("x_test", x_test)
    shapes = {n: (tuple(v.shape[1:]), str(v.dtype)[6:]) for n, v in held.items()}
    if shapes != {part.name: (part.shape, part.kind) for part in fields.parts}:
        raise ValueError(
            f"x_test must hold the inputs of x_train, {_shown(given)}, got {_shown(held)}"
        )
    return fields, train, fields.pack(held)


def _tensors(name: str, value: object) -> dict[str, Tensor]:
    if not isinstance(value, Mapping | tuple):
        kind = type(value).__name__
        raise ValueError(f"{name} must hold named inputs as x_train does, got {kind}")
    named: Mapping[Any, ArrayLike | Tensor]
    named = value if isinstance(value, Mapping) else {str(i): v for i, v in enumerate(value)}
    if not named:
        raise ValueError(f"{name} must hold at least one input, got none")
    tensors = {str(key): _plain(f"{name}[{key!r}]", part) for key, part in named.items()}
    if len({len(v) for v in tensors.values()}) > 1:
        raise ValueError(f"{name}: inputs must have equal numbers of records: {_shown(tensors)}")
    return tensors


def _plain(name: str, value: ArrayLike | Tensor) -> Tensor:
    tensor = torch.as_tensor(value).detach().cpu()
    if tensor.is_complex() or not tensor.ndim:
        raise ValueError(f"{name} must be real [N, ...], got {tensor.dtype} {list(tensor.shape)}")
    if tensor.is_floating_point():
        return tensor.float()
    return tensor if tensor.dtype == torch.bool else tensor.long()


def _shown(values: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{n} {str(v.dtype)[6:]} {list(v.shape)}" for n, v in values.items())


def as_arguments(fields: Fields, packed: Tensor) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
    """Positional and keyword arguments of a network for packed records [B, width]."""
    values = fields.unpack(packed)
    return (tuple(values.values()), {}) if fields.by_position else ((), values)
