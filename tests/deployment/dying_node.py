"""Node services that kill themselves at a place; forks of one process that has imported everything.

Reads orders from stdin, one JSON object a line: the `folder` of the node, whether it is a
`simulation`, and the `place` where it dies when it comes there for the `number`-th time ("": it
lives). Says the process id, and its exit code once it has ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fl_lightning.deploy import client_run, node, service
from fl_lightning.ledger import Ledger, chain
from tests.fl_lightning import nodes

# Name → (object, attribute, before or after it is called).
PLACES: dict[str, tuple[Any, str, str]] = {
    "before the socket": (service, "listen", "before"),
    "hello": (node.Node, "_hello", "before"),
    "before a run is begun": (client_run, "begin_run", "before"),
    "ledger begun, terms not kept": (client_run, "_write_whole", "before"),
    "joined, not answered": (node.Node, "_join", "after"),
    "before training": (client_run.ClientRun, "_release", "before"),
    "before the ledger line": (Ledger, "append", "before"),
    "half a ledger line": (chain, "write_all", "half"),
    "line in the file, head old": (chain, "write_head", "before"),
    "after the ledger line": (Ledger, "append", "after"),
    "half a checkpoint": (client_run.AtomicCheckpointIO, "save_checkpoint", "half"),
    "after the checkpoint": (client_run.ClientRun, "_save", "after"),
    "before the answer": (service, "send_frame", "before"),
    "half the answer": (service, "send_frame", "half"),
    "after the answer": (service, "send_frame", "after"),
}


def die() -> None:
    """As if the power had failed for this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def _half(where: Any, name: str, original: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Do half of a write."""
    if name == "write_all":
        descriptor, data = arguments
        os.write(descriptor, data[: len(data) // 2])
    elif name == "send_frame":
        stream, data = arguments
        stream.sendall(len(data).to_bytes(8, "little") + data[: len(data) // 2])
    else:
        *others, path = arguments
        original(*others, partial := Path(f"{path}.partial"))
        os.truncate(partial, partial.stat().st_size // 2)


def arm(place: str, number: int) -> None:
    """Let the process die when it comes to a place for so many a time."""
    where, name, when = PLACES[place]
    original, seen = getattr(where, name), [0]

    def call(*arguments: Any, **options: Any) -> Any:
        seen[0] += 1
        if seen[0] == number and when != "after":
            if when == "half":
                _half(where, name, original, arguments)
            die()
        result = original(*arguments, **options)
        if seen[0] == number:
            die()
        return result

    setattr(where, name, call)


def serve(folder: str, place: str, number: int, simulation: bool) -> None:
    """The service of client 0, in a child; it ends by a signal alone."""
    made = nodes.node(Path(folder), 0, simulation=simulation)
    if place:
        arm(place, number)
    service.serve(Path(folder) / "node.sock", made.answer, most=1 << 20)


def main() -> None:
    """Fork a service for every order, and wait for its end."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            serve(**json.loads(line))
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
