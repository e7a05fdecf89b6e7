"""Launches kernels on a device, and copies small tables there without waiting for it.

PyTorch has one current device a thread. A launch goes to its stream, and questions about a capture
are about its stream, wherever the tensors lie: so both are asked inside `on(device)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadp_kernels.addresses import signed32
from aadp_kernels.contract import Noise

MAX_PROGRAMS = (1 << 31) - 1  # of a grid along its first axis
MAX_ROWS = (1 << 16) - 1  # along its second

# A replayed CUDA graph copies again from the memory that it was captured with: kept by content, so
# that many captures of one thing keep it once.
_CAPTURED: dict[bytes, Tensor] = {}


def on(device: torch.device) -> AbstractContextManager:
    """Makes the device of some tensors the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, /, *arguments: Any, **constants: Any
) -> None:
    """Run a kernel on the current stream of the device that its tensors lie on."""
    if torch.version.hip is not None:
        constants.pop("maxnreg", None)  # NVIDIA's assembler alone knows it
    with on(device):
        kernel[grid](*arguments, **constants)


def slices(count: int, at_once: int) -> Iterator[slice]:
    """0 .. count - 1 in runs of at most `at_once`: more than a grid holds takes more launches."""
    return (slice(start, start + at_once) for start in range(0, count, at_once))


def _capturing(device: torch.device) -> bool:
    """Whether the device's current stream is being captured."""
    with on(device):
        return torch.cuda.is_current_stream_capturing()


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device; the host does not wait."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    if not _capturing(device):
        return tensor.pin_memory().to(device, non_blocking=True)
    name = sha256(array.dtype.str.encode() + str(array.shape).encode() + array.tobytes()).digest()
    if name not in _CAPTURED:
        _CAPTURED[name] = tensor.pin_memory()
    return _CAPTURED[name].to(device, non_blocking=True)


def stream_name(device: torch.device) -> int | None:
    """Names what may be reused: tables of this stream; None while a graph is captured."""
    if device.type != "cuda":
        return 0
    if _capturing(device):
        return None
    return torch.cuda.current_stream(device).cuda_stream


def per_stream(maxsize: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`lru_cache` of tables on the device that is the last argument, for each stream its own.

    Another stream's copy may be under way, and a captured one has not run yet.
    """

    def decorate(make: Callable[..., Any]) -> Callable[..., Any]:
        cached = lru_cache(maxsize)(lambda _, *arguments: make(*arguments))

        @wraps(make)
        def lookup(*arguments: Any) -> Any:
            stream = stream_name(arguments[-1])
            return make(*arguments) if stream is None else cached(stream, *arguments)

        return lookup

    return decorate


@per_stream(16)
def key_tensor(words: Sequence[int], device: torch.device) -> Tensor:
    """Secret. The key as int32 words on the device; `words` is a tuple."""
    return to_device(np.array([signed32(w) for w in words], dtype=np.int32), device)


def step_tensor(step: int | Tensor, device: torch.device) -> Tensor:
    """The step as a 0-d int64 tensor on the device; one that lies there is used as it is."""
    return _scalar(step, torch.int64, device)


def _scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-d tensor on the device; the host does not wait."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype)
    return torch.full((), value, dtype=dtype, device=device)


def _vector(values: Sequence[float | Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers, or 0-d tensors on the device, as one tensor on the device."""
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([_scalar(value, dtype, device) for value in values])
    return to_device(torch.tensor(values, dtype=dtype).numpy(), device)


def source_tensors(
    noise: Noise, device: torch.device, place: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, int | None]:
    """Steps, key words, coefficients and how many steps, of what a release draws.

    Without noise that is drawn again: one step, and neither coefficients nor their number. The step
    is 0-d, at `place` if it is a number and a place is given.
    """
    if not noise.again:
        step, key = noise.step, key_tensor(tuple(noise.key_words), device)
        if place is None or isinstance(step, Tensor):
            return step_tensor(step, device), key, None, None
        return place.fill_(step), key, None, None
    steps = [noise.step, *(term.step for term in noise.again)]
    factors = [1.0, *(term.coefficient for term in noise.again)]
    words = tuple(noise.key_words) + tuple(w for term in noise.again for w in term.key_words)
    weights = _vector(factors, torch.float64, device)
    return _vector(steps, torch.int64, device), key_tensor(words, device), weights, len(steps)


@lru_cache
def warp_size(device: torch.device) -> int:
    """Threads of a warp."""
    if device.type != "cuda" or torch.version.hip is None:
        return 32
    return torch.cuda.get_device_properties(device).warp_size


@lru_cache
def sm_count(device: torch.device) -> int:
    """Multiprocessors of the device; one for the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
