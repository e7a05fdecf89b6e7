"""Labels as users have them: class numbers from 0, or words; and what is said of all others."""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

_log = logging.getLogger("pytorch_lightning")


def class_numbers(name: str, value: ArrayLike | Tensor) -> Tensor:
    """int64 [N] on the CPU, from integers of any size.

    Args:
        name: of the argument, for errors.
        value: the labels.

    Raises:
        ValueError: they are no integers, or not one a record.
    """
    try:
        y = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} must hold integers, one a record, got {_shown(value)}: {error}"
        ) from error
    _check_shape(name, y)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, got {y.dtype}{_advice(y)}")
    return y.to(torch.int64)


def check_labels(name: str, y: Tensor, num_classes: int) -> None:
    """Refuse labels that are no class numbers from 0.

    Args:
        name: of the argument.
        y: labels.
        num_classes: public number of classes.

    Raises:
        ValueError: wrong dtype or shape, or a label that is not in [0, num_classes).
    """
    _check_shape(name, y)
    if y.dtype != torch.int64:
        raise ValueError(f"{name} must be int64 [N], got {y.dtype} {list(y.shape)}")
    if not len(y) or 0 <= int(y.min()) <= int(y.max()) < num_classes:
        return
    low, high = int(y.min()), int(y.max())
    advice = "number classes from 0"
    if low > 0:
        advice += f" (take {low} from each label)"
    elif low < 0:
        advice += " (-1 and 1 become 0 and 1: (y + 1) // 2)" if (low, high) == (-1, 1) else ""
    else:
        advice = f"give num_classes={high + 1} or more"
    raise ValueError(
        f"{name} must lie in [0, num_classes={num_classes}): labels go from {low} to {high}; "
        f"{advice}"
    )


def real_values(name: str, value: ArrayLike | Tensor) -> Tensor:
    """Targets that are no classes, on the CPU: float32, or int64 where they are integers.

    Args:
        name: of the argument, for errors.
        value: the targets [N, ...].

    Raises:
        ValueError: they are no numbers, complex, or one number for all records.
    """
    try:
        y = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must hold numbers, got {_shown(value)}: {error}") from error
    y = y if y.is_complex() else y.to(torch.float32 if _is_real(y) else torch.int64)
    check_values(name, y)
    return y


def _is_real(y: Tensor) -> bool:
    return y.is_floating_point() or y.dtype == torch.bool


def check_values(name: str, y: Tensor) -> None:
    """Refuse targets of another kind than float32 or int64 [N, ...], and numbers that are none.

    Raises:
        ValueError: naming the argument.
    """
    if y.dtype not in (torch.float32, torch.int64) or not y.ndim:
        raise ValueError(f"{name} must be float32 or int64 [N, ...], got {y.dtype} {list(y.shape)}")
    bad = int((~y.isfinite()).reshape(len(y), -1).any(1).sum()) if len(y) else 0
    if bad:
        raise ValueError(
            f"{name} must be finite, but {bad} of {len(y)} records have NaN or infinity"
        )


def _check_shape(name: str, y: Tensor) -> None:
    if y.ndim == 1:
        return
    advice = "one label a record"
    if y.ndim == 2 and y.shape[1] == 1:
        advice += f": give {name}.reshape(-1)"
    elif y.ndim == 2 and len(y):
        ones = bool(((y == 0) | (y == 1)).all()) and bool((y.sum(1) == 1).all())
        advice += f": these are one-hot, give {name}.argmax(1)" if ones else ""
    raise ValueError(f"{name} must be [N], got shape {list(y.shape)}; give {advice}")


def _advice(y: Tensor) -> str:
    """What to do about labels that are no integers."""
    if y.dtype == torch.bool:
        return "; give y.astype(int), 0 for False and 1 for True"
    if y.is_complex():
        return ""
    if bool(y.isnan().any()):
        return f"; {int(y.isnan().sum())} of {len(y)} are NaN: give every record a label"
    if bool((y == y.round()).all()):
        return "; they are whole numbers: give y.astype(int)"
    return "; classes are numbered from 0; give targets='values' for targets that are no classes"


def _shown(value: object) -> str:
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


def named_labels(
    train: ArrayLike | Tensor, test: ArrayLike | Tensor | None
) -> tuple[tuple[str, ...], Tensor, Tensor | None] | None:
    """Numbers for labels that are words: their places in the sorted list of all words.

    The words count as public, like the number of classes.

    Args:
        train: [N], labels of the training records.
        test: [M], labels of the test records; None where there are none.

    Returns:
        The words, and int64 [N] and [M]; None where labels are no words.

    Raises:
        ValueError: words beside numbers, or nearly as many words as records.
    """
    given = [c if isinstance(c, Tensor) else np.asarray(c) for c in (train, test) if c is not None]
    columns = [c.ravel().tolist() for c in given]
    values = [value for column in columns for value in column]
    words = [value for value in values if isinstance(value, str)]
    if not words:
        return None
    if len(words) < len(values):
        other = next(value for value in values if not isinstance(value, str))
        raise ValueError(
            f"labels must be integers or words, not both: got {words[0]!r} and {other!r}"
        )
    names = tuple(sorted(set(words)))
    if len(names) > max(2, len(words) // 2):
        raise ValueError(
            f"labels: {len(names)} different words for {len(words)} records, such as "
            f"{names[0]!r}: is that column the label?"
        )
    number = {name: i for i, name in enumerate(names)}
    shown = ", ".join(f"{name!r} is {i}" for name, i in list(number.items())[:20])
    _log.info(f"labels are words, which are taken as public and numbered in order: {shown}")
    first, *rest = (torch.tensor([number[v] for v in c], dtype=torch.int64) for c in columns)
    return names, first, rest[0] if rest else None
