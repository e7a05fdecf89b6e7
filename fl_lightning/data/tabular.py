"""Tables in CSV files."""

from __future__ import annotations

import csv as _csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_lightning.data.arrays import Arrays, from_arrays
from fl_lightning.data.utf8 import read_utf8


@dataclass(frozen=True)
class _Reading:
    """What of a table is read and how: the arguments of `csv` of these names."""

    label: str
    classes: Sequence[str] | None
    client: str | None
    columns: Sequence[str] | None
    categories: Mapping[str, Sequence[str]]
    ranges: Mapping[str, tuple[float, float]]


def csv(
    path: str,
    label: str,
    *,
    test_path: str | None = None,
    test_fraction: float = 0.0,
    client: str | None = None,
    columns: Sequence[str] | None = None,
    categories: Mapping[str, Sequence[str | int]] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    classes: Sequence[str | int] | None = None,
    num_classes: int | None = None,
) -> Arrays:
    """A table with a header row: records [N, columns], integer labels, and who holds which row.

    Args:
        path: CSV file of the training records.
        label: column of the labels: integers from 0, or words, which are public and numbered in
            their sorted order.
        test_path: CSV file of the test records, with the same header; None for none.
        test_fraction: share of the rows of `path`, in [0, 1), held for the test instead: rows at
            random, the same in every run.
        client: column that says who holds the record (names or numbers), for partition=natural.
        columns: columns that make a record; None for all but label and client.
        categories: public values of a column, which becomes a column for each value, 1 where the
            cell has it and 0 elsewhere. Values taken from the data would not be private.
        ranges: public [low, high] of a column, mapped to [-1, 1] and clipped there. Columns that
            are not named stay as they are. Ranges taken from the data would not be private.
        classes: public values of the label in the order of their numbers, where these are neither
            integers from 0 nor words in their sorted order.
        num_classes: public number of classes; None takes that of `classes`, else the largest
            label + 1, which looks at the labels.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file that is not UTF-8 or no table, a column that is missing, a cell that is
            no number (an empty one is NaN) or none of its column's values (names row and column),
            labels of which some are integers and some are not, an impossible range or fraction,
            or two arguments that exclude each other.
    """
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction={test_fraction} must lie in [0, 1)")
    if test_fraction and test_path is not None:
        raise ValueError(f"test_fraction={test_fraction} has no meaning with test_path")
    if classes is not None and num_classes is not None:
        raise ValueError(f"num_classes={num_classes} has no meaning with classes")
    known = {c: _public(f"categories: {c!r}", values) for c, values in (categories or {}).items()}
    if classes is not None:
        classes = _public("classes", classes)
        num_classes = len(classes)
    for column, (low, high) in (ranges or {}).items():
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"ranges: {column!r} must be finite, low < high, got {low}, {high}")
    reading = _Reading(label, classes, client, columns, known, ranges or {})
    names, x, y, owner = _table(Path(path).expanduser(), reading)
    xt = yt = test_owner = None
    if test_path is not None:
        test_names, xt, yt, test_owner = _table(Path(test_path).expanduser(), reading)
        if test_names != names:
            raise ValueError(f"test_path={test_path!r} must have the columns of path={path!r}")
    elif test_fraction:
        held = round(test_fraction * len(x))
        order = np.random.default_rng(0).permutation(len(x))
        test, train = np.sort(order[:held]), np.sort(order[held:])
        xt, yt, x, y = x[test], y[test], x[train], y[train]
        test_owner = None if owner is None else [owner[i] for i in test]
        owner = None if owner is None else [owner[i] for i in train]
    return from_arrays(
        x, y, xt, yt, num_classes=num_classes, name=Path(path).stem, client=owner,
        client_test=test_owner,
    )  # fmt: skip


def _public(name: str, values: Sequence[str | int]) -> list[str]:
    """Public values as cells have them."""
    cells = [str(value).strip() for value in values]
    if len(cells) < 2 or len(set(cells)) < len(cells):
        raise ValueError(f"{name} must be two different values or more, got {list(values)}")
    return cells


def _table(
    path: Path, reading: _Reading
) -> tuple[list[str], NDArray[np.float64], NDArray[Any], list[str] | None]:
    """Names of the columns that make a record, records, labels, and who holds which."""
    try:
        rows = list(_csv.reader(io.StringIO(read_utf8(path), newline="")))
    except _csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error
    if len(rows) < 2:
        raise ValueError(f"{path} must have a header and at least one row, got {len(rows)} rows")
    header = rows.pop(0)
    chosen = _chosen(header, reading, path)
    for i, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(f"{path}, row {i}: {len(row)} cells for {len(header)} columns")

    def cells(place: int) -> list[str]:
        return [row[place] for row in rows]

    x = np.concatenate([_record_part(cells(i), path, header[i], reading) for i in chosen], axis=1)
    labels = cells(header.index(reading.label))
    if reading.classes is None:
        y = _label_column(labels, path, reading.label)
    else:
        y = _places(labels, path, reading.label, reading.classes)
    owner = None if reading.client is None else cells(header.index(reading.client))
    return [header[i] for i in chosen], x, y, owner


def _chosen(header: list[str], reading: _Reading, path: Path) -> list[int]:
    """Places of the columns that make a record."""
    label, client, columns = reading.label, reading.client, reading.columns
    asked = [("label", label)] + ([] if client is None else [("client", client)])
    for name, column in asked + [("columns", c) for c in columns or ()]:
        if column not in header:
            raise ValueError(f"{name}={column!r} is not a column of {path}: {', '.join(header)}")
    if columns is None:
        chosen = [i for i, column in enumerate(header) if column not in (label, client)]
    elif label in columns or len(set(columns)) < len(columns):
        raise ValueError(f"columns={list(columns)} must be different ones without label={label!r}")
    else:
        chosen = [header.index(column) for column in columns]
    names = [header[i] for i in chosen]
    if not chosen:
        raise ValueError(f"{path} has no columns of numbers, only {', '.join(header)}")
    for name, options in (("ranges", reading.ranges), ("categories", reading.categories)):
        for column in options:
            if column not in names:
                raise ValueError(
                    f"{name}: {column!r} is not a column of {path}: {', '.join(names)}"
                )
    both = set(reading.ranges) & set(reading.categories)
    if both:
        raise ValueError(f"ranges: {min(both)!r} has categories")
    return chosen


def _record_part(
    cells: list[str], path: Path, column: str, reading: _Reading
) -> NDArray[np.float64]:
    """float64 [N, 1], or [N, values] of a column with categories."""
    if column in reading.categories:
        values = reading.categories[column]
        return np.eye(len(values))[_places(cells, path, column, values)]
    x = np.array([[_number(cell, path, row, column)] for row, cell in enumerate(cells, 2)])
    if column not in reading.ranges:
        return x
    low, high = reading.ranges[column]
    return np.clip((x - low) / (high - low) * 2 - 1, -1, 1)


def _places(cells: list[str], path: Path, column: str, values: Sequence[str]) -> NDArray[np.int64]:
    """int64 [N], where each cell stands among the public values."""
    number = {value: i for i, value in enumerate(values)}
    places = np.empty(len(cells), np.int64)
    for row, cell in enumerate(cells, 2):
        if cell.strip() not in number:
            shown = ", ".join(values)
            raise ValueError(f"{path}, row {row}, column {column!r}: {cell!r} is none of {shown}")
        places[row - 2] = number[cell.strip()]
    return places


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
