"""Private steps of packages that need an environment of their own, beside those of this process."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from bench import measure
from bench.child import Child
from bench.machine import ROOT
from bench.steps import LR, Setup, trained


class StepPeer(NamedTuple):
    """A package that steps in a process.

    Attributes:
        environment: Folder with its Python; BENCH_<NAME>_PYTHON names another Python.
        module: Of bench, whose `build` makes the step.
        variant: What `build` is told.
        level: What one norm covers; "none" is a step without privacy.
    """

    environment: str
    module: str
    variant: str
    level: str


PEERS = {
    "JAX, no privacy": StepPeer("jax", "bench.jax_steps", "no privacy", "none"),
    "JAX, vmap by hand": StepPeer("jax", "bench.jax_steps", "vmap", "layer"),
    "jax_privacy": StepPeer("jax", "bench.jax_steps", "jax_privacy", "all"),
    "jax_privacy, nan_safe": StepPeer("jax", "bench.jax_steps", "jax_privacy, nan_safe", "all"),
    "Opake": StepPeer("opake", "bench.opake_steps", "", "all"),
}


class RemoteRunner:
    """`bench.dp_step.StepRunner` of a peer."""

    def __init__(self, setup: Setup, peer: StepPeer) -> None:
        self.setup = setup
        names = list(trained(setup.model))
        members = setup.layout.members if peer.level == "layer" else [tuple(range(len(names)))]
        python = os.environ.get(f"BENCH_{peer.environment.upper()}_PYTHON")
        path = Path(python or ROOT / f".venv-{peer.environment}" / "bin" / "python")
        with tempfile.TemporaryDirectory(prefix="step_") as folder:
            self.child = Child(
                peer.module, folder, python=path, scale=setup.scale, options={
                    "network": setup.name, "variant": peer.variant,
                    "parameters": {n: p.detach() for n, p in trained(setup.model).items()},
                    "x": setup.x, "y": setup.y, "clips": setup.clips.get(peer.level, []),
                    "members": [[names[i] for i in group] for group in members],
                    "lr": LR / setup.size,
                },
            )  # fmt: skip
        self.version = self.child.version

    def run(self) -> None:
        self.child.run()

    def gradients(self, scale: float) -> list[Tensor]:
        """Gradients of a step; every step begins with the first parameters."""
        return self.child.results(scale)

    def timer(self) -> measure.Timer:
        return self.child.run

    def peak_extra(self) -> int | None:
        return self.child.peak_extra()

    def close(self) -> None:
        self.child.close()


def sides(setup: Setup) -> dict[str, tuple]:
    """Name -> (kind, level, what makes a runner) of the peers that can do this step."""
    if setup.p != 2 or setup.device.type != "cpu":
        return {}
    return {
        name: (
            "floor" if peer.level == "none" else "peer", peer.level,
            partial(RemoteRunner, peer=peer),
        )
        for name, peer in PEERS.items()
    }  # fmt: skip
