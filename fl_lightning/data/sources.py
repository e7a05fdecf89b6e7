"""Where records come from: named data sets, IDX files, and a user's own arrays.

Normalisation is data-free (0.5/0.5), so that no statistic of private records enters the run.
"""

from __future__ import annotations

import gzip
import math
import pkgutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

_SYSTEM_FOLDER = Path("/usr/share/datasets")
_SITES = {
    "fashion-mnist": "https://github.com/zalandoresearch/fashion-mnist",
    "mnist": "http://yann.lecun.com/exdb/mnist/",
}
_IDX_UINT8 = 0x08


@dataclass(frozen=True, eq=False)
class Arrays:
    """One data set in memory. Everything but the shapes and `num_classes` is private.

    Args:
        x_train: float32 [N, ...], training records; NaN and infinity are allowed.
        y_train: int64 [N], labels in [0, num_classes).
        x_test: float32 [M, ...], records for the final test only; M = 0 for none.
        y_test: int64 [M].
        num_classes: public number of classes.
        name: what to call the data in reports.

    Raises:
        ValueError: wrong dtype, lengths or record shapes that differ, or a label out of range.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    name: str

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            x, y = getattr(self, f"x_{split}"), getattr(self, f"y_{split}")
            if x.dtype != torch.float32 or x.ndim < 2:
                raise ValueError(
                    f"x_{split} must be float32 [N, ...], got {x.dtype} {list(x.shape)}"
                )
            if y.dtype != torch.int64 or y.ndim != 1:
                raise ValueError(f"y_{split} must be int64 [N], got {y.dtype} {list(y.shape)}")
            if len(x) != len(y):
                raise ValueError(f"x_{split} has {len(x)} records but y_{split} has {len(y)}")
            if len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.num_classes:
                raise ValueError(
                    f"y_{split} must lie in [0, num_classes={self.num_classes}), "
                    f"got [{int(y.min())}, {int(y.max())}]"
                )
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise ValueError(
                f"x_test must hold records of shape {list(self.x_train.shape[1:])}, "
                f"got {list(self.x_test.shape[1:])}"
            )


def _records(name: str, value: ArrayLike | Tensor) -> Tensor:
    x = torch.as_tensor(value)
    if x.is_complex():
        raise ValueError(f"{name} must hold real numbers, got {x.dtype}")
    return x.detach().to("cpu", torch.float32)


def _labels(name: str, value: ArrayLike | Tensor) -> Tensor:
    y = torch.as_tensor(value)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, got {y.dtype}")
    return y.detach().to("cpu", torch.int64)


def from_arrays(
    x_train: ArrayLike | Tensor,
    y_train: ArrayLike | Tensor,
    x_test: ArrayLike | Tensor | None = None,
    y_test: ArrayLike | Tensor | None = None,
    *,
    num_classes: int | None = None,
    name: str = "arrays",
) -> Arrays:
    """A user's own data: `FederatedDataModule(from_arrays(x, y), num_clients=10)`.

    Args:
        x_train: real numbers [N, ...], taken as float32 and not rescaled.
        y_train: integers [N].
        x_test: real numbers [M, ...]; None for no test records.
        y_test: integers [M]; given exactly when x_test is.
        num_classes: public number of classes; None takes the largest label + 1, which looks at
            the labels.
        name: what to call the data in reports.

    Raises:
        ValueError: as `Arrays`, labels that are not integers, or only one of x_test and y_test.
    """
    if (x_test is None) != (y_test is None):
        missing = "x_test" if x_test is None else "y_test"
        raise ValueError(f"{missing} is None: give both x_test and y_test, or neither")
    x, y = _records("x_train", x_train), _labels("y_train", y_train)
    xt = x[:0] if x_test is None else _records("x_test", x_test)
    yt = y[:0] if y_test is None else _labels("y_test", y_test)
    if num_classes is None:
        num_classes = max((int(labels.max()) + 1 for labels in (y, yt) if len(labels)), default=1)
    return Arrays(x, y, xt, yt, num_classes, name)


def digits() -> Arrays:
    """scikit-learn's 8x8 digits, [N, 1, 8, 8] in [-1, 1]: 1437 for training, 360 for the test.

    The stratified split is the same in every run.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x = ((images / 16 - 0.5) / 0.5).reshape(-1, 1, 8, 8)
    x_train, x_test, y_train, y_test = train_test_split(
        x, labels, test_size=0.2, stratify=labels, random_state=0
    )
    return from_arrays(x_train, y_train, x_test, y_test, num_classes=10, name="digits")


