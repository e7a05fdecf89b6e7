"""What the first line of a ledger must say, and which versions of it this code reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fl_lightning.values.plain_json import plain

# Of what this version writes; a header without `schema` is of schema 0. See docs/ledger.md.
# Readers of schema 1 alone would charge rounds that share noise one by one, which is too little.
# Lines of private evaluations have a schema of their own, since such readers know no such lines.
SCHEMA, CORRELATED_SCHEMA, EVALUATION_SCHEMA = 1, 2, 3
NEWEST = EVALUATION_SCHEMA
SETTINGS = (
    "record+local",
    "client+local",
    "client+aggregator",
    "client+secure_sum",
    "abstract",
    "none",
)
REQUIRED_FACTS = (
    "setting",
    "privacy_unit",
    "trust",
    "adjacency",
    "mechanism",
    "delta",
    "epsilon",
    "simulated",
)


def check_schema(header: Mapping[str, Any]) -> None:
    """Refuse a header that a newer version has written.

    Raises:
        ValueError: with its schema.
    """
    schema = header.get("schema", 0)
    if not isinstance(schema, int) or isinstance(schema, bool) or not 0 <= schema <= NEWEST:
        raise ValueError(
            f"is of schema {schema!r}: this version reads schemas 0 to {NEWEST}, take a newer one"
        )


def check_facts(header: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a new header as strict JSON.

    Raises:
        ValueError: a required fact is missing or makes no sense.
    """
    missing = [name for name in REQUIRED_FACTS if name not in header]
    if missing:
        raise ValueError(f"header must have {', '.join(missing)}, got {sorted(header)}")
    if header["setting"] not in SETTINGS:
        raise ValueError(f"header['setting'] must be one of {SETTINGS}, got {header['setting']!r}")
    if not isinstance(header["simulated"], bool):
        raise ValueError(f"header['simulated'] must be a bool, got {header['simulated']!r}")
    return plain(header)
