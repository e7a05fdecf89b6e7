"""Lightning's DDP for runs whose processes share cohorts of clients."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy
from torch.distributed.constants import default_pg_timeout

from fl_lightning.processes.launching import StoppableLauncher, stop_of
from fl_lightning.processes.lifeline import Lifeline
from fl_lightning.processes.stopping import Stop
from fl_lightning.processes.together import Processes


class ClientParallelStrategy(DDPStrategy):
    """One process a device; each trains its part of every cohort (`--trainer.strategy ddp`).

    It launches and connects the processes as Lightning's DDP does. The model is not wrapped: no
    gradient is computed by a backward pass of the module, so there is nothing to hook, nothing to
    find unused, and no buffer to send.

    Args:
        process_group_backend: of the sums; None: nccl on GPUs, gloo on CPUs.
        timeout: after which a process that does not answer is given up.
    """

    def __init__(
        self,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        **kwargs: Any,
    ) -> None:
        known = {"accelerator", "parallel_devices", "cluster_environment", "checkpoint_io"}
        unknown = set(kwargs) - known - {"precision_plugin"}
        if unknown:
            raise ValueError(f"{sorted(unknown)[0]}={kwargs[sorted(unknown)[0]]!r} is no option")
        super().__init__(process_group_backend=process_group_backend, timeout=timeout, **kwargs)
        self._processes: Processes | None = None
        self._stop = Stop()

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = StoppableLauncher(
            self.cluster_environment, self.num_processes, self.num_nodes, begin=self._begin
        )

    def _begin(self, trainer: pl.Trainer) -> Stop:
        """Before anything is done: what stops this process, of the Trainer's or its own."""
        self._stop = stop_of(trainer, self._stop)
        return self._stop

    def setup_distributed(self) -> None:
        """Connect the processes, once."""
        super().setup_distributed()
        if self._processes is None:
            self._processes = self._connect()

    def _connect(self) -> Processes:
        if self.world_size == 1:
            return Processes()
        processes = Processes.all(self.root_device, self._stop)
        assert self.cluster_environment is not None
        line = Lifeline.connect(processes, self.cluster_environment.main_address)
        self._stop.join(line, processes.rank)
        return processes

    @property
    def processes(self) -> Processes:
        """The processes of the run, once they are connected."""
        assert self._processes is not None
        return self._processes

    def configure_ddp(self) -> None:
        """Leave the module as it is."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Rank 0 writes; if it cannot, every process raises its error."""
        save = super().save_checkpoint
        self.processes.first(lambda: save(checkpoint, filepath, storage_options))


def processes_of(trainer: pl.Trainer) -> Processes:
    """The processes that a Trainer runs in."""
    strategy = trainer.strategy
    return strategy.processes if isinstance(strategy, ClientParallelStrategy) else Processes()
