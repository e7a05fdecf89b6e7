"""Files of an attack: whole or not there at all, and never the ledger's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_lightning.values.plain_json import plain


def write_all(files: Mapping[Path, bytes]) -> list[Path]:
    """Write files, all of them made before the first has its name.

    Args:
        files: contents by path; folders are made where missing. Files of that name are replaced.

    Returns:
        The paths.

    Raises:
        OSError: one cannot be written; none of them has its name then.
    """
    partial = {path: path.with_name(f"{path.name}.partial") for path in files}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(partial[path], path)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return list(files)


def json_bytes(value: Any) -> bytes:
    """Strict JSON for people, UTF-8."""
    return (json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n").encode()