def read_idx(path: str | Path) -> np.ndarray:
    """The uint8 array in an IDX file, raw or gzipped (told apart by content).

    Args:
        path: the file.

    Returns:
        uint8, with the shape the file declares.

    Raises:
        ValueError: not an IDX file of bytes, a damaged gzip stream, or a length that differs from
            the declared shape; names the file.

    Reference:
        The IDX format: two zero bytes, a type code, the number of dimensions, then each dimension
        as a big-endian uint32, then the elements in row-major order.
    """
    raw = Path(path).read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if len(raw) < 4 or raw[:3] != bytes((0, 0, _IDX_UINT8)):
        raise ValueError(f"{path} is not an IDX file of bytes: it starts with 0x{raw[:4].hex()}")
    header = 4 + 4 * raw[3]
    if len(raw) < header:
        raise ValueError(f"{path} is truncated: {len(raw)} bytes, its header needs {header}")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", raw[3], offset=4))
    expected = header + math.prod(shape)
    if len(raw) != expected:
        raise ValueError(f"{path} has {len(raw)} bytes, its shape {shape} needs {expected}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _idx_file(folder: Path, stem: str, dataset: str) -> Path:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    debian = ", Debian's package dataset-fashion-mnist" if dataset == "fashion-mnist" else ""
    raise FileNotFoundError(
        f"{stem}[.gz] is not in {folder}. Ways to get the data: point data_dir at a folder with "
        f"the four IDX files{debian}, or download them from {_SITES[dataset]}"
    )


def _idx_dataset(dataset: str, data_dir: str | Path | None) -> Arrays:
    folder = _SYSTEM_FOLDER / dataset if data_dir is None else Path(data_dir)
    loaded: list[Tensor] = []
    for split in ("train", "t10k"):
        image_path = _idx_file(folder, f"{split}-images-idx3-ubyte", dataset)
        images = read_idx(image_path)
        labels = read_idx(_idx_file(folder, f"{split}-labels-idx1-ubyte", dataset))
        if images.ndim != 3 or images.shape[1:] != (28, 28):
            raise ValueError(f"{image_path} must hold [N, 28, 28] images, got {images.shape}")
        x = torch.tensor(images, dtype=torch.float32).div_(255).sub_(0.5).div_(0.5)
        loaded += [x.unsqueeze(1), torch.tensor(labels, dtype=torch.int64)]
    return Arrays(*loaded, num_classes=10, name=dataset)


def fashion_mnist(data_dir: str | Path | None = None) -> Arrays:
    """Fashion-MNIST, [N, 1, 28, 28] in [-1, 1]: 60,000 for training, 10,000 for the test.

    Args:
        data_dir: folder of the four IDX files; None for where Debian's package puts them.

    Raises:
        FileNotFoundError: a file is missing; says how to get it.
        ValueError: a file is damaged.

    Reference:
        Xiao, Rasul, Vollgraf, 2017, arXiv:1708.07747.
    """
    return _idx_dataset("fashion-mnist", data_dir)


def mnist(data_dir: str | Path | None = None) -> Arrays:
    """MNIST, like `fashion_mnist`; Debian has no package of it."""
    return _idx_dataset("mnist", data_dir)


IDX_SOURCES: dict[str, Callable[..., Arrays]] = {"fashion_mnist": fashion_mnist, "mnist": mnist}
SOURCES: dict[str, Callable[..., Arrays]] = {"digits": digits, **IDX_SOURCES}


def load(source: str | Arrays, data_dir: str | Path | None = None) -> Arrays:
    """The arrays of a named source, or what the function at an import path returns.

    Args:
        source: a name in SOURCES, an import path such as `package.module.function` of a function
            without arguments, or the arrays themselves.
        data_dir: folder of the IDX files, for the sources that read them.

    Raises:
        ValueError: an unknown name, a path that cannot be imported, a function that returns
            something else, or a data_dir that the source does not read.
    """
    if data_dir is not None and not (isinstance(source, str) and source in IDX_SOURCES):
        raise ValueError(f"data_dir={str(data_dir)!r} is read only by {', '.join(IDX_SOURCES)}")
    if not isinstance(source, str):
        arrays = source
    elif source in IDX_SOURCES:
        arrays = IDX_SOURCES[source](data_dir)
    elif source in SOURCES:
        arrays = SOURCES[source]()
    elif "." in source:
        arrays = _import(source)()
    else:
        raise ValueError(
            f"source={source!r} is unknown: use one of {', '.join(SOURCES)}, or the import path "
            "of a function that returns Arrays"
        )
    if not isinstance(arrays, Arrays):
        raise ValueError(f"source must give Arrays (see from_arrays), got {type(arrays).__name__}")
    return arrays


def _import(path: str) -> Callable[[], object]:
    try:
        function = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"source={path!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"source={path!r} is not a function")
    return function
