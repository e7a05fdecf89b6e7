"""Tables in CSV files."""

from __future__ import annotations

import csv as _csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_lightning.data.arrays import Arrays, from_arrays
from fl_lightning.data.utf8 import read_utf8


def csv(
    path: str,
    label: str,
    *,
    test_path: str | None = None,
    client: str | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    num_classes: int | None = None,
) -> Arrays:
    """A table with a header row: records [N, columns], integer labels, and who holds which row.

    Args:
        path: CSV file of the training records.
        label: column of the labels: integers from 0, or words, which are public and numbered in
            their sorted order.
        test_path: CSV file of the test records, with the same header; None for none.
        client: column that says who holds the record (names or numbers), for partition=natural.
        ranges: public [low, high] of a column, mapped to [-1, 1] and clipped there. Columns that
            are not named stay as they are. Ranges taken from the data would not be private.
        num_classes: public number of classes; None takes the largest label + 1, which looks at the
            labels.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file that is not UTF-8 or no table, a column that is missing, a cell that is
            not a number (names row and column; an empty cell is NaN), labels of which some are
            integers and some are not, or an impossible range.
    """
    names, x, y, owner = _table(Path(path).expanduser(), label, client)
    limits = _limits(names, ranges or {}, path)
    xt = yt = None
    if test_path is not None:
        test_names, xt, yt, _ = _table(Path(test_path).expanduser(), label, client)
        if test_names != names:
            raise ValueError(f"test_path={test_path!r} must have the columns of path={path!r}")
        xt = _scaled(xt, limits)
    return from_arrays(
        _scaled(x, limits), y, xt, yt, num_classes=num_classes, name=Path(path).stem, client=owner
    )


def _table(
    path: Path, label: str, client: str | None
) -> tuple[list[str], NDArray[np.float64], NDArray[Any], list[str] | None]:
    try:
        rows = list(_csv.reader(io.StringIO(read_utf8(path), newline="")))
    except _csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error
    if len(rows) < 2:
        raise ValueError(f"{path} must have a header and at least one row, got {len(rows)} rows")
    header = rows[0]
    for name, column in (("label", label), ("client", client)):
        if column is not None and column not in header:
            raise ValueError(f"{name}={column!r} is not a column of {path}: {', '.join(header)}")
    special = {label, client}
    chosen = [i for i, column in enumerate(header) if column not in special]
    if not chosen:
        raise ValueError(f"{path} has no columns of numbers, only {', '.join(header)}")
    x = np.empty((len(rows) - 1, len(chosen)))
    for i, row in enumerate(rows[1:]):
        if len(row) != len(header):
            raise ValueError(f"{path}, row {i + 2}: {len(row)} cells for {len(header)} columns")
        x[i] = [_number(row[j], path, i + 2, header[j]) for j in chosen]
    y = _label_column([row[header.index(label)] for row in rows[1:]], path, label)
    owner = None if client is None else [row[header.index(client)] for row in rows[1:]]
    return [header[i] for i in chosen], x, y, owner


def _label_column(cells: list[str], path: Path, label: str) -> NDArray[Any]:
    """Integers [N], or words [N] where no cell is a number."""
    if all(cell.strip() and not _is_number(cell) for cell in cells):
        return np.array([cell.strip() for cell in cells])
    numbers = np.empty(len(cells), np.int64)
    for row, cell in enumerate(cells, 2):
        value = _number(cell, path, row, label)
        if not value.is_integer():
            shown = cell.strip() or "an empty cell"
            raise ValueError(f"{path}, row {row}: label must be an integer, got {shown}")
        numbers[row - 2] = int(value)
    return numbers


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _number(cell: str, path: Path, row: int, column: str) -> float:
    try:
        return float(cell) if cell.strip() else math.nan
    except ValueError:
        raise ValueError(f"{path}, row {row}, column {column!r}: {cell!r} is no number") from None


def _limits(
    names: list[str], ranges: Mapping[str, tuple[float, float]], path: str
) -> NDArray[np.float64]:
    """float64 [2, columns]; [-1, 1] for a column that stays as it is, marked by NaN."""
    limits = np.full((2, len(names)), np.nan)
    for column, (low, high) in ranges.items():
        if column not in names:
            raise ValueError(f"ranges: {column!r} is not a column of {path}: {', '.join(names)}")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"ranges: {column!r} must be finite, low < high, got {low}, {high}")
        limits[:, names.index(column)] = low, high
    return limits


def _scaled(x: NDArray[np.float64], limits: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = limits
    scaled = np.clip((x - low) / (high - low) * 2 - 1, -1, 1)
    return np.where(np.isnan(low), x, scaled)
