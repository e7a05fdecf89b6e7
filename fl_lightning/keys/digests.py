"""Digests of values, of the code and of the machine: what noise can be bound to."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadp_kernels import threads

try:
    from blake3 import blake3
except ModuleNotFoundError:
    blake3 = None

# Without blake3, which needs a third of the time of hashlib's fastest, lines have plain SHA-256.
_BLAKE3 = "blake3:"
_PIECE = 1 << 18
_PLAIN = (torch.float32, torch.float64, torch.int64)
Part = bytes | str | int | float | Tensor


def digest(parts: Iterable[Part]) -> str:
    """BLAKE2b of a sequence of values, unambiguous: each is prefixed by its kind and length."""
    state = hashlib.blake2b(digest_size=32)
    _feed(state, parts)
    return state.hexdigest()


def function_of(digest: str) -> str:
    """What `digests` takes as `like` for all digests of one function."""
    return _BLAKE3 if digest.startswith(_BLAKE3) else ""


def digests(columns: Sequence[Tensor], *, like: str | None = None) -> list[str]:
    """A digest of each row of some tensors [k, ...] together, on the threads that torch may use.

    Args:
        columns: of updates of a whole cohort.
        like: a digest of the function to take: "blake3:" and BLAKE3's, or SHA-256's alone; None:
            BLAKE3 where it is installed.

    Raises:
        ValueError: `like` is BLAKE3's, which is not installed.
    """
    new: Callable[[], Any] | None = blake3 or hashlib.sha256
    if like is not None:
        new = blake3 if like.startswith(_BLAKE3) else hashlib.sha256
    if new is None:
        raise ValueError("its digest is by BLAKE3: pip install blake3")
    prefix = _BLAKE3 if new is blake3 else ""
    parts = []
    for value in columns:
        data = _bytes(value)
        size = len(data) // max(1, len(value))
        head = f"{value.dtype}{tuple(value.shape[1:])}:{size}:".encode()
        parts.append((head, data, size))

    def row(i: int) -> str:
        state = new()
        for head, data, size in parts:
            state.update(head)
            state.update(data[i * size : (i + 1) * size])
        return prefix + state.hexdigest()

    count = len(columns[0]) if columns else 0
    return _on_threads(row, count, sum(len(data) for _, data, _ in parts))


def bulk_digest(parts: Iterable[Part]) -> str:
    """One digest of values of many megabytes, hashed piece by piece; not that of `digest`."""
    kinds: list[Part] = []
    pieces: list[memoryview | bytes] = []
    for part in parts:
        if isinstance(part, Tensor):
            data, step = _bytes(part), _PIECE * part.element_size()
            kinds.append(f"{part.dtype}{tuple(part.shape)}")
            pieces += [data[start : start + step] for start in range(0, len(data), step)]
        else:
            kinds.append(part)
    size = sum(map(len, pieces))
    new: Callable[[], Any] = blake3 or hashlib.sha256

    def hashed(i: int) -> str:
        state = new()
        state.update(pieces[i])  # lets other threads run, as the constructor of BLAKE3 does not
        return state.hexdigest()

    found = _on_threads(hashed, len(pieces), size)
    return digest([len(kinds), *kinds, *found])


def _on_threads(work: Callable[[int], str], count: int, size: int) -> list[str]:
    """work(i) for i below `count`, which together read `size` bytes.

    On torch's own threads: after an operation they spin for a while, and others find no core free.
    """
    found = [""] * count

    def part(begin: int, end: int) -> None:
        for i in range(begin, end):
            found[i] = work(i)

    threads.run_on_threads(part, count, elements=size // 4)
    return found


def _bytes(value: Tensor) -> memoryview | bytes:
    """The memory of a tensor, row by row."""
    quick = value.is_cpu and value.dtype in _PLAIN and value.is_contiguous()
    if quick and value.numel() and not value.is_neg():
        # Most are: of a deep network there are hundreds in a round.
        return value.detach().numpy().reshape(-1).view(np.uint8).data
    flat = value.detach().contiguous().cpu().view(-1)
    # An empty tensor may have a stride of 0, which cannot be seen as bytes.
    return flat.view(torch.uint8).numpy().data if len(flat) else b""


def _feed(state: Any, parts: Iterable[Part]) -> None:
    for part in parts:
        if isinstance(part, Tensor):
            data = _bytes(part)
            head = _head(part.dtype, part.shape, len(data))
        else:
            data = part if isinstance(part, bytes) else repr(part).encode()
            head = f"{type(part).__name__}:{len(data)}:".encode()
        state.update(head)
        state.update(data)


@functools.lru_cache(maxsize=4096)
def _head(dtype: torch.dtype, shape: torch.Size, size: int) -> bytes:
    """Kind and length of a tensor's bytes; written out once for those of a kind."""
    return f"{dtype}{tuple(shape)}:{size}:".encode()


@functools.cache
def source_digest() -> str:
    """Digest of the code of both packages: other code may compute other bits."""
    import aadp_kernels

    roots = [Path(__file__).parents[1], Path(aadp_kernels.__file__).parent]
    files = [path for root in roots for path in sorted(root.rglob("*.py"))]
    return digest(part for path in files for part in (path.name, path.read_bytes()))


def platform_facts() -> list[str]:
    """What else decides the low bits of a computation on this machine."""
    return [
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        str(torch.get_num_threads()),
        "SHA-256" if blake3 is None else "BLAKE3",
        torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    ]
