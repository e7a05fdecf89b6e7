"""Refuses a Python that lacks what fl_lightning needs, and says in one line what that is."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

# Import names of the extra `federated` of pyproject.toml, beside torch and numpy.
PACKAGES = (
    "pytorch_lightning",
    "torchmetrics",
    "wandb",
    "dp_accounting",
    "jsonargparse",
    "rich",
    "matplotlib",
    "sklearn",
    "pooch",
    "safetensors",
    "scipy",
)


def check_system() -> None:
    """Refuses a system that is not POSIX, before anything else is imported.

    A ledger is locked by ``fcntl``, and a forked child must forget that it holds the lock.

    Raises:
        ImportError: naming what the system lacks.
    """
    lacks = [] if find_spec("fcntl") else ["fcntl"]
    lacks += [] if hasattr(os, "register_at_fork") else ["os.register_at_fork"]
    if lacks:
        raise ImportError(
            f"fl_lightning runs on Linux and macOS; this Python ({sys.platform}) has no "
            f"{' and no '.join(lacks)}, by which one process alone writes a ledger. aadp_kernels "
            "works here",
            name="fl_lightning",
        )


def installed(name: str) -> bool:
    """Whether a package can be found; a finder that refuses it has not found it."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


# Without it nothing works; a bare GPU machine may lack others and still benchmark.
ESSENTIAL = ("pytorch_lightning",)


def check_packages(needed: Sequence[str] = PACKAGES) -> None:
    """Refuses a Python that has the kernels' packages alone. Nothing is imported for this.

    Args:
        needed: packages without one of which it is refused.

    Raises:
        ModuleNotFoundError: naming the missing packages and the extra that brings them.
    """
    missing = [name for name in PACKAGES if not installed(name)]
    if set(missing) & set(needed):
        raise ModuleNotFoundError(
            f"fl_lightning needs packages that are not installed ({', '.join(missing)}): "
            "pip install 'aadp-fl[federated]'",
            name="fl_lightning",
        )
