"""What server and node send each other: a few words as JSON and tensors, in one block of bytes.

The block is a safetensors file, whose metadata holds the words. Nothing in it can be executed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fl_lightning.values.plain_json import plain

_HEAD = "head"


def encode(head: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> bytes:
    """A message as bytes.

    Args:
        head: JSON-like words; infinities become strings.
        tensors: by name, on any device.
    """
    from safetensors.torch import save

    held = {n: t.detach().cpu().contiguous() for n, t in (tensors or {}).items()}
    text = json.dumps(plain(head), allow_nan=False, separators=(",", ":"))
    return save(held, metadata={_HEAD: text})


def decode(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The words and tensors of a message.

    Raises:
        ValueError: it is no message.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)  # checks the whole file, its length included
        (size,) = struct.unpack_from("<Q", data)
        head = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_HEAD])
    except (SafetensorError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ValueError(f"message of {len(data)} bytes cannot be read: {error}") from error
    if not isinstance(head, dict):
        raise ValueError(f"message has {type(head).__name__} for its words, not an object")
    return head, tensors
