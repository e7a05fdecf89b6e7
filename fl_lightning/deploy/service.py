"""The resident service of a node: one local socket, one request at a time."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

from fl_lightning.deploy.frames import receive_frame, send_frame

_LOG = logging.getLogger("fl_lightning.deploy")
# A messenger that sends nothing for so long is hung up on: others wait behind it.
_PATIENCE = 30.0


def serve(
    path: Path,
    answer: Callable[[bytes], bytes],
    *,
    most: int,
    answer_seconds: float = 0.0,
    ready: Callable[[], None] = lambda: None,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Answer requests until it is stopped; the request under way is finished first.

    Args:
        path: of the socket; one that a dead process left is replaced.
        answer: message → message; it never raises for what a request holds.
        most: bytes that a request may have.
        answer_seconds: an answer leaves no earlier than so long after its request came.
        ready: called once requests are taken.
        stopped: whether to end, asked several times a second.

    Raises:
        OSError: the socket cannot be made, or a living process has it.
    """
    with listen(path) as door:
        ready()
        door.settimeout(0.2)
        while not stopped():
            try:
                stream, _ = door.accept()
            except TimeoutError:
                continue
            with stream, contextlib.suppress(OSError, ValueError):
                stream.settimeout(_PATIENCE)
                request = receive_frame(stream, most)
                begun = time.monotonic()
                reply = answer(request)
                time.sleep(max(0.0, begun + answer_seconds - time.monotonic()))
                send_frame(stream, reply)


@contextlib.contextmanager
def listen(path: Path):
    """A listening socket that its owner alone can reach (mode 600).

    Give the messenger another user's right to it by the group of the socket's folder, or by an ACL.
    """
    if path.exists():
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise OSError(f"socket={path} is a file, not a socket")
        if _alive(path):
            raise OSError(f"socket={path} belongs to a node that is running")
        path.unlink()
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        door.bind(str(path))
    except OSError as error:
        door.close()
        raise OSError(f"socket={path} cannot be made: {error}") from error
    finally:
        os.umask(mask)
    try:
        door.listen(16)
        yield door
    finally:
        door.close()
        path.unlink(missing_ok=True)


def _alive(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        try:
            stream.connect(str(path))
        except OSError:
            return False
        return True
