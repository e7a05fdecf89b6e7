"""What a server sees of a run: every release, with the model that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from fl_lightning.values.round import Params, PrivateUpdate

# (round, global model, release): everything there is public or about to be.
Observer = Callable[[int, Params, PrivateUpdate], None]


class Witness(pl.Callback):
    """Shows every release of a run to observers, after it is in the ledger.

    Args:
        observers: called once a group of clients that release together. `sim_only` is taken out of
            what they see.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stand between the clients and the server."""
        if pl_module.run is None:
            raise RuntimeError("the run has not begun, so its releases cannot be watched")
        pl_module.run = replace(
            pl_module.run, releases=_Watched(pl_module.run.releases, self.observers)
        )


class _Watched:
    """Releases as they are, each shown on its way."""

    def __init__(self, releases: Any, observers: Sequence[Observer]) -> None:
        self._releases = releases
        self._observers = observers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._releases, name)

    def release(self, clients: Tensor, params: Params, round: int, context: str) -> PrivateUpdate:
        """The release, unchanged."""
        update = self._releases.release(clients, params, round, context)
        seen = replace(update, sim_only={})
        for observer in self._observers:
            observer(round, params, seen)
        return update
