"""The other end of `bench.child`: runs in a peer's environment, without this package."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import measure


def pfl_laplace(
    tensors: list[Tensor], rows: int | None, clip: float, scale: float
) -> tuple[str, Callable[[float], list[Any]]]:
    """pfl's local Laplace mechanism: one L1 norm and one noise scale for all tensors of a client.

    Without noise only its clipping runs, since its scale is clip / epsilon.
    """
    from importlib.metadata import version

    from pfl.internal.ops import pytorch_ops
    from pfl.internal.ops.selector import set_framework_module
    from pfl.privacy import LaplaceMechanism
    from pfl.stats import MappedVectorStatistics

    set_framework_module(pytorch_ops)

    def run(noise: float) -> list[Any]:
        mechanism = LaplaceMechanism(clip, clip / (noise or scale))
        results = []
        for row in range(rows or 1):
            values = {str(i): t[row] if rows else t for i, t in enumerate(tensors)}
            statistics, _ = mechanism.constrain_sensitivity(MappedVectorStatistics(values))
            if noise:
                statistics, _ = mechanism.add_noise(statistics, 1)
            results.append([statistics[name] for name in values])
        return results if rows else results[0]

    return version("pfl"), run


PEERS = {"pfl_laplace": pfl_laplace}
# Threads of whoever ran before spin for a while and would take the cores.
PAUSE = 0.005


def tensors_of(results: Any) -> Any:
    """Results with every array as a tensor."""
    if isinstance(results, list):
        return [tensors_of(each) for each in results]
    return results if isinstance(results, Tensor) else torch.from_numpy(np.array(results))


def main() -> None:
    """Answer commands until the input ends."""
    peer, path = sys.argv[1:]
    # Whatever a library prints must not be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr

    def say(**answer: object) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        build = PEERS[peer] if peer in PEERS else importlib.import_module(peer).build
        version, run = build(**torch.load(path))
    except Exception as error:
        say(error=f"{type(error).__name__}: {error}")
        return
    say(version=version)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["do"] == "peak":
                again = partial(run, command["scale"])
                say(bytes=measure.peak_extra(again, torch.device("cpu")))
                continue
            time.sleep(PAUSE)
            start = time.perf_counter()
            results = run(command["scale"])
            seconds = time.perf_counter() - start
            time.sleep(PAUSE)
        except Exception as error:
            say(error=f"{type(error).__name__}: {error}")
            continue
        if command["do"] == "run":
            say(seconds=seconds)
            continue
        with tempfile.NamedTemporaryFile(suffix=".pt", delete=False) as file:
            torch.save(tensors_of(results), file)
        say(path=file.name)


if __name__ == "__main__":
    main()
