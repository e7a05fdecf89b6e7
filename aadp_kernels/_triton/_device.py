"""Small tables on their way to the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from aadp_kernels._torch.rng import signed32

# A replayed CUDA graph copies again from the memory that it was captured with.
_CAPTURED: list[Tensor] = []


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device; the host does not wait."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    pinned = tensor.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _CAPTURED.append(pinned)
    return pinned.to(device, non_blocking=True)


@lru_cache(maxsize=16)
def key_tensor(words: Sequence[int], device: torch.device) -> Tensor:
    """Secret. The key as int32 words on the device; `words` is a tuple."""
    return to_device(np.array([signed32(w) for w in words], dtype=np.int32), device)


def step_tensor(step: int | Tensor, device: torch.device) -> Tensor:
    """The step as a 0-d int64 tensor on the device; one that lies there is used as it is."""
    if isinstance(step, Tensor):
        return step.to(device=device, dtype=torch.int64)
    return torch.full((), step, dtype=torch.int64, device=device)


@lru_cache
def sm_count(device: torch.device) -> int:
    """Multiprocessors of the device; one for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
