"""The resident service of a node: one local socket, one request at a time."""

from __future__ import annotations

import contextlib
import grp
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
    group: str | None = None,
    answer_seconds: float = 0.0,
    ready: Callable[[], None] = lambda: None,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Answer requests until it is stopped; the request under way is finished first.

    Args:
        path: of the socket; one that a dead process left is replaced.
        answer: message → message; it never raises for what a request holds.
        most: bytes that a request may have.
        group: whose members may ask besides the owner; None: nobody.
        answer_seconds: an answer leaves no earlier than so long after its request came.
        ready: called once requests are taken.
        stopped: whether to end, asked several times a second.

    Raises:
        OSError: the socket cannot be made, or a living process has it.
    """
    with listen(path, group) as door:
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
def listen(path: Path, group: str | None = None):
    """A listening socket that its owner alone can reach (mode 600), or a group too (mode 660).

    Raises:
        OSError: it cannot be made or given to the group, or a living process has it.
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
        if group is not None:
            _give(path, group)
        door.listen(16)
        yield door
    finally:
        door.close()
        path.unlink(missing_ok=True)


def _give(path: Path, group: str) -> None:
    """Let a group's members ask; nobody can before."""
    try:
        os.chown(path, -1, grp.getgrnam(group).gr_gid)
        path.chmod(0o660)
    except (KeyError, OSError) as error:
        raise OSError(f"socket_group={group} cannot be given {path}: {error}") from error


def _alive(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        try:
            stream.connect(str(path))
        except OSError:
            return False
        return True
