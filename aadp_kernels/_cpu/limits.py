"""What a rule says of records, as kernels take it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aadp_kernels.certified import largest
from aadp_kernels.contract import ClipRule


class Limits(NamedTuple):
    """Which records count, bool [K, B], clip norms [K] and thresholds of votes [K], NaN for none.

    In the order in which kernels take them.
    """

    mask: np.ndarray
    clip: np.ndarray
    votes_at: np.ndarray


def limits_of(rule: ClipRule) -> Limits:
    """The limits of a rule."""
    return Limits(array_of(rule.mask), array_of(rule.clip), levels(rule.votes_at, len(rule.mask)))


def limits_of_one(clip: Tensor, mask: Tensor | None, votes_at: Tensor | None, batch: int) -> Limits:
    """The limits of one client: clip [], mask [B] or [1], votes_at [] or None."""
    if mask is None:
        live = _everyone(batch)
    else:
        live = array_of((mask != 0).expand(1, batch))
    level = math.nan if votes_at is None else float(votes_at)
    return Limits(live, np.array([float(clip)]), np.array([level]))


@lru_cache(maxsize=64)
def _everyone(batch: int) -> np.ndarray:
    return np.ones((1, batch), np.bool_)


def levels(votes_at: Tensor | None, clients: int) -> np.ndarray:
    """Vote thresholds [K], NaN for no votes."""
    return _no_votes(clients) if votes_at is None else array_of(votes_at)


@lru_cache(maxsize=64)
def _no_votes(clients: int) -> np.ndarray:
    return np.full(clients, np.nan)


def array_of(x: Tensor) -> np.ndarray:
    """A small tensor as the one kind of array that kernels are compiled for, never 0-d."""
    array = np.ascontiguousarray(x.detach().numpy())
    return array if array.dtype == np.bool_ else array.astype(np.float64, copy=False)


def numpy_dtype(x: Tensor) -> np.dtype:
    """float32 or float64."""
    return _DTYPES[x.dtype]


def rounding(dtype: torch.dtype) -> tuple[float, float]:
    """Bound on the norms of finite records, and a factor that covers a factor's own rounding."""
    return _ROUNDING[dtype]


_DTYPES = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}
_ROUNDING = {t: (largest(t), 1 - 2 * torch.finfo(t).eps) for t in _DTYPES}
