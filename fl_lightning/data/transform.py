"""Public functions of single records, applied once before training and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from fl_lightning.data.arrays import Arrays
from fl_lightning.data.download import cache_folder
from fl_lightning.data.fields import Fields
from fl_lightning.data.hidden_states import hidden_states
from fl_lightning.data.leaves import whitened_scattering
from fl_lightning.data.scattering import scattering
from fl_lightning.data.sentence_features import sentence_features
from fl_lightning.data.sources import resolve

ALONE = ".alone"  # suffix of the mark that values passed `why_not_alone`
TRANSFORMS: dict[str, Callable[..., Tensor]] = {
    "scattering": scattering,
    "whitened_scattering": whitened_scattering,
    "sentence_features": sentence_features,
    "hidden_states": hidden_states,
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
            → [N, ...]; x is a mapping where a record has named inputs. It must treat each record by
            itself (see `why_not_alone`): what it learns from the others would be a release.
        arguments: its further arguments.

    Guarantees:
        Random numbers of torch, numpy and random are drawn from one public seed, and the state of
        the caller's generators stays. A function that keeps what it is first given keeps drawn
        records.

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
        parts[split] = (
            None if len(x) == 0 else _kept(x, arrays.fields, function, transform, arguments)
        )
    known = next((part for part in parts.values() if part is not None), None)
    if known is None:
        return arrays
    empty = known.new_empty((0, *known.shape[1:]))
    values = {n: empty if part is None else part for n, part in parts.items()}
    return replace(arrays, fields=None, **values)


def _check_arguments(name: str, function: Callable[..., Tensor], arguments: dict[str, Any]) -> None:
    try:
        inspect.signature(function).bind(torch.empty(0), **arguments)
    except ValueError:  # some functions written in C have no signature
        return
    except TypeError as error:
        raise ValueError(f"transform_args={arguments}: transform={name!r}: {error}") from error


def kept_in(
    x: Tensor,
    fields: Fields | None,
    function: Callable[..., Tensor],
    name: str,
    arguments: dict[str, Any],
) -> Path:
    """File that holds the function's values of the records x."""
    return cache_folder("features") / f"{_key(x, fields, function, name, arguments)}.npy"


def applied(
    function: Callable[..., Tensor],
    x: Tensor,
    arguments: Mapping[str, Any],
    fields: Fields | None = None,
) -> Tensor:
    """The function's values of a copy of the records, with random numbers from one public seed.

    Packed records are given as a mapping from the names of their inputs.
    """
    with torch.no_grad(), isolate_rng(include_cuda=False):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - what the function may draw from
        random.seed(0)
        given = x.clone() if fields is None else fields.unpack(x)
        return function(given, **arguments)


def _meet_drawn_records(
    function: Callable[..., Tensor], x: Tensor, arguments: Any, fields: Fields | None
) -> None:
    """Call the function on drawn records, so that what fits itself at first fits these."""
    shape = (min(len(x), 8), *x.shape[1:])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.empty(shape).uniform_(-1, 1, generator=generator)
    if fields is not None:  # small whole numbers, such as masks and ids that every table has
        count = shape[0]
        drawn = fields.pack(
            {
                part.name: torch.randint(0, 2, (count, *part.shape), generator=generator).to(
                    getattr(torch, part.kind)
                )
                for part in fields.parts
            }
        )
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        applied(function, drawn.to(x.dtype), arguments, fields)


def _kept(
    x: Tensor,
    fields: Fields | None,
    function: Callable[..., Tensor],
    name: str,
    arguments: dict[str, Any],
) -> Tensor:
    path = kept_in(x, fields, function, name, arguments)
    if path.is_file():
        return torch.from_numpy(np.load(path))
    if function not in TRANSFORMS.values():
        _meet_drawn_records(function, x, arguments, fields)
    result = applied(function, x, arguments, fields)
    if not isinstance(result, Tensor) or not result.ndim:
        raise ValueError(f"transform={name!r} must give a tensor [N, ...], got {result!r:.80}")
    result = result.contiguous()
    if len(result) != len(x):
        raise ValueError(f"transform={name!r} made {len(result)} records of {len(x)}")
    path.with_suffix(ALONE).unlink(missing_ok=True)  # that was said of other values
    _write(path, result.numpy())
    return result


def _key(
    x: Tensor,
    fields: Fields | None,
    function: Callable[..., Tensor],
    name: str,
    arguments: dict[str, Any],
) -> str:
    state = hashlib.blake2b(digest_size=16)
    # The project's own functions use one another's modules.
    modules = {inspect.getmodule(each) for each in (function, *TRANSFORMS.values())}
    source = sorted(map(_source, modules))
    facts = (name, sorted(arguments.items()), source, str(x.dtype), tuple(x.shape))
    facts = (*facts, *(_content(value) for value in arguments.values() if _is_folder(value)))
    state.update(repr(facts if fields is None else (*facts, fields)).encode())
    state.update(np.ascontiguousarray(x.numpy()).data)
    return state.hexdigest()


def _is_folder(value: object) -> bool:
    return isinstance(value, str) and Path(value).expanduser().is_dir()


def _content(folder: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a folder's files, such as those of a pretrained model."""
    files = sorted(path for path in Path(folder).expanduser().rglob("*") if path.is_file())
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


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
