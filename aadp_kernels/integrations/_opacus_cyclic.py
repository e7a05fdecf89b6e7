"""Batches in a fixed cyclic order under Opacus: their loader, and what such a run draws and costs.

The promise that correlated noise needs is that a record's steps are `period` apart. The loader
hands out the batches in their order, and a step is taken for the batch that it is planned for or
not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Any

from opacus.accountants import IAccountant
from torch.utils.data import DataLoader, IterableDataset

from aadp_kernels.correlation import Correlation
from aadp_kernels.integrations.cyclic import CyclicBatches, CyclicSteps
from aadp_kernels.noise_key import NoiseKey


class CyclicRun:
    """Which step of a plan is next, and which batch was handed out last.

    Args:
        plan: Order, horizon and coefficients.
        noise_multiplier: Of each step, in units of the clip norm; it stays as it is.
    """

    def __init__(self, plan: CyclicSteps, noise_multiplier: float) -> None:
        self.plan = plan
        self.noise_multiplier = noise_multiplier
        self.handed_out = -1
        self._addresses: list[int] = []

    @property
    def taken(self) -> int:
        """Steps that were taken."""
        return len(self._addresses)

    def check(self, noise_multiplier: float, skips: bool) -> None:
        """Whether the next step is one of the plan.

        Raises:
            ValueError: It is beyond the horizon, is for another batch, is to be skipped, or has
                another noise multiplier. Nothing was released.
        """
        step, plan = self.taken, self.plan
        if step >= plan.steps:
            raise ValueError(
                f"all {plan.steps} planned steps are taken: a further one would take back noise "
                "that its records count on"
            )
        if skips:
            raise ValueError("a step of a cyclic plan cannot be skipped: each has one whole batch")
        if noise_multiplier != self.noise_multiplier:
            raise ValueError(
                f"noise_multiplier={noise_multiplier} must stay {self.noise_multiplier} in a "
                "cyclic plan, which is charged as a whole"
            )
        if self.handed_out != step:
            last = "none" if self.handed_out < 0 else f"that of step {self.handed_out}"
            raise ValueError(
                f"step {step} of the plan must follow its own batch, and the last one that the "
                f"private data loader handed out was {last}: step once for every batch, in order"
            )

    def correlation(self, key: NoiseKey, address: int) -> Correlation:
        """The noise of the next step, which is taken now, at an address of its own."""
        back = self._addresses[::-1][: len(self.plan.coefficients) - 1]
        self._addresses.append(address)
        return Correlation(self.plan.coefficients, tuple((key, earlier) for earlier in back))

    def charge(self, accountant: IAccountant) -> Callable[[Any], None]:
        """A hook for steps: the first one is charged for all of them, later ones for nothing."""

        def hook(_: Any) -> None:
            if self.taken == 1:
                multiplier = self.plan.multiplier(self.noise_multiplier)
                accountant.step(noise_multiplier=multiplier, sample_rate=1.0)

        return hook


class _Order:
    """Record indices of the batches from the next step to the end of the period."""

    def __init__(self, n: int, run: CyclicRun) -> None:
        self.run = run
        self._batches = CyclicBatches(n, period=run.plan.period, steps=run.plan.period)

    def __len__(self) -> int:
        return self.run.plan.period - self.run.taken % self.run.plan.period

    def __iter__(self) -> Iterator[list[int]]:
        self._batches.next_step, self._batches.steps = self.run.taken, len(self)
        return (part.tolist() for part in self._batches)


class CyclicLoader(DataLoader):
    """A data loader whose passes go on in the order of a plan.

    A pass begins with the batch of the next step and ends with the period. One that is left early
    is gone on with by the next.

    Args:
        loader: The user's; dataset, workers and collation are taken from it.
        run: Of the optimizer.

    Raises:
        ValueError: The dataset has no length, or fewer records than the period has batches.
    """

    def __init__(self, loader: DataLoader, run: CyclicRun) -> None:
        dataset: Any = loader.dataset
        if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
            raise ValueError("data_loader must be over a dataset with a length, not an iterable")
        self._run = run
        super().__init__(
            dataset,
            batch_sampler=_Order(len(dataset), run),  # pyright: ignore[reportArgumentType]
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        begun = self._run.taken
        for i, batch in enumerate(super().__iter__()):
            self._run.handed_out = begun + i
            yield batch
