"""Lightning's launcher and its signals, in a run that can be stopped.

Lightning answers SIGTERM by a broadcast from within the signal handler, which meets whatever
collective the others are in, and its observer kills process 0 when another one has ended by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from lightning_fabric.strategies.launchers.subprocess_script import (
    _basic_subprocess_cmd,
    _hydra_subprocess_cmd,
)
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from pytorch_lightning.trainer.states import TrainerFn

from fl_lightning.processes.child import behind
from fl_lightning.processes.stopping import LOST, Stop, Stopped
from fl_lightning.processes.together import ProcessLost


class _Signals:
    """In the place of Lightning's signal connector: leaves signals to a `Stop`."""

    received_sigterm = False  # Lightning's loops would end, each process at a place of its own

    def __init__(self, trainer: pl.Trainer, stop: Stop) -> None:
        self.trainer = trainer
        self.stop = stop

    def register_signal_handlers(self) -> None:
        """Rounds begin, or an evaluation."""
        self.stop.training = self.trainer.state.fn == TrainerFn.FITTING

    def teardown(self) -> None:
        """They have ended."""
        self.stop.training = False


def stop_of(trainer: pl.Trainer, default: Stop | None = None) -> Stop:
    """What stops a Trainer's run.

    Args:
        trainer: a Trainer; its own handling of signals ends.
        default: taken, from now on, where the Trainer has none yet; None: one that is never asked.
    """
    known = trainer._signal_connector
    if isinstance(known, _Signals):
        return known.stop
    if default is None:
        return Stop()
    known.teardown()  # it may have begun already
    trainer._signal_connector = _Signals(trainer, default)  # pyright: ignore[reportAttributeAccessIssue]
    return default


@contextlib.contextmanager
def stoppable(stop: Stop) -> Iterator[None]:
    """The work of a run: if it is stopped, it says so in one line and ends.

    Raises:
        SystemExit: in place of whatever a stop has caused.
    """
    with stop:
        try:
            yield
        except BaseException as error:
            if not _is_stop(error, stop):
                stop.fail()
                raise
            if os.environ.get("AADP_FL_TRACEBACK"):
                raise
            raise SystemExit(stop.finish()) from None
        stop.part()


def raise_if_stopped(error: Exception, trainer: pl.Trainer) -> None:
    """For whoever goes on after an error: not after one that a stop has caused.

    Raises:
        Stopped: the error was caused by a stop.
    """
    stop = stop_of(trainer)
    if _is_stop(error, stop):
        raise Stopped(stop.asked or LOST) from None


def _is_stop(error: BaseException, stop: Stop) -> bool:
    """Whether an error is a stop or was caused by one."""
    lost = isinstance(error, (ProcessLost, dist.DistError))
    lost |= isinstance(error, RuntimeError) and "gloo" in str(error)
    if lost:
        stop.settle()
    return lost or isinstance(error, Stopped) or bool(stop.asked)


class StoppableLauncher(_SubprocessScriptLauncher):
    """Starts the other processes of this machine as Lightning does; they end together.

    Args:
        begin: called before a Trainer's function runs; gives what stops the run.
    """

    def __init__(self, *args: Any, begin: Callable[[pl.Trainer], Stop], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begin = begin

    def launch(
        self,
        function: Callable[..., Any],
        *args: Any,
        trainer: pl.Trainer | None = None,
        **kwargs: Any,
    ) -> Any:
        """Start the processes, once, then call the function."""
        assert trainer is not None
        stop = self._begin(trainer)
        with stop:
            self.cluster_environment.validate_settings(
                num_devices=self.num_processes, num_nodes=self.num_nodes
            )
            if not self.cluster_environment.creates_processes_externally:
                self._start(stop)
            _set_num_threads_if_needed(num_processes=self.num_processes)
            try:
                return function(*args, **kwargs)
            except BaseException:
                stop.leave()
                raise

    def _start(self, stop: Stop) -> None:
        # A child that still imports would answer Ctrl-C by a traceback: it keeps it for later.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            stop.watch_over(self.procs)
            with stop.starting():
                self._call_children_scripts()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _call_children_scripts(self) -> None:
        """Start this command again for every other process; each ends with this one."""
        self._check_can_spawn_children()
        cluster = self.cluster_environment
        os.environ |= {
            "MASTER_ADDR": cluster.main_address,
            "MASTER_PORT": str(cluster.main_port),
            "NODE_RANK": str(cluster.node_rank()),
            "LOCAL_RANK": str(cluster.local_rank()),
            "WORLD_SIZE": str(self.num_processes * self.num_nodes),
        }
        for rank in range(1, self.num_processes):
            command, cwd = _command(rank)
            env = os.environ | {"LOCAL_RANK": str(rank)}
            self.procs.append(subprocess.Popen(behind(command), env=env, cwd=cwd))


def _command(rank: int) -> tuple[Sequence[str], str | None]:
    """What this process was started by, for another rank, and where to start it."""
    hydra = sys.modules.get("hydra.core.hydra_config")
    if hydra is not None and hydra.HydraConfig.initialized():
        return _hydra_subprocess_cmd(rank)
    return _basic_subprocess_cmd(), None
