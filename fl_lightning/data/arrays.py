"""The records of all clients in memory, and how to make them from a user's own arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fl_lightning.data.fields import Fields, named_inputs
from fl_lightning.data.labels import (
    check_labels,
    check_values,
    class_numbers,
    named_labels,
    real_values,
)


@dataclass(frozen=True, eq=False)
class Arrays:
    """One data set in memory. Everything but the shapes and `num_classes` is private.

    Args:
        x_train: float32 [N, ...], training records; NaN and infinity are allowed. Or int64: codes
            such as characters.
        y_train: int64 [N], labels in [0, num_classes). With num_classes=0 targets that are no
            classes, float32 or int64 [N, ...]: numbers, several labels a record, tokens.
        x_test: float32 [M, ...], records for the final test only; M = 0 for none.
        y_test: as y_train, for M records.
        num_classes: public number of classes; 0 where targets are no classes.
        name: what to call the data in reports.
        client_train: int64 [N], who each training record belongs to, 0 to G - 1; None where the
            data does not say. Public, like the partition that it makes.
        fields: the named inputs that a record is packed from; None where it is one array. Public.
        client_test: int64 [M], who each test record belongs to, -1 for somebody else; None where
            the data does not say.

    Raises:
        ValueError: wrong dtype, lengths or record shapes that differ, a label out of range, or a
            client id that no training record has.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    name: str
    client_train: Tensor | None = None
    fields: Fields | None = None
    client_test: Tensor | None = None

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            x, y = getattr(self, f"x_{split}"), getattr(self, f"y_{split}")
            if x.dtype not in (torch.float32, torch.int64) or x.ndim < 2:
                raise ValueError(
                    f"x_{split} must be float32 or int64 [N, ...], got {x.dtype} {list(x.shape)}"
                )
            if self.num_classes:
                check_labels(f"y_{split}", y, self.num_classes)
            else:
                check_values(f"y_{split}", y)
            if len(x) != len(y):
                raise ValueError(f"x_{split} has {len(x)} records but y_{split} has {len(y)}")
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise ValueError(
                f"x_test must hold records of shape {list(self.x_train.shape[1:])}, "
                f"got {list(self.x_test.shape[1:])}"
            )
        if self.x_train.dtype != self.x_test.dtype:
            raise ValueError(f"x_test must be {self.x_train.dtype}, got {self.x_test.dtype}")
        if self.y_train.dtype != self.y_test.dtype:
            raise ValueError(f"y_test must be {self.y_train.dtype}, got {self.y_test.dtype}")
        if self.y_train.shape[1:] != self.y_test.shape[1:]:
            raise ValueError(
                f"y_test must hold targets of shape {list(self.y_train.shape[1:])}, "
                f"got {list(self.y_test.shape[1:])}"
            )
        if self.client_train is not None:
            _check_clients(self.client_train, len(self.x_train))
        if self.client_test is not None:
            _check_test_clients(self.client_test, self.client_train, len(self.x_test))


def _check_clients(ids: Tensor, num_records: int) -> None:
    if ids.dtype != torch.int64 or tuple(ids.shape) != (num_records,):
        raise ValueError(
            f"client_train must be int64 [{num_records}], got {ids.dtype} {list(ids.shape)}"
        )
    if len(ids) and (int(ids.min()) < 0 or not bool((ids.bincount() > 0).all())):
        raise ValueError(
            f"client_train must use every id from 0 to its largest, got {int(ids.min())} to "
            f"{int(ids.max())} with {len(ids.unique())} different ones"
        )


def _check_test_clients(ids: Tensor, known: Tensor | None, num_records: int) -> None:
    if known is None:
        raise ValueError("client_test needs client_train, whose numbers it uses")
    if ids.dtype != torch.int64 or tuple(ids.shape) != (num_records,):
        raise ValueError(
            f"client_test must be int64 [{num_records}], got {ids.dtype} {[*ids.shape]}"
        )
    if len(ids) and not -1 <= int(ids.min()) <= int(ids.max()) <= int(known.max()):
        raise ValueError(
            f"client_test must use the ids of client_train, 0 to {int(known.max())}, or -1, got "
            f"{int(ids.min())} to {int(ids.max())}"
        )


def client_ids(
    column: Sequence[object] | ArrayLike | Tensor,
    known: Sequence[object] | ArrayLike | Tensor | None = None,
) -> Tensor:
    """int64 [N] in order of first appearance, from any column: names, numbers or a tensor.

    Args:
        column: one value a record.
        known: the column whose first appearances count; others are -1. None: `column` itself.
    """
    values = _listed(column)
    first = values if known is None else _listed(known)
    ids = {value: i for i, value in enumerate(dict.fromkeys(first))}
    return torch.tensor([ids.get(value, -1) for value in values], dtype=torch.int64)


