"""Packages of some tests, asked for where they are used: the other tests of a file need none."""

from __future__ import annotations

from typing import Any

import pytest


class Late:
    """A module that is imported with the first use; a test that uses one that is not there skips.

    Args:
        name: Of the module.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        # pytest looks at everything in a test file for its own marks.
        if attribute.startswith("_") or attribute == "pytestmark":
            raise AttributeError(attribute)
        return getattr(pytest.importorskip(self._name, exc_type=ImportError), attribute)


stats = Late("scipy.stats")
