"""The server's half on Flower: messages to the nodes of a grid, and the run that sends them."""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Message, RecordDict  # pyright: ignore[reportMissingImports]

from fl_lightning.deploy.secure_sum.federated import with_secure_sums
from fl_lightning.fit import main
from fl_lightning.release.agreement import PROTOCOL
from fl_lightning.release.federation import (
    Federation,
    Member,
    number_members,
    parse_member,
    read_members,
    shared,
)
from fl_lightning.values.message import decode, encode

_LOG = logging.getLogger("pytorch_lightning")
_POLL = 0.1


class FlowerNodes:
    """The nodes of a Flower grid by their own names.

    A SuperNode's id may change when it starts again; the name of the node service behind it stays.

    Args:
        grid: of the run.
        timeout: seconds that a question waits for its answers, and that it is worth answering.
        patience: seconds to wait for nodes where there are too few, or none of those asked.
    """

    def __init__(self, grid: Any, timeout: float, patience: float) -> None:
        self._grid = grid
        self._timeout = timeout
        self._patience = patience
        self._members: dict[int, Member] = {}  # by the id of the SuperNode
        self._silent: dict[int, float] = {}

    def known(self) -> dict[int, Member]:
        """Nodes that are connected and have said who they are, by the ids of their SuperNodes."""
        there = set(self._grid.get_node_ids())
        now = time.monotonic()
        strangers = [k for k in there - set(self._members) if now > self._silent.get(k, 0.0)]
        hello = encode({"do": "hello"})
        found = self._send(dict.fromkeys(strangers, hello), min(self._timeout, 60.0))
        for node_id in strangers:
            try:
                head, _ = decode(found[node_id])
                if head.get("protocol") != PROTOCOL:
                    raise ValueError(f"protocol {head.get('protocol')}, here it is {PROTOCOL}")
                self._members[node_id] = parse_member(head)
            except (KeyError, ValueError) as error:
                _LOG.warning(f"node {node_id} is left out for a minute: {error!r}")
                self._silent[node_id] = now + 60.0
        return {k: m for k, m in self._members.items() if k in there}

    def wait_for(self, count: int, names: Collection[str] | None = None) -> list[Member]:
        """At least so many nodes, of these names or of any.

        Raises:
            ValueError: they do not come in time.
        """
        end = time.monotonic() + self._patience
        while True:
            known = [m for m in self.known().values() if names is None or m.name in names]
            if len(known) >= count:
                return known
            if time.monotonic() > end:
                raise ValueError(
                    f"nodes={count}: only {len(known)} came within "
                    f"patience={self._patience:g} seconds"
                )
            time.sleep(1.0)

    def ask(self, names: Sequence[str], requests: Mapping[int, bytes]) -> dict[int, bytes]:
        """Messages by client number → answers of those that are there and answer in time.

        While nobody is there, it waits: rounds must not go by without any node.

        Args:
            names: of the clients' nodes, by client number.
            requests: by client number.

        Raises:
            ValueError: none of the nodes comes back in time.
        """
        if requests:
            self.wait_for(1, {names[k] for k in requests})
        at = {member.name: node_id for node_id, member in self.known().items()}
        ids = {at[names[k]]: k for k in requests if names[k] in at}
        found = self._send({node_id: requests[k] for node_id, k in ids.items()}, self._timeout)
        return {ids[node_id]: data for node_id, data in found.items()}

    def _send(self, requests: Mapping[int, bytes], timeout: float) -> dict[int, bytes]:
        if not requests:
            return {}
        messages = [
            Message(_content(data), node_id, "train", ttl=timeout)
            for node_id, data in requests.items()
        ]
        waiting, found = set(self._grid.push_messages(messages)) - {""}, {}
        end = time.monotonic() + timeout
        while waiting and time.monotonic() < end:
            for reply in self._grid.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                if reply.has_content() and "message" in reply.content:
                    found[reply.metadata.src_node_id] = reply.content["message"]["bytes"].data
                elif reply.has_content():
                    _LOG.warning(f"a node service cannot be reached: {reply.content['failed']}")
            if waiting:
                time.sleep(_POLL)
        return found


def _content(data: bytes) -> RecordDict:
    block = Array(dtype="uint8", shape=(len(data),), stype="aadp.message", data=data)
    return RecordDict({"message": ArrayRecord({"bytes": block})})


def fit(grid: Any, options: Mapping[str, Any]) -> None:
    """Run `fl_lightning.fit` with the nodes of a grid for its clients.

    Args:
        grid: of the Flower run.
        options: config, arguments, run-dir, nodes, patience, round-timeout and corrupt of the app.

    Raises:
        Exception: the run is refused, or cannot go on; Flower logs why.
    """
    # By a SystemExit the process would end before Flower has sent its log, and with it the reason.
    os.environ["AADP_FL_TRACEBACK"] = "1"
    nodes = FlowerNodes(grid, float(options["round-timeout"]), float(options["patience"]))
    folder = Path(str(options["run-dir"])).expanduser()
    if not str(options["run-dir"]):
        raise ValueError("run-dir must name the folder of the run on the server")
    members = read_members(folder) if folder.is_dir() else None
    came = nodes.wait_for(int(options["nodes"]))
    members = members or number_members(came)
    names = [member.name for member in members]
    federation = with_secure_sums(
        Federation(members, lambda requests: nodes.ask(names, requests)), int(options["corrupt"])
    )
    main(run_arguments(members, folder, options), federation=federation)
    try:
        federation.end()
    except ValueError as error:
        _LOG.warning(f"the run has ended, and no node has heard of it: {error}")


def run_arguments(members: Sequence[Member], folder: Path, options: Mapping[str, Any]) -> list[str]:
    """The command line of the run: the user's options, and what the nodes' holders promise."""
    config = ["--config", str(options["config"])] if str(options["config"]) else []
    return [
        *config,
        *shlex.split(str(options["arguments"])),
        f"--data.num_clients={len(members)}",
        f"--privacy.epsilon={json.dumps(shared([m.epsilon for m in members]))}",
        f"--privacy.delta={json.dumps(shared([m.delta for m in members]))}",
        f"--run_dir={folder}",
        "--ckpt_path=auto",
    ]
