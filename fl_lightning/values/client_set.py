"""Sets of client ids as text: how a ledger line says who could have been in a sum.

Two spellings, of which a set has the shorter one, the first where both are equally long:
`0-4,7,9-11`, ascending ranges; `bits:` and the base64 of a bitmap, in which bit i of byte j is
client 8·j + i.
"""

from __future__ import annotations

import base64
import binascii
import functools

import numpy as np

_BITS = "bits:"


def encode(ids: np.ndarray) -> str:
    """The text of a set.

    Args:
        ids: ascending, without repetition, >= 0, at least one; integers [n].

    Raises:
        ValueError: they are not.
    """
    ids = np.asarray(ids, dtype=np.int64)
    if ids.ndim != 1 or not len(ids) or ids[0] < 0 or not (np.diff(ids) > 0).all():
        raise ValueError("clients must be ascending ids >= 0, at least one")
    ends = np.flatnonzero(np.diff(ids) > 1)
    first, last = ids[np.append(0, ends + 1)], ids[np.append(ends, len(ids) - 1)]
    ranges = ",".join(
        str(a) if a == b else f"{a}-{b}" for a, b in zip(first.tolist(), last.tolist(), strict=True)
    )
    if len(ranges) <= len(_BITS) + 4 * -(-(int(ids[-1]) // 8 + 1) // 3):
        return ranges
    present = np.zeros(int(ids[-1]) + 1, dtype=np.uint8)
    present[ids] = 1
    packed = np.packbits(present, bitorder="little").tobytes()
    return _BITS + base64.b64encode(packed).decode()


@functools.lru_cache(maxsize=16)
def decode(text: str) -> np.ndarray:
    """The ids of a set, ascending; int64 [n], read-only.

    Raises:
        ValueError: it is no text that `encode` writes.
    """
    try:
        if text.startswith(_BITS):
            packed = np.frombuffer(base64.b64decode(text[len(_BITS) :], validate=True), np.uint8)
            ids = np.flatnonzero(np.unpackbits(packed, bitorder="little"))
        else:
            parts = [[int(end) for end in part.split("-")] for part in text.split(",")]
            if sum(part[-1] - part[0] for part in parts) > 2**32:
                raise ValueError
            ids = np.concatenate([np.arange(part[0], part[-1] + 1) for part in parts])
        same = encode(ids) == text
    except (ValueError, binascii.Error):
        same, ids = False, np.empty(0)
    if not same:
        raise ValueError(f"clients must be a set of ids as text, got {text[:40]!r}")
    ids = ids.astype(np.int64)
    ids.setflags(write=False)
    return ids
