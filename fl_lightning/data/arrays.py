"""The records of all clients in memory, and how to make them from a user's own arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fl_lightning.data.labels import check_labels, class_numbers, named_labels


@dataclass(frozen=True, eq=False)
class Arrays:
    """One data set in memory. Everything but the shapes and `num_classes` is private.

    Args:
        x_train: float32 [N, ...], training records; NaN and infinity are allowed. Or int64: codes
            such as characters.
        y_train: int64 [N], labels in [0, num_classes).
        x_test: float32 [M, ...], records for the final test only; M = 0 for none.
        y_test: int64 [M].
        num_classes: public number of classes.
        name: what to call the data in reports.
        client_train: int64 [N], who each training record belongs to, 0 to G - 1; None where the
            data does not say. Public, like the partition that it makes.

    Raises:
        ValueError: wrong dtype, lengths or record shapes that differ, a label out of range, or a
            client id that no record has.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    name: str
    client_train: Tensor | None = None

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            x, y = getattr(self, f"x_{split}"), getattr(self, f"y_{split}")
            if x.dtype not in (torch.float32, torch.int64) or x.ndim < 2:
                raise ValueError(
                    f"x_{split} must be float32 or int64 [N, ...], got {x.dtype} {list(x.shape)}"
                )
            check_labels(f"y_{split}", y, self.num_classes)
            if len(x) != len(y):
                raise ValueError(f"x_{split} has {len(x)} records but y_{split} has {len(y)}")
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise ValueError(
                f"x_test must hold records of shape {list(self.x_train.shape[1:])}, "
                f"got {list(self.x_test.shape[1:])}"
            )
        if self.x_train.dtype != self.x_test.dtype:
            raise ValueError(f"x_test must be {self.x_train.dtype}, got {self.x_test.dtype}")
        if self.client_train is not None:
            _check_clients(self.client_train, len(self.x_train))


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


def client_ids(column: Sequence[object] | ArrayLike | Tensor) -> Tensor:
    """int64 [N] in order of first appearance, from any column: names, numbers or a tensor."""
    values = column.tolist() if isinstance(column, Tensor | np.ndarray) else list(column)  # pyright: ignore[reportArgumentType]
    ids = {value: i for i, value in enumerate(dict.fromkeys(values))}
    return torch.tensor([ids[value] for value in values], dtype=torch.int64)


def _records(name: str, value: ArrayLike | Tensor, codes: bool) -> Tensor:
    x = torch.as_tensor(value)
    if x.is_complex():
        raise ValueError(f"{name} must hold real numbers, got {x.dtype}")
    whole = torch.int64 if codes else torch.float32
    if codes and x.is_floating_point():
        raise ValueError(f"{name} must hold integer codes, got {x.dtype}")
    return x.detach().to("cpu", whole)


def from_arrays(
    x_train: ArrayLike | Tensor,
    y_train: ArrayLike | Tensor,
    x_test: ArrayLike | Tensor | None = None,
    y_test: ArrayLike | Tensor | None = None,
    *,
    num_classes: int | None = None,
    name: str = "arrays",
    client: Sequence[object] | ArrayLike | Tensor | None = None,
    codes: bool = False,
) -> Arrays:
    """A user's own data: `FederatedDataModule(from_arrays(x, y), num_clients=10)`.

    Args:
        x_train: real numbers [N, ...], taken as float32 and not rescaled.
        y_train: integers [N]; or words, which are public and numbered in their sorted order.
        x_test: real numbers [M, ...]; None for no test records.
        y_test: as y_train, [M]; given exactly when x_test is.
        num_classes: public number of classes; None takes the largest label + 1, which looks at
            the labels.
        name: what to call the data in reports.
        client: [N], who each training record belongs to: names or numbers; for partition=natural.
        codes: whether records are integer codes (int64), such as characters for an embedding.

    Raises:
        ValueError: as `Arrays`, labels that are not integers, or only one of x_test and y_test.
    """
    if (x_test is None) != (y_test is None):
        missing = "x_test" if x_test is None else "y_test"
        raise ValueError(f"{missing} is None: give both x_test and y_test, or neither")
    if named := named_labels(y_train, y_test):
        names, y_train, y_test = named
        num_classes = len(names) if num_classes is None else num_classes
    x, y = _records("x_train", x_train, codes), class_numbers("y_train", y_train)
    xt = x[:0] if x_test is None else _records("x_test", x_test, codes)
    yt = y[:0] if y_test is None else class_numbers("y_test", y_test)
    if num_classes is None:
        num_classes = max((int(labels.max()) + 1 for labels in (y, yt) if len(labels)), default=1)
    owner = None if client is None else client_ids(client)
    return Arrays(x, y, xt, yt, num_classes, name, owner)
