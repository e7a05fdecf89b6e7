"""CIFAR-10 from its authors' binary files."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fl_lightning.data.arrays import Arrays
from fl_lightning.data.download import RemoteFile, cache_folder, find

_ARCHIVE = RemoteFile(
    "cifar-10-binary.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "md5:c32a1d4ab5d03f1284b67883e8d87530",
)
_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
_TEST = ("test_batch.bin",)
_RECORD = 1 + 3 * 32 * 32


def cifar10(data_dir: str | Path | None = None, download: bool = False) -> Arrays:
    """CIFAR-10, [N, 3, 32, 32] in [-1, 1]: 50,000 for training, 10,000 for the test.

    Args:
        data_dir: folder of the archive cifar-10-binary.tar.gz or of its unpacked .bin files; None
            looks in the cache of fetched files.
        download: whether the archive is fetched (into data_dir or the cache) and checked.

    Raises:
        FileNotFoundError: a file is missing; says how to get it.
        ValueError: a file is damaged.

    Reference:
        Krizhevsky, 2009, "Learning multiple layers of features from tiny images". The binary
        version is read, since unpickling the Python version would run what a file says.
    """
    folder = cache_folder("cifar10") if data_dir is None else Path(data_dir).expanduser()
    for place in (folder, folder / "cifar-10-batches-bin"):
        if (place / _TEST[0]).is_file():
            files = {n: _whole(place / n) for n in (*_TRAIN, *_TEST)}
            break
    else:
        archive = find(
            _ARCHIVE,
            names=(_ARCHIVE.name,),
            folders=[folder],
            download=download,
            hint=", point data_dir at a folder with the archive or its .bin files",
        )
        files = _unpacked(archive)
    train = _images(b"".join(files[n] for n in _TRAIN))
    test = _images(files[_TEST[0]])
    return Arrays(*train, *test, num_classes=10, name="cifar10")


def _whole(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: CIFAR-10 has six .bin files")
    return _checked(path.read_bytes(), str(path))


def _unpacked(archive: Path) -> dict[str, bytes]:
    files = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                if name in (*_TRAIN, *_TEST) and (stream := tar.extractfile(member)):
                    files[name] = _checked(stream.read(), f"{archive}: {name}")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{archive} is not a whole tar archive: {error}") from error
    missing = {*_TRAIN, *_TEST} - set(files)
    if missing:
        raise ValueError(f"{archive} lacks {', '.join(sorted(missing))}")
    return files


def _checked(raw: bytes, name: str) -> bytes:
    if not raw or len(raw) % _RECORD:
        raise ValueError(f"{name} has {len(raw)} bytes, not whole records of {_RECORD}")
    return raw


def _images(raw: bytes) -> tuple[Tensor, Tensor]:
    rows = np.frombuffer(raw, np.uint8).reshape(-1, _RECORD)
    x = torch.tensor(rows[:, 1:], dtype=torch.float32).div_(255).sub_(0.5).div_(0.5)
    return x.view(-1, 3, 32, 32), torch.tensor(rows[:, 0], dtype=torch.int64)
