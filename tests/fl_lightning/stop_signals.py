"""Signals of tests that stop processes."""

from __future__ import annotations

import signal
import time

from fl_lightning.processes.stopping import Stop

TERM, HUP, INT = signal.SIGTERM, signal.SIGHUP, signal.SIGINT


def asked_by(stop: Stop, seconds: float) -> int | None:
    """What a stop is asked for, waiting no longer than some seconds."""
    until = time.monotonic() + seconds
    while stop.asked is None and time.monotonic() < until:
        time.sleep(0.01)
    return stop.asked
