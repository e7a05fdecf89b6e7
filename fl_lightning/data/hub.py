"""Data sets in the form of Hugging Face's package `datasets`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_lightning.data.arrays import Arrays, from_arrays


def from_hugging_face(
    dataset: Any,
    *,
    x: str = "image",
    y: str = "label",
    client: str | None = None,
    num_classes: int | None = None,
    name: str | None = None,
) -> Arrays:
    """The records of a `datasets.Dataset`, or of a `DatasetDict` with train and test splits.

    Args:
        dataset: the data set, in memory or on disk.
        x: column of the records: images (taken to [C, H, W] in [-1, 1] by 0.5/0.5; those with a
            palette to RGB first) or lists of numbers of one length (not rescaled).
        y: column of the labels, integers or names (see `from_arrays`).
        client: column that says who holds the record, for partition=natural.
        num_classes: public number of classes; None takes it from the label column's ClassLabel, or
            the largest label + 1.
        name: what to call the data in reports; None takes the data set's own name.

    Raises:
        ValueError: a column or the split train is missing, or records of different shapes.
    """
    splits = dataset if isinstance(dataset, Mapping) else {"train": dataset}
    if "train" not in splits:
        raise ValueError(f"dataset must have a split 'train', got {', '.join(splits)}")
    train, test = splits["train"], splits.get("test")
    for option, column in (("x", x), ("y", y), ("client", client)):
        if column is not None and column not in train.column_names:
            raise ValueError(
                f"{option}={column!r} is not a column: {', '.join(train.column_names)}"
            )
    if num_classes is None:
        num_classes = getattr(train.features[y], "num_classes", None)
    return from_arrays(
        _records(train[x], x),
        np.asarray(train[y]),
        None if test is None else _records(test[x], x),
        None if test is None else np.asarray(test[y]),
        num_classes=num_classes,
        name=name or getattr(train.info, "dataset_name", None) or "hugging_face",
        client=None if client is None else list(train[client]),
        client_test=_owners(test, client),
    )


def _owners(test: Any, client: str | None) -> list[Any] | None:
    """Who test records belong to, where they say so."""
    if test is None or client is None or client not in test.column_names:
        return None
    return list(test[client])


def hugging_face(
    path: str,
    *,
    config: str | None = None,
    x: str = "image",
    y: str = "label",
    client: str | None = None,
    num_classes: int | None = None,
) -> Arrays:
    """`datasets.load_dataset(path, config)` or, for a folder, `datasets.load_from_disk(path)`.

    Args:
        path: name of a data set, or a folder that `save_to_disk` wrote.
        config: name of its configuration.
        x: see `from_hugging_face`; also y, client and num_classes.
        y: see x.
        client: see x.
        num_classes: see x.

    Raises:
        ValueError: the package `datasets` is missing, or as `from_hugging_face`.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("source='hugging_face' needs the package datasets: install it") from error
    from pathlib import Path

    folder = Path(path).expanduser()
    saved = any((folder / f).is_file() for f in ("state.json", "dataset_dict.json"))
    loaded = datasets.load_from_disk(folder) if saved else datasets.load_dataset(path, config)
    return from_hugging_face(loaded, x=x, y=y, client=client, num_classes=num_classes)


def _records(column: Any, name: str) -> NDArray[np.float32]:
    rows = [_record(value) for value in column]
    shapes = {row.shape for row in rows}
    if len(shapes) != 1:
        raise ValueError(f"x={name!r} must hold records of one shape, got {sorted(shapes)}")
    return np.stack(rows)


def _record(value: Any) -> NDArray[np.float32]:
    if not hasattr(value, "getbands"):
        row = np.asarray(value, np.float32)
        return row if row.ndim else row[None]
    # What such an image stores is an index into its colours, or a bit.
    wanted = {"P": "RGB", "PA": "RGBA", "1": "L"}.get(value.mode)
    pixels = np.asarray(value if wanted is None else value.convert(wanted))
    if pixels.dtype != np.uint8:
        raise ValueError(f"images must have 8 bits a channel, got mode {value.mode!r}")
    channels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return ((channels / 255 - 0.5) / 0.5).astype(np.float32)
