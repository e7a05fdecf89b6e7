"""Texts of a table as token ids, by the tokenizer of a pretrained model."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fl_lightning.data.arrays import Arrays, from_arrays
from fl_lightning.data.utf8 import read_utf8

IGNORED = -100  # torch's ignore_index: a token that is no target
_TEST_STREAM = 2


def tokenized_text(
    path: str,
    text: str,
    label: str | None,
    tokenizer: str,
    *,
    max_tokens: int = 128,
    test_path: str | None = None,
    test_fraction: float = 0.0,
    client: str | None = None,
    classes: Sequence[str | int] | None = None,
) -> Arrays:
    """A CSV file (or .tsv, .tab) of texts: records of `input_ids` and `attention_mask`.

    Args:
        path: file of the training records, with a header row.
        text: column of the texts.
        label: column of the labels; null: the next token at every place (language modelling).
        tokenizer: name or local folder of a pretrained model; its vocabulary is public.
        max_tokens: tokens a record, at least 2; longer texts are cut, shorter ones padded.
        test_path: file of the test records, with the same columns.
        test_fraction: share of the rows of `path`, in [0, 1), held for the test instead: rows at
            random, the same in every run.
        client: column that says who holds the record, for partition=natural.
        classes: public values of the label in the order of their numbers; null takes the sorted
            values of the data, which count as public.

    Returns:
        Records of two int64 inputs [N, max_tokens]; labels int64 [N], or tokens [N, max_tokens]
        with -100 where there is no next one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the package transformers is missing, no such tokenizer, a column is missing, a
            label that is not among `classes`, or an argument out of range.
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens={max_tokens} must be >= 2")
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction={test_fraction} must lie in [0, 1)")
    if test_path is not None and test_fraction:
        raise ValueError(f"test_fraction={test_fraction} has no meaning with test_path")
    wanted = [column for column in (text, label, client) if column is not None]
    rows = _columns(Path(path).expanduser(), wanted)
    if test_path is not None:
        held = _columns(Path(test_path).expanduser(), wanted)
    else:
        rows, held = _divided(rows, test_fraction)
    encode = encoder_inputs(tokenizer, max_tokens)
    train, test = encode(rows[text]), encode(held[text])
    owned: dict[str, Any] = {}
    if client is not None:
        owned = {"client": rows[client], "client_test": held[client]}
    name = Path(path).stem
    if label is None:
        y, yt = _next_tokens(train), _next_tokens(test)
        return from_arrays(train, y, test, yt, name=name, **owned, targets="values")
    known = [str(c) for c in classes] if classes else sorted({*rows[label], *held[label]})
    y, yt = (_numbers(part[label], known, label) for part in (rows, held))
    return from_arrays(train, y, test, yt, num_classes=len(known), name=name, **owned)


def _columns(path: Path, wanted: Sequence[str]) -> dict[str, list[str]]:
    """The wanted columns of a table."""
    delimiter = "\t" if path.suffix in (".tsv", ".tab") else ","
    try:
        rows = list(csv.reader(io.StringIO(read_utf8(path), newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise ValueError(f"{path} is no table: {error}") from error
    rows = [row for row in rows if row]
    if len(rows) < 2:
        raise ValueError(f"{path} must have a header and at least one row, got {len(rows)} rows")
    header = rows[0]
    for column in wanted:
        if column not in header:
            raise ValueError(f"{column!r} is not a column of {path}: {', '.join(header)}")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise ValueError(f"{path}, row {number}: {len(row)} cells for {len(header)} columns")
    return {c: [row[header.index(c)] for row in rows[1:]] for c in wanted}


def _divided(
    rows: dict[str, list[str]], test_fraction: float
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    count = len(next(iter(rows.values())))
    order = np.random.default_rng(_TEST_STREAM).permutation(count)
    cut = round(test_fraction * count)
    test, train = np.sort(order[:cut]), np.sort(order[cut:])
    parts = [{c: [values[i] for i in at] for c, values in rows.items()} for at in (train, test)]
    return parts[0], parts[1]


def encoder_inputs(name: str, max_tokens: int) -> Callable[[list[str]], dict[str, Tensor]]:
    """What makes the inputs of a pretrained model of texts: ids and mask, int64 [N, max_tokens].

    Args:
        name: name or local folder of the model.
        max_tokens: tokens a text.

    Raises:
        ValueError: the package transformers is missing, or no such tokenizer.
    """
    tokenizer = pretrained_part("AutoTokenizer", name, "tokenizer")
    if tokenizer.pad_token is None:  # GPT-2 has none; what is padded counts nowhere
        tokenizer.pad_token = tokenizer.eos_token

    def encode(texts: list[str]) -> dict[str, Tensor]:
        empty = torch.empty(0, max_tokens, dtype=torch.int64)
        if not texts:
            return {"input_ids": empty, "attention_mask": empty}
        found = tokenizer(texts, truncation=True, max_length=max_tokens, padding="max_length")
        return {n: torch.tensor(found[n]) for n in ("input_ids", "attention_mask")}

    return encode


def pretrained_part(kind: str, name: str, argument: str, **options: Any) -> Any:
    """What `transformers` holds under a name or in a local folder.

    Args:
        kind: its class with `from_pretrained`.
        name: of the model, or a folder.
        argument: for errors.
        **options: of `from_pretrained`.

    Raises:
        ValueError: the package is missing, or it knows no such model.
    """
    try:
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"{argument}={name!r} needs the package transformers: install the extra pretrained"
        ) from error
    folder = Path(name).expanduser()
    try:
        return getattr(transformers, kind).from_pretrained(
            str(folder) if folder.is_dir() else name, **options
        )
    except (OSError, ValueError) as error:
        words = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        raise ValueError(f"{argument}={name!r}: no pretrained model can be had: {words}") from error


def _next_tokens(inputs: dict[str, Tensor]) -> Tensor:
    """The token after each place, -100 where padding or nothing comes."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    y = torch.full_like(ids, IGNORED)
    y[:, :-1] = torch.where(mask[:, 1:] > 0, ids[:, 1:], IGNORED)
    return y


def _numbers(labels: list[str], known: list[str], column: str) -> Tensor:
    number = {value: i for i, value in enumerate(known)}
    other = next((value for value in labels if value not in number), None)
    if other is not None:
        raise ValueError(f"label={column!r}: {other!r} is not among classes={known}")
    return torch.tensor([number[value] for value in labels], dtype=torch.int64)
