"""Which records differ most: a few of them stand for all where something is tried out."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_RECORDS = 6
_LOOKED_THROUGH = 512


def different_records(x: Tensor, y: Tensor, most: int = MOST_RECORDS) -> list[int]:
    """Rows of records that differ most: in size, in entries that are not zero, and in label.

    Args:
        x: finite records [N, ...].
        y: their targets [N, ...].
        most: rows that are wanted; fewer where there are fewer records.
    """
    step = max(1, len(x) // _LOOKED_THROUGH)
    flat = x[::step].reshape(len(x[::step]), -1).float()
    norms, filled = flat.norm(dim=1), (flat != 0).sum(1)
    far = (flat - flat[norms.argmax()]).norm(dim=1).argmax()
    last = flat.flip(1).ne(0).int().argmax(1)  # trailing zeros: padding
    found = [norms.argmax(), norms.argmin(), far, filled.argmin(), filled.argmax(), last.argmax()]
    rows = [int(at) * step for at in found]
    if y.ndim == 1:
        rows += [int((y == label).int().argmax()) for label in y[::step].unique().tolist()[:most]]
    rows += torch.linspace(0, len(x) - 1, min(most, len(x))).long().tolist()
    rows += range(min(len(x), 2 * most))
    return list(dict.fromkeys(rows))[:most]
