"""Peers whose libraries do not go with ours: a process in an environment of its own.

The process gets its data through a file and one command a line; it times its calls itself, so
that its turns stand beside those of the others. Between its turns it is stopped: threads that wait
busily (OpenMP's for 0.2 seconds) would take the cores from whoever is next.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bench import measure
from bench.machine import ROOT

PYTHON = Path(os.environ.get("BENCH_PEERS_PYTHON", ROOT / ".venv-peers" / "bin" / "python"))


class Child:
    """A runner of `bench.worker` in the peers' environment.

    Args:
        peer: Name of a peer of `bench.worker`, or a module with its `build`.
        folder: For the data; may be removed once this is built.
        options: What the peer needs.
        scale: Of the noise.
        rows: Clients whose results come one by one; None: all results at once.
        python: Of the peer's environment; None: that of `make bench-peers` for pfl and Flower.

    Raises:
        ImportError: The environment or the library is not there.
    """

    def __init__(
        self,
        peer: str,
        folder: str,
        options: Mapping[str, object],
        *,
        scale: float,
        rows: int | None = None,
        python: Path | None = None,
    ) -> None:
        python = python or PYTHON
        if not python.exists():
            raise ImportError(f"no environment {python.parent.parent.name}: make bench-peers")
        self.scale, self.rows = scale, rows
        path = Path(folder) / "problem.pt"
        torch.save(dict(options), path)
        environment = {
            "OMP_NUM_THREADS": str(torch.get_num_threads()), **os.environ, "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [python, "-m", "bench.worker", peer, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        ready = self._read()
        if "error" in ready:
            self.close()
            raise ImportError(ready["error"])
        self.version = ready["version"]

    def _read(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"exit code {self.process.wait()}"}

    def _ask(self, **command: object) -> dict:
        """An answer; the process stands still before and after."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        self.process.send_signal(signal.SIGSTOP)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def run(self) -> float:
        """Seconds of one call."""
        return float(self._ask(do="run", scale=self.scale)["seconds"])

    def restore(self) -> None:
        """The peer does not write over its input."""

    def results(self, scale: float) -> list[Tensor]:
        """Results of one call with noise of this scale."""
        path = Path(self._ask(do="results", scale=scale)["path"])
        rows = torch.load(path)
        path.unlink()
        return rows if self.rows is None else [torch.stack(t) for t in zip(*rows, strict=True)]

    def timer(self) -> measure.Timer:
        return self.run

    def peak_extra(self) -> int | None:
        """`measure.peak_extra` of a call, in the peer's process."""
        return self._ask(do="peak", scale=self.scale)["bytes"]

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.send_signal(signal.SIGCONT)
            self.process.stdin.close()
            self.process.wait(timeout=30)
        if self.process.stdout is not None:
            self.process.stdout.close()
