"""Text files of users: UTF-8, with or without a byte order mark."""

from __future__ import annotations

from pathlib import Path


def read_utf8(path: Path) -> str:
    """The whole text of a file, without a byte order mark; line ends as they are.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8; names the file and the first byte that is not.
    """
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at {error.start} "
            f"({error.reason}); save it as UTF-8"
        ) from error
