"""Messages on a local stream: eight bytes of length, then the message."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

_LENGTH = struct.Struct("<Q")


def send_frame(stream: socket.socket, data: bytes) -> None:
    """Write one message."""
    stream.sendall(_LENGTH.pack(len(data)))
    stream.sendall(data)


def receive_frame(stream: socket.socket, most: int) -> bytes:
    """Read one message.

    Args:
        stream: connected; its own timeout counts for each piece.
        most: bytes that a message may have.

    Raises:
        ConnectionError: the other side has gone.
        ValueError: the message is longer.
        TimeoutError: nothing came in time.
    """
    (size,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    if size > most:
        raise ValueError(f"a message of {size} bytes is longer than {most}")
    return bytes(_exactly(stream, size))


def _exactly(stream: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, have = memoryview(data), 0
    while have < size:
        got = stream.recv_into(view[have:])
        if not got:
            raise ConnectionError("the connection ended within a message")
        have += got
    return data


def ask(path: str | Path, request: bytes, *, timeout: float | None = None) -> bytes:
    """One question to the node behind a socket, and its answer.

    Args:
        path: of the socket.
        request: the message.
        timeout: seconds to wait for each piece of the answer; None: for ever.

    Raises:
        OSError: the node is not there, or went away.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.settimeout(timeout)
        stream.connect(str(path))
        send_frame(stream, request)
        return receive_frame(stream, 2**40)
