"""A node's identity, for other holders' lists: `python -m fl_lightning.deploy.secure_sum DIR`.

DIR is the node's private folder; an identity is made where there is none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fl_lightning.deploy.secure_sum.keys import Identity
from fl_lightning.deploy.secure_sum.node import IDENTITY_FILE


def main(arguments: Sequence[str]) -> int:
    """Print the identity's name; exit code 2 where there is no such folder."""
    if len(arguments) != 1:
        print("error: give the node's private folder, to print its identity", file=sys.stderr)
        return 2
    folder = Path(arguments[0]).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        print(Identity.kept_in(folder / IDENTITY_FILE).name)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
