"""The processes that share a run: each trains its part of every cohort, rank 0 owns the folder.

Small messages (who releases what, permissions, errors) go over gloo, and an error of one process
becomes the error of all at the next message. Sums go over the backend of the devices, once a round.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Stopping(Protocol):
    """Knows whether a message failed because the run is to stop."""

    def settle(self) -> None:
        """Wait until it is known."""

    def check(self) -> None:
        """Raise if the run is to stop."""


class ProcessLost(RuntimeError):
    """Another process of the run is gone; this one cannot go on without it."""


class Processes:
    """The joint operations of the processes of a run. One process alone does each by itself.

    Every method but `part_of` is collective: all processes call the same ones in the same order.

    Args:
        rank: this process, 0 to size - 1.
        size: processes of the run.
        control: gloo group of all, for small messages; None with one process.
        sums: group of all, for sums; None with one process.
        device: where sums are computed.
        stop: what explains a message that fails; None: nothing does.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        control: Any = None,
        sums: Any = None,
        device: torch.device | None = None,
        stop: Stopping | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device or torch.device("cpu")
        self._control = control
        self._sums = sums
        self._stop = stop

    @classmethod
    def all(cls, device: torch.device, stop: Stopping | None = None) -> Processes:
        """All processes of torch.distributed, which is initialised.

        Args:
            device: of this process.
            stop: of this process.
        """
        # Groups of their own: whatever else is sent between the processes cannot meet our messages.
        control, sums = dist.new_group(backend="gloo"), dist.new_group()
        size = dist.get_world_size()
        return cls(dist.get_rank(), size, control=control, sums=sums, device=device, stop=stop)

    def part_of(self, clients: Tensor) -> Tensor:
        """This process's part of some clients: neighbours, sizes that differ by at most one."""
        return clients.tensor_split(self.size)[self.rank]

    def together(self, work: Callable[[], T]) -> list[T]:
        """Every process does its work; the results of all, by rank.

        Args:
            work: what it returns is pickled and sent: keep it small.

        Raises:
            Exception: what the first process that failed raised, in every process.
            ProcessLost: a process is gone.
        """
        if self.size == 1:
            return [work()]
        result, failed = _attempt(work)
        answers: list[Any] = [None] * self.size
        self._send(dist.all_gather_object, answers, (result, _portable(failed)))
        for rank, (_, error) in enumerate(answers):
            if error is not None:
                raise failed if rank == self.rank and failed else _from(rank, error)
        return [result for result, _ in answers]

    def first(self, work: Callable[[], T]) -> T:
        """Rank 0 does the work; its result, in every process.

        Raises:
            Exception: what rank 0 raised, in every process.
            ProcessLost: a process is gone.
        """
        if self.size == 1:
            return work()
        result, failed = _attempt(work) if self.rank == 0 else (None, None)
        box: list[Any] = [result, _portable(failed)]
        self._send(dist.broadcast_object_list, box, src=0)
        if box[1] is not None:
            raise failed or _from(0, box[1])
        return box[0]

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the processes, of the same shapes and dtypes: one all-reduce in float64.

        Args:
            tensors: of this process; the same shapes everywhere. Sums of integers are exact.

        Raises:
            ProcessLost: a process is gone.
        """
        if self.size == 1:
            return list(tensors)
        parts = [_as_float64(t).to(self.device) for t in tensors]
        flat = torch.cat(parts)
        self._reach(lambda: dist.all_reduce(flat, group=self._sums))
        sums = flat.split([len(part) for part in parts])
        return [_like(t, total) for t, total in zip(tensors, sums, strict=True)]

    def _send(self, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._reach(lambda: collective(*args, group=self._control, **kwargs))

    def _reach(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            if self._stop is not None:
                self._stop.settle()
                self._stop.check()
            reason = str(error).strip().splitlines() or [repr(error)]
            raise ProcessLost(
                f"process {self.rank} of {self.size} lost another one, which stopped or cannot be "
                f"reached ({reason[0][:200]}); what was released stands in the ledger: go on by "
                "--ckpt_path last"
            ) from error


def _as_float64(value: Tensor) -> Tensor:
    """A tensor for a sum, flat; whole numbers in two halves, whose sums are exact."""
    value = value.detach().reshape(-1)
    if value.is_floating_point():
        return value.double()
    value = value.long()
    return torch.cat([value >> 32, value & (2**32 - 1)]).double()


def _like(value: Tensor, total: Tensor) -> Tensor:
    """The sum of tensors that went through `_as_float64`."""
    if not value.is_floating_point():
        high, low = total.long().view(2, -1)
        total = (high << 32) + low
    return total.view(value.shape).to(value.device, value.dtype)


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # whatever it is, the others must hear of it
        return None, error


def _portable(error: Exception | None) -> Exception | None:
    """The error, or a RuntimeError that says as much where it cannot be sent."""
    if error is None:
        return None
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def _from(rank: int, error: Exception) -> Exception:
    error.from_rank = rank  # pyright: ignore[reportAttributeAccessIssue]
    error.add_note(f"raised in process {rank}")
    return error


def came_from_another(error: BaseException) -> bool:
    """Whether an error was raised in another process, which says so itself."""
    return isinstance(error, ProcessLost) or hasattr(error, "from_rank")
