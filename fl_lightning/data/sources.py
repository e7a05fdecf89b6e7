"""Where records come from: named data sets, files, and a user's own function.

Normalisation is data-free (0.5/0.5), so that no statistic of private records enters the run.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from fl_lightning.data.arrays import Arrays, from_arrays
from fl_lightning.data.cifar import cifar10
from fl_lightning.data.hub import hugging_face
from fl_lightning.data.idx import fashion_mnist, mnist
from fl_lightning.data.tabular import csv
from fl_lightning.data.text import shakespeare, text_files
from fl_lightning.data.tokenized import tokenized_text


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


SOURCES: dict[str, Callable[..., Arrays]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "mnist": mnist,
    "cifar10": cifar10,
    "csv": csv,
    "hugging_face": hugging_face,
    "shakespeare": shakespeare,
    "text_files": text_files,
    "tokenized_text": tokenized_text,
}


def load(
    source: str | Arrays,
    *,
    data_dir: str | None = None,
    download: bool = False,
    source_args: Mapping[str, Any] | None = None,
) -> Arrays:
    """The arrays of a named source, or what the function at an import path returns.

    Args:
        source: a name in SOURCES, an import path such as `package.module.function`, or the arrays
            themselves.
        data_dir: folder of the files, for the sources that take one.
        download: whether missing files are fetched, for the sources that can.
        source_args: further arguments of the source's function.

    Raises:
        ValueError: an unknown name, a path that cannot be imported, an argument that the source
            does not take or misses, or a function that returns something else.
    """
    arguments = dict(source_args or {})
    if data_dir is not None:
        arguments["data_dir"] = data_dir
    if download:
        arguments["download"] = True
    if not isinstance(source, str):
        if arguments:
            raise ValueError(f"{next(iter(arguments))} has no meaning for arrays in memory")
        arrays: object = source
    else:
        function = resolve(source, SOURCES, argument="source")
        _check_arguments(source, function, arguments)
        arrays = function(**arguments)
    if not isinstance(arrays, Arrays):
        raise ValueError(f"source must give Arrays (see from_arrays), got {type(arrays).__name__}")
    return arrays


def _check_arguments(
    source: str, function: Callable[..., object], arguments: Mapping[str, Any]
) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        names = ", ".join(signature.parameters) or "no arguments"
        raise ValueError(f"source={source!r} takes {names}: {error}") from error


def resolve(
    name: str, known: Mapping[str, Callable[..., Any]], *, argument: str
) -> Callable[..., Any]:
    """The function of a name in `known`, or the one at an import path.

    Raises:
        ValueError: naming the argument, for an unknown name or a path that cannot be imported.
    """
    if name in known:
        return known[name]
    if "." not in name:
        raise ValueError(
            f"{argument}={name!r} is unknown: use one of {', '.join(known)}, or the import path "
            f"of a function{' that returns Arrays' if argument == 'source' else ''}"
        )
    try:
        function = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{argument}={name!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"{argument}={name!r} is not a function")
    return function
