"""Public functions of single records, applied once before training and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arrays import Arrays
from .download import cache_folder
from .leaves import whitened_scattering
from .scattering import scattering
from .sources import resolve

TRANSFORMS: dict[str, Callable[..., Tensor]] = {
    "scattering": scattering,
    "whitened_scattering": whitened_scattering,
}


def transformed(
    arrays: Arrays, transform: str, arguments: Mapping[str, Any] | None = None
) -> Arrays:
    """The same records, each replaced by a public function of itself.

    Results are kept in the user's cache folder ($AADP_FL_DATA_DIR), readable by the owner alone,
    under a hash of the records, the function's source and its arguments.

    Args:
        arrays: the records; labels and owners stay.
        transform: a name in TRANSFORMS, or the import path of a function (x [N, ...], **arguments)
            → [N, ...]. It must treat each record by itself: nothing here can find out whether it
            learned something from the others, which would be a release.
        arguments: its further arguments.

    Raises:
        ValueError: an unknown name, arguments that the function does not take, or a result with
            another number of records.
    """
    arguments = dict(arguments or {})
    function = resolve(transform, TRANSFORMS, argument="transform")
    _check_arguments(transform, function, arguments)
    parts = {}
    for split in ("x_train", "x_test"):
        x = getattr(arrays, split)
        # An empty split has no records to apply the function to: its shape is the others'.
        parts[split] = None if len(x) == 0 else _kept(x, function, transform, arguments)
    known = next((part for part in parts.values() if part is not None), None)
    if known is None:
        return arrays
    empty = known.new_empty((0, *known.shape[1:]))
    return replace(arrays, **{n: empty if part is None else part for n, part in parts.items()})


def _check_arguments(name: str, function: Callable[..., Tensor], arguments: dict[str, Any]) -> None:
    try:
        inspect.signature(function).bind(torch.empty(0), **arguments)
    except ValueError:  # some functions written in C have no signature
        return
    except TypeError as error:
        raise ValueError(f"transform_args={arguments}: transform={name!r}: {error}") from error


def _kept(
    x: Tensor, function: Callable[..., Tensor], name: str, arguments: dict[str, Any]
) -> Tensor:
    folder = cache_folder("features")
    path = folder / f"{_key(x, function, name, arguments)}.npy"
    if path.is_file():
        return torch.from_numpy(np.load(path))
    with torch.no_grad():
        result = function(x, **arguments).contiguous()
    if len(result) != len(x):
        raise ValueError(f"transform={name!r} made {len(result)} records of {len(x)}")
    _write(path, result.numpy())
    return result


def _key(x: Tensor, function: Callable[..., Tensor], name: str, arguments: dict[str, Any]) -> str:
    state = hashlib.blake2b(digest_size=16)
    # The project's own functions use one another's modules.
    modules = {inspect.getmodule(each) for each in (function, *TRANSFORMS.values())}
    source = sorted(map(_source, modules))
    facts = (name, sorted(arguments.items()), source, str(x.dtype), tuple(x.shape))
    state.update(repr(facts).encode())
    state.update(np.ascontiguousarray(x.numpy()).data)
    return state.hexdigest()


def _source(module: object) -> str:
    try:
        return inspect.getsource(module)  # pyright: ignore[reportArgumentType]
    except (OSError, TypeError):  # written in C, or typed in
        return ""


def _write(path: Path, values: np.ndarray) -> None:
    """Whole or not at all; the cache is a convenience, so a full disk is no error."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, values)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
