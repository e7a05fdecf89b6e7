"""What a checkpoint keeps of privacy, read without torch: its import takes longer than all checks.

A checkpoint of torch is a zip archive of a pickle and of the tensors' memory. Only dicts, lists,
numbers, strings and tensors are made of it; of everything else, and of every class and function
that the pickle names, an empty stand-in. So nothing of a checkpoint is run.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

PRIVACY = "aadp_fl"
_MOST = 1 << 24
_STORAGES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "BoolStorage": "?",
}


def privacy_facts(path: Path) -> dict[str, Any] | None:
    """The module's facts in a checkpoint; None in one that keeps none.

    Tensors are `StoredTensor`: those of float64, float32, int64, int32 and bool can be read.

    Raises:
        OSError, ValueError: the file cannot be read, or has no such facts.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].split("/")[0]
            order = f"{root}/byteorder"
            big = order in archive.namelist() and archive.read(order) == b"big"
            pickled = BytesIO(archive.read(f"{root}/data.pkl"))
        state = _Reader(pickled, _Memory(path, root, ">" if big else "<")).load()
        found = state.get(PRIVACY)
    except OSError:
        raise
    except Exception as error:  # whatever a pickle that is none leads to
        raise ValueError(f"no checkpoint of torch: {error!r}") from error
    if not isinstance(found, dict | None):
        raise ValueError(f"{PRIVACY} is a {type(found).__name__}, no facts")
    return found


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the archive: its memory is read by `numpy`."""

    memory: Any
    offset: int
    shape: Sequence[int]
    stride: Sequence[int]

    def numpy(self) -> np.ndarray:
        """Its values.

        Raises:
            ValueError: a dtype that no fact has, or more elements than the archive has.
        """
        values = self.memory.read()
        if math.prod(self.shape) > max(len(values), _MOST):
            raise ValueError(f"a tensor of {self.shape} has {len(values)} numbers")
        places = np.full(self.shape, self.offset)
        for axis, (count, step) in enumerate(zip(self.shape, self.stride, strict=True)):
            along = np.arange(count) * step
            places += along.reshape(-1, *[1] * (len(self.shape) - axis - 1))
        try:
            return values[places]
        except IndexError as error:
            raise ValueError(f"a tensor of {self.shape} has {len(values)} numbers") from error


@dataclass(frozen=True)
class _Memory:
    path: Path
    root: str
    order: str
    name: str = ""
    kind: str = ""

    def read(self) -> np.ndarray:
        if self.kind not in _STORAGES:
            raise ValueError(f"numbers of {self.kind or 'an unknown kind'}")
        with zipfile.ZipFile(self.path) as archive:
            data = archive.read(f"{self.root}/data/{self.name}")
        return np.frombuffer(data, dtype=self.order + _STORAGES[self.kind])


class _Other:
    """Stands for whatever is not read; takes what a pickle gives to it."""

    def __new__(cls, *_: object, **__: object) -> _Other:
        return super().__new__(cls)

    def __call__(self, *_: object) -> _Other:
        return self

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None: ...

    def extend(self, values: object) -> None: ...

    def add(self, value: object) -> None: ...


class _Reader(pickle.Unpickler):
    def __init__(self, file: Any, memory: _Memory) -> None:
        super().__init__(file)
        self.memory = memory

    def find_class(self, module: str, name: str) -> Any:
        """Never a class or function of this name, but for ordered dicts."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        return type(name, (_Other,), {})

    def persistent_load(self, pid: Any) -> Any:
        """The memory of a tensor."""
        kind, storage, name, *_ = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"{kind!r} is no memory of a tensor")
        known = getattr(storage, "__name__", "")
        return _Memory(self.memory.path, self.memory.root, self.memory.order, str(name), known)


def _tensor(memory: Any, offset: int, shape: Any, stride: Any, *_: object) -> StoredTensor:
    return StoredTensor(memory, offset, tuple(shape), tuple(stride))
