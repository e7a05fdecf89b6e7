"""MNIST and Fashion-MNIST from their IDX files."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fl_lightning.data.arrays import Arrays
from fl_lightning.data.download import RemoteFile, cache_folder, find

_SYSTEM_FOLDER = Path("/usr/share/datasets")
_SITES = {
    "fashion-mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
}
# Checksums of the gzipped files as their authors published them.
_MD5 = {
    "fashion-mnist": {
        "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    "mnist": {
        "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
    },
}
_IDX_UINT8 = 0x08


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


def _idx_file(stem: str, dataset: str, data_dir: str | Path | None, download: bool) -> Path:
    if data_dir is not None:
        folders = [Path(data_dir).expanduser()]
    else:
        folders = [_SYSTEM_FOLDER / dataset, cache_folder(dataset)]
    name = f"{stem}.gz"
    remote = RemoteFile(name, _SITES[dataset] + name, f"md5:{_MD5[dataset][stem]}")
    debian = ", install Debian's package dataset-fashion-mnist" if dataset != "mnist" else ""
    return find(
        remote,
        names=(stem, name),
        folders=folders,
        download=download,
        hint=f", point data_dir at a folder with the four IDX files{debian}",
    )


def _idx_dataset(dataset: str, data_dir: str | Path | None, download: bool) -> Arrays:
    loaded: list[Tensor] = []
    for split in ("train", "t10k"):
        image_path = _idx_file(f"{split}-images-idx3-ubyte", dataset, data_dir, download)
        images = read_idx(image_path)
        labels = read_idx(_idx_file(f"{split}-labels-idx1-ubyte", dataset, data_dir, download))
        if images.ndim != 3 or images.shape[1:] != (28, 28):
            raise ValueError(f"{image_path} must hold [N, 28, 28] images, got {images.shape}")
        x = torch.tensor(images, dtype=torch.float32).div_(255).sub_(0.5).div_(0.5)
        loaded += [x.unsqueeze(1), torch.tensor(labels, dtype=torch.int64)]
    return Arrays(*loaded, num_classes=10, name=dataset)


def fashion_mnist(data_dir: str | Path | None = None, download: bool = False) -> Arrays:
    """Fashion-MNIST, [N, 1, 28, 28] in [-1, 1]: 60,000 for training, 10,000 for the test.

    Args:
        data_dir: folder of the four IDX files; None looks where Debian's package puts them, then in
            the cache of fetched files.
        download: whether missing files are fetched (into data_dir or the cache) and checked.

    Raises:
        FileNotFoundError: a file is missing; says how to get it.
        ValueError: a file is damaged.

    Reference:
        Xiao, Rasul, Vollgraf, 2017, arXiv:1708.07747.
    """
    return _idx_dataset("fashion-mnist", data_dir, download)


def mnist(data_dir: str | Path | None = None, download: bool = False) -> Arrays:
    """MNIST, like `fashion_mnist`; Debian has no package of it.

    Reference:
        LeCun, Bottou, Bengio, Haffner, 1998, Proceedings of the IEEE 86(11).
    """
    return _idx_dataset("mnist", data_dir, download)
