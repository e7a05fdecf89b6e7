"""Sockets between process 0 and every other one, read by a thread while work goes on.

A process that waits in a collective, or computes for minutes, hears of nothing else. Over a
lifeline it hears at once that the run is to stop, and the kernel closes the lifeline of a process
that was killed.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from contextlib import suppress

from fl_lightning.processes.together import Processes

DONE = 255  # the process has no more work; its end is no loss
_CONNECT = 60.0  # seconds
_TOKEN, _RANK = 16, 4  # bytes


class Lifeline:
    """One process's sockets: to all others in process 0, to process 0 elsewhere.

    Args:
        peers: connected sockets by rank.
    """

    def __init__(self, peers: dict[int, socket.socket]) -> None:
        self._peers = peers
        for peer in peers.values():
            peer.setblocking(False)
            _notice_dead_machines(peer)

    @classmethod
    def connect(cls, processes: Processes, address: str) -> Lifeline:
        """Connect the processes of a run; collective.

        Args:
            processes: of the run, at least two.
            address: of the machine of process 0, as the others see it.

        Raises:
            OSError: a process cannot be reached.
        """
        server = _listen(address) if processes.rank == 0 else None

        def meeting() -> tuple[int, bytes]:
            assert server is not None
            return server.getsockname()[1], secrets.token_bytes(_TOKEN)

        port, token = processes.first(meeting)
        if server is not None:
            with server:
                return cls(_accept(server, processes.size - 1, token))
        peer = socket.create_connection((address, port), timeout=_CONNECT)
        peer.sendall(token + processes.rank.to_bytes(_RANK, "big"))
        return cls({0: peer})

    @property
    def sockets(self) -> Sequence[socket.socket]:
        """To wait for."""
        return list(self._peers.values())

    def tell(self, word: int) -> None:
        """Send a number in [0, 255] to all peers that are there."""
        for peer in self.sockets:
            with suppress(OSError):
                peer.send(bytes([word]))

    def hear(self) -> list[tuple[int, int | None]]:
        """(rank, word) of what has arrived; None for a word: the peer is gone without DONE."""
        heard: list[tuple[int, int | None]] = []
        for rank, peer in list(self._peers.items()):
            try:
                words = peer.recv(64)
            except BlockingIOError:
                continue
            except OSError:
                words = b""
            heard += [(rank, word) for word in words]
            if not words:
                heard.append((rank, None))
            if not words or DONE in words:
                self._drop(rank)
        return heard

    def close(self) -> None:
        """Close all sockets: to the peers, this process is gone."""
        for rank in list(self._peers):
            self._drop(rank)

    def _drop(self, rank: int) -> None:
        peer = self._peers.pop(rank, None)  # two threads may close
        if peer is not None:
            peer.close()


def _listen(address: str) -> socket.socket:
    if address in ("localhost", "127.0.0.1"):
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accept(server: socket.socket, count: int, token: bytes) -> dict[int, socket.socket]:
    """Peers by rank; whoever does not know the token is sent away."""
    server.settimeout(_CONNECT)
    peers: dict[int, socket.socket] = {}
    while len(peers) < count:
        peer, _ = server.accept()
        peer.settimeout(_CONNECT)
        try:
            hello = peer.recv(_TOKEN + _RANK, socket.MSG_WAITALL)
        except OSError:
            hello = b""
        if secrets.compare_digest(hello[:_TOKEN], token) and len(hello) == _TOKEN + _RANK:
            peers[int.from_bytes(hello[_TOKEN:], "big")] = peer
        else:
            peer.close()
    return peers


def _notice_dead_machines(peer: socket.socket) -> None:
    """Let the kernel ask a silent peer whether it is there: after 10 s, six times."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
