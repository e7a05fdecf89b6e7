"""Files of public data sets: found on this machine, or fetched once and checked by their sums."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RemoteFile:
    """A file of a public data set.

    Args:
        name: its name in the data folder.
        url: where it can be fetched.
        known_hash: "md5:..." or "sha256:..." of its content.
    """

    name: str
    url: str
    known_hash: str


def cache_folder(dataset: str) -> Path:
    """Where fetched files lie: the user's cache folder, or $AADP_FL_DATA_DIR."""
    import pooch

    folder = Path(os.environ.get("AADP_FL_DATA_DIR") or pooch.os_cache("aadp-fl"))
    return folder.expanduser() / dataset


def find(
    remote: RemoteFile,
    *,
    names: Sequence[str],
    folders: Sequence[Path],
    download: bool,
    hint: str,
) -> Path:
    """The first of `names` in the first of `folders`; otherwise the fetched file.

    Args:
        remote: what to fetch.
        names: acceptable file names, such as with and without ".gz".
        folders: where to look; what is fetched goes into the last one.
        download: whether fetching is allowed.
        hint: other ways to get the file, for the error message.

    Raises:
        FileNotFoundError: it is nowhere, and may not or cannot be fetched.
        ValueError: what came does not have the expected checksum.
    """
    for folder in folders:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    if not download:
        raise FileNotFoundError(
            f"{remote.name} is not in {' or '.join(map(str, folders))}. Ways to get the data: "
            f"set download to true{hint}, or fetch {remote.url} yourself into {folders[-1]}"
        )
    return _fetch(remote, folders[-1])


def _fetch(remote: RemoteFile, folder: Path) -> Path:
    import pooch
    import requests

    try:
        path = pooch.retrieve(
            remote.url, remote.known_hash, fname=remote.name, path=folder, progressbar=False
        )
    except (requests.RequestException, ConnectionError) as error:
        raise FileNotFoundError(
            f"{remote.url} cannot be fetched: {error}. Put {remote.name} into {folder} yourself"
        ) from error
    return Path(path)