def _listed(column: Sequence[object] | ArrayLike | Tensor) -> list[object]:
    return column.tolist() if isinstance(column, Tensor | np.ndarray) else list(column)  # pyright: ignore[reportArgumentType]


def _records(name: str, value: ArrayLike | Tensor, codes: bool) -> Tensor:
    x = torch.as_tensor(value)
    if x.is_complex():
        raise ValueError(f"{name} must hold real numbers, got {x.dtype}")
    whole = torch.int64 if codes else torch.float32
    if codes and x.is_floating_point():
        raise ValueError(f"{name} must hold integer codes, got {x.dtype}")
    return x.detach().to("cpu", whole)


def from_arrays(
    x_train: ArrayLike | Tensor | Mapping[str, ArrayLike | Tensor] | tuple[ArrayLike | Tensor, ...],
    y_train: ArrayLike | Tensor,
    x_test: ArrayLike
    | Tensor
    | Mapping[str, ArrayLike | Tensor]
    | tuple[ArrayLike | Tensor, ...]
    | None = None,
    y_test: ArrayLike | Tensor | None = None,
    *,
    num_classes: int | None = None,
    name: str = "arrays",
    client: Sequence[object] | ArrayLike | Tensor | None = None,
    client_test: Sequence[object] | ArrayLike | Tensor | None = None,
    codes: bool = False,
    targets: Literal["classes", "values"] = "classes",
) -> Arrays:
    """A user's own data: `FederatedDataModule(from_arrays(x, y), num_clients=10)`.

    Args:
        x_train: real numbers [N, ...], taken as float32 and not rescaled. A network with several
            inputs takes a mapping from its argument names to arrays, such as
            `{"input_ids": ids, "attention_mask": mask}`, or a tuple by position; of these integers
            stay int64 and bools bools.
        y_train: integers [N]; or words, which are public and numbered in their sorted order.
        x_test: as x_train, for M records; None for no test records.
        y_test: as y_train, [M]; given exactly when x_test is.
        num_classes: public number of classes; None takes the largest label + 1, which looks at
            the labels.
        name: what to call the data in reports.
        client: [N], who each training record belongs to: names or numbers; for partition=natural.
        client_test: [M], who each test record belongs to, in the names of `client`; for the test of
            personal layers.
        codes: whether records are integer codes (int64), such as characters for an embedding.
        targets: classes; or values, for y that is given to the loss as it is, [N, ...]: real
            numbers (regression), 0 and 1 for each label (several labels a record), or integers
            (tokens, with the loss's ignore_index where there is none).

    Raises:
        ValueError: as `Arrays`, labels that are not integers, only one of x_test and y_test, or
            client_test without client.
    """
    if (x_test is None) != (y_test is None):
        missing = "x_test" if x_test is None else "y_test"
        raise ValueError(f"{missing} is None: give both x_test and y_test, or neither")
    if targets == "values" and num_classes:
        raise ValueError(f"num_classes={num_classes} has no meaning with targets='values'")
    packed = named_inputs(x_train, x_test)
    fields, x, xt = packed or (None, _records("x_train", x_train, codes), None)  # pyright: ignore[reportArgumentType]
    if packed is None and x_test is not None:
        xt = _records("x_test", x_test, codes)  # pyright: ignore[reportArgumentType]
    xt = x[:0] if xt is None else xt
    y, yt, count = _targets(y_train, y_test, num_classes, targets)
    if client_test is not None and client is None:
        raise ValueError("client_test needs client, whose names it uses")
    owner = None if client is None else client_ids(client)
    test_owner = None if client_test is None else client_ids(client_test, client)
    return Arrays(x, y, xt, yt, count, name, owner, fields, test_owner)


def _targets(
    y_train: ArrayLike | Tensor,
    y_test: ArrayLike | Tensor | None,
    num_classes: int | None,
    targets: str,
) -> tuple[Tensor, Tensor, int]:
    """Targets of training and test records, and the number of classes."""
    if targets == "values":
        y = real_values("y_train", y_train)
        return y, y[:0] if y_test is None else real_values("y_test", y_test), 0
    if named := named_labels(y_train, y_test):
        names, y_train, y_test = named
        num_classes = len(names) if num_classes is None else num_classes
    y = class_numbers("y_train", y_train)
    yt = y[:0] if y_test is None else class_numbers("y_test", y_test)
    if num_classes is None:
        num_classes = max((int(labels.max()) + 1 for labels in (y, yt) if len(labels)), default=1)
    return y, yt, num_classes
