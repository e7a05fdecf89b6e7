"""Messages between server and node: what goes in comes out, and nothing else is read."""

import json
import struct

import pytest
import torch

from fl_lightning.values.message import decode, encode


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"a": torch.arange(6).view(2, 3), "b": torch.tensor(1.5), "": torch.zeros(0)},
        {"turned": torch.arange(6.0).view(2, 3).T},
    ],
)
def test_words_and_tensors_come_back(tensors):
    head = {"do": "release", "round": 3, "epsilon": 8.0, "list": [1, None, "ε"]}
    words, found = decode(encode(head, tensors))
    assert words == head
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def raw(header: dict, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 8,
        encode({"do": "hello"})[:-1],
        encode({"do": "hello"}) + b"x",
        raw({}),
        raw({"__metadata__": {"head": "{"}}),
        raw({"__metadata__": {"head": "[1]"}}),
        raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
             "__metadata__": {"head": "{}"}}),
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused(data):
    with pytest.raises(ValueError, match="message"):
        decode(data)
