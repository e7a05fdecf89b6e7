"""Real text, split by who wrote or spoke it: predict the character after a window of characters.

The vocabulary is fixed and public (printable ASCII, the newline, everything else), so that no
statistic of private text enters the run.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fl_lightning.data.arrays import Arrays, from_arrays
from fl_lightning.data.download import RemoteFile, cache_folder, find
from fl_lightning.data.utf8 import read_utf8

VOCABULARY = "".join(chr(c) for c in range(32, 127)) + "\n"
NUM_CODES = len(VOCABULARY) + 1
MOST_UNKNOWN = 0.1  # part of all characters
MOST_UNKNOWN_OF_AUTHOR = 0.25
_TABLE = np.full(256, len(VOCABULARY), np.uint8)
_TABLE[np.frombuffer(VOCABULARY.encode(), np.uint8)] = np.arange(len(VOCABULARY))
_log = logging.getLogger("pytorch_lightning")
_PLAYS = RemoteFile(
    "input.txt",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
_SPEECH = re.compile(r"([^\n:]+):\n(.+)", re.DOTALL)


def encode(text: str) -> NDArray[np.uint8]:
    """Codes of the characters, 0 to NUM_CODES - 1; the last one stands for all others."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return _TABLE[np.minimum(points, 255)]  # 255 is no letter of the vocabulary


def by_author(
    texts: Mapping[str, str],
    *,
    name: str,
    length: int = 80,
    stride: int | None = None,
    test_fraction: float = 0.1,
) -> Arrays:
    """Windows of text and the character after each, with their author as the client.

    Args:
        texts: text of each author.
        name: what to call the data in reports.
        length: characters a window, at least 1.
        stride: characters from one window to the next; None is length + 1, so that no character is
            in two records. With less, one character is in several records, and the privacy of a
            record is not the privacy of a character.
        test_fraction: last part of each author's text, held for the test; in [0, 1).

    Returns:
        x int64 [N, length], y int64 [N], codes of `VOCABULARY`.

    Raises:
        ValueError: an argument out of range, texts too short for a single window, or too many
            characters that the vocabulary lacks (a tenth of all, a quarter of one author's): they
            share one code, and to guess it is no skill.

    Reference:
        The task of LEAF's Shakespeare: Caldas et al., 2018, arXiv:1812.01097.
    """
    if length < 1:
        raise ValueError(f"length={length} must be >= 1")
    stride = length + 1 if stride is None else stride
    if stride < 1:
        raise ValueError(f"stride={stride} must be >= 1")
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction={test_fraction} must lie in [0, 1)")
    _check_known(texts, name, length)
    train, test, owner, test_owner = [], [], [], []
    for author, text in texts.items():
        codes = encode(text)
        cut = len(codes) - round(test_fraction * len(codes))
        windows = _windows(codes[:cut], length, stride)
        train.append(windows)
        test.append(_windows(codes[cut:], length, stride))
        owner += [author] * len(windows)
        test_owner += [author] * len(test[-1])
    if not owner:
        raise ValueError(f"length={length}: no author of {name} has {length + 1} characters")
    rows, held = np.concatenate(train), np.concatenate(test)
    return from_arrays(
        rows[:, :-1], rows[:, -1], held[:, :-1], held[:, -1], num_classes=NUM_CODES, name=name,
        client=owner, client_test=test_owner, codes=True,
    )  # fmt: skip


def _check_known(texts: Mapping[str, str], name: str, length: int) -> None:
    """Refuse texts in other letters; say what few others there are."""
    unknown: Counter[str] = Counter()
    for author, text in texts.items():
        others = Counter(text)
        for letter in VOCABULARY:
            others.pop(letter, None)
        unknown += others
        count = others.total()
        if len(text) > length and count > MOST_UNKNOWN_OF_AUTHOR * len(text):
            raise ValueError(
                f"{name}: {count} of {len(text)} characters of {author!r} are outside the "
                f"vocabulary (printable ASCII and the newline): {_most(others)}; transliterate the "
                "text or leave it out"
            )
    count, total = unknown.total(), sum(map(len, texts.values()))
    words = f"{name}: {count} of {total} characters are outside the vocabulary (printable ASCII "
    words += f"and the newline): {_most(unknown)}"
    if count > MOST_UNKNOWN * total:
        raise ValueError(f"{words}; transliterate the texts")
    if count:
        _log.info(f"{words}; they share one code")


def _most(letters: Counter[str]) -> str:
    """The most frequent characters, with their counts."""
    shown = [f"{letter!r} {count}" for letter, count in letters.most_common(8)]
    return ", ".join([*shown, *(["..."] if len(letters) > 8 else [])])


def _windows(codes: NDArray[np.uint8], length: int, stride: int) -> NDArray[np.int64]:
    """int64 [n, length + 1]."""
    if len(codes) <= length:
        return np.empty((0, length + 1), np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(codes, length + 1)[::stride]
    return windows.astype(np.int64)


def shakespeare(
    data_dir: str | Path | None = None,
    download: bool = False,
    length: int = 80,
    stride: int | None = None,
    test_fraction: float = 0.1,
) -> Arrays:
    """About 40,000 lines of Shakespeare's plays; every speaking role is a client.

    Args:
        data_dir: folder of the file input.txt, speeches as "NAME:" and lines, with empty lines
            between them; None looks in the cache of fetched files.
        download: whether the file is fetched (into data_dir or the cache) and checked.
        length: see `by_author`; also stride and test_fraction.
        stride: see length.
        test_fraction: see length.

    Raises:
        FileNotFoundError: the file is missing; says how to get it.
        ValueError: as `by_author`, or a file without speeches.
    """
    folder = cache_folder("shakespeare") if data_dir is None else Path(data_dir).expanduser()
    path = find(
        _PLAYS,
        names=(_PLAYS.name,),
        folders=[folder],
        download=download,
        hint=", point data_dir at its folder",
    )
    roles: dict[str, list[str]] = {}
    for block in _lines(path).split("\n\n"):
        speech = _SPEECH.fullmatch(block.strip("\n"))
        if speech:
            roles.setdefault(speech[1].strip(), []).append(speech[2] + "\n")
    if not roles:
        raise ValueError(f"{path} has no speeches of the form 'NAME:' and lines")
    return by_author(
        {role: "".join(lines) for role, lines in roles.items()},
        name="shakespeare", length=length, stride=stride, test_fraction=test_fraction,
    )  # fmt: skip


def text_files(
    data_dir: str | Path,
    length: int = 80,
    stride: int | None = None,
    test_fraction: float = 0.1,
) -> Arrays:
    """A folder of plain-text files, *.txt; every file is a client.

    Args:
        data_dir: the folder.
        length: see `by_author`; also stride and test_fraction.
        stride: see length.
        test_fraction: see length.

    Raises:
        FileNotFoundError: no such folder or no file in it.
        ValueError: as `by_author`, or a file that is not UTF-8.
    """
    paths = sorted(Path(data_dir).expanduser().glob("*.txt"))
    if not paths:
        raise FileNotFoundError(f"data_dir={str(data_dir)!r} has no files *.txt")
    return by_author(
        {path.stem: _lines(path) for path in paths},
        name=Path(data_dir).name, length=length, stride=stride, test_fraction=test_fraction,
    )  # fmt: skip


def _lines(path: Path) -> str:
    """The text of a file; lines end with a newline alone."""
    return read_utf8(path).replace("\r\n", "\n").replace("\r", "\n")
