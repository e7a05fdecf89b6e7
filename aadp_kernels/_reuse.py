"""Remembers which noise a key has drawn, so that none is drawn for two releases."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from threading import Lock

from aadp_kernels.contract import Segment

Spans = tuple[tuple[int, int], ...]  # sorted, disjoint, not touching: [start, stop)

_MOST_WAITING = 64


class ReusedNoiseError(ValueError):
    """Noise that this key has drawn before: two releases with it reveal their difference."""


class _Stream:
    """The last step of every client in one (domain, layer), and the elements drawn in it."""

    __slots__ = ("last", "newest")

    def __init__(self) -> None:
        self.newest = -1
        self.last: dict[int, tuple[int, Spans]] = {}

    def conflict(self, step: int, clients: Sequence[int], start: int, stop: int) -> int | None:
        """A client whose elements may have been drawn: at a later step, or in this one."""
        for client in clients:
            if client in self.last:
                last, spans = self.last[client]
                if step < last or (step == last and _overlap(spans, start, stop)):
                    return client
        return None

    def record(self, step: int, clients: Sequence[int], start: int, stop: int) -> None:
        """Note elements that do not conflict."""
        drawn: dict[int, tuple[int, Spans]] = dict.fromkeys(clients, (step, ((start, stop),)))
        if step <= self.newest:
            for client in clients:
                if client in self.last and self.last[client][0] == step:
                    drawn[client] = (step, _joined(self.last[client][1], start, stop))
        self.last.update(drawn)
        self.newest = max(self.newest, step)


def _overlap(spans: Spans, start: int, stop: int) -> bool:
    return any(start < end and begin < stop for begin, end in spans)


def _joined(spans: Spans, start: int, stop: int) -> Spans:
    """The spans with a disjoint one more; those that touch become one."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted((*spans, (start, stop))):
        if joined and joined[-1][1] == begin:
            begin = joined.pop()[0]
        joined.append((begin, end))
    return tuple(joined)


def _same_but_step(
    waiting: tuple[str, int, Sequence[int], Sequence[Segment]],
    domain: str,
    clients: Sequence[int],
    segments: Sequence[Segment],
) -> bool:
    """Whether a later step of these entries nothing that the one that waits would not."""
    return waiting[3] is segments and waiting[0] == domain and waiting[2] == clients


class UsedNoise:
    """Keeps the last step that a key drew for each (domain, layer, client), and its elements.

    Steps of a stream must not decrease; elements of one step may come in disjoint pieces.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._streams: defaultdict[tuple[str, int], _Stream] = defaultdict(_Stream)
        self._newest: dict[str, int] = {}
        self._waiting: list[tuple[str, int, Sequence[int], Sequence[Segment]]] = []

    def claim(
        self, domain: str, step: int, clients: Sequence[int], segments: Sequence[Segment]
    ) -> None:
        """Note the elements of the segments for all clients, or raise and note nothing.

        Raises:
            ReusedNoiseError: Elements that were drawn in this step, a step lower than the last, or
                a client that appears twice.
        """
        if len(clients) > 1 and len(set(clients)) < len(clients):
            raise ReusedNoiseError("client must hold every id once: rows with one id share noise")
        with self._lock:
            # Noise of a later step than any before is new: it is entered when somebody asks.
            if step <= self._newest.get(domain, -1):
                self._enter()
                self._refuse_conflicts(domain, step, clients, segments)
            else:
                self._newest[domain] = step
                last = self._waiting[-1] if self._waiting else None
                if last is not None and _same_but_step(last, domain, clients, segments):
                    # A step takes the place of the last one of the same elements and clients.
                    self._waiting.pop()
            self._waiting.append((domain, step, clients, segments))
            if len(self._waiting) >= _MOST_WAITING:
                self._enter()

    def _enter(self) -> None:
        """Enter what waits into the streams, in order."""
        for domain, step, clients, segments in self._waiting:
            for layer, start, count in segments:
                if count:
                    self._streams[domain, layer].record(step, clients, start, start + count)
        self._waiting.clear()

    def _refuse_conflicts(
        self, domain: str, step: int, clients: Sequence[int], segments: Sequence[Segment]
    ) -> None:
        """Raise if elements may have been drawn."""
        for layer, start, count in segments:
            if not count or (domain, layer) not in self._streams:
                continue
            stream = self._streams[domain, layer]
            client = stream.conflict(step, clients, start, start + count)
            if client is not None:
                raise ReusedNoiseError(
                    f"step {step} of client {client}, layer {layer} must be released once: "
                    "this key has drawn its noise, or that of a later step, before"
                )
