"""Every client releases an update of its own: record+local, client+local, abstract and none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from aadp_kernels import NoiseKey
from fl_lightning.keys import binding, digests
from fl_lightning.local.rows import columns, flat_rows
from fl_lightning.privacy.mechanism import PrivateRecordGradient, release_updates
from fl_lightning.processes.together import Processes
from fl_lightning.release.claim import Books, Draw, claim
from fl_lightning.release.clients import Clients
from fl_lightning.release.lines import line_writer
from fl_lightning.rules import Rules
from fl_lightning.server.add_up import add_up
from fl_lightning.server.aggregate import WeightedMean, client_weights, noise_variance
from fl_lightning.values.release import Release
from fl_lightning.values.round import Params, PrivateUpdate


class OneByOne:
    """Releases of single clients, and what the server makes of them.

    Args:
        clients: who trains.
        rules: of the run.
        key: the run's secret.
        books: what is paid from and written in; None without privacy.
        processes: those that share the clients of a release.
    """

    def __init__(
        self,
        clients: Clients,
        rules: Rules,
        key: NoiseKey,
        books: Books | None,
        processes: Processes,
    ) -> None:
        self.clients = clients
        self.rules = rules
        self.key = key
        self.books = books
        self.processes = processes

    def can_take_part(self, clients: np.ndarray, round: int) -> np.ndarray:
        """Whether each client can pay for a release or has paid for that of this round, [k]."""
        if self.books is None:
            return np.ones(len(clients), dtype=bool)
        can_pay = self.books.budget.can_pay_each(clients, self.clients.steps)
        for i in np.flatnonzero(~can_pay):
            can_pay[i] = bool(self.books.ledger.find(int(clients[i]), round))
        return can_pay

    def cohort(self, scheduled: np.ndarray, round: int) -> Tensor:
        """Clients of the schedule that neither fail nor are out of budget, [m]."""
        there = scheduled[~self.rules.faults.failing(scheduled, round)]
        return torch.from_numpy(there[self.can_take_part(there, round)])

    def groups(self, cohort: Tensor) -> Sequence[Tensor]:
        """Clients that release together: as many as fit into the memories of all processes."""
        return cohort.split(self.clients.at_once * self.processes.size) if len(cohort) else []

    def participants(self, cohort: Tensor, released: Sequence[PrivateUpdate]) -> int:
        """Clients that released something."""
        return sum(len(update.clients) for update in released)

    def release(self, clients: Tensor, params: Params, round: int, context: str) -> PrivateUpdate:
        """Train, clip, add noise, and write the ledger before anything is handed out.

        Args:
            clients: ids [k], of which this process trains its part.
            params: global model.
            round: round number.
            context: digest of everything else that local training depends on.

        Returns:
            The update of those clients of this process that could pay.

        Raises:
            Exception: what any process raised, in all of them.
        """
        own = self.processes.part_of(clients)
        if self.books is None:
            coins = self.key.derive("round", round, "coins")
            work = lambda: self._unprotected(own, params, coins, round)  # noqa: E731
            return _own_part(self.processes, work)[0]
        multiplier = self.books.budget.multiplier[own]

        def draw(redraw: int, before: dict[str, Tensor]) -> Draw:
            inputs = [own, multiplier, *params.values(), *before.values()]
            key = binding.round_key(self.key, context, round, redraw, *inputs)
            update, lines = _own_part(
                self.processes,
                lambda: self.draw(own, params, key, round),
                lambda update: self._lines(update, round, key),
            )
            first = sum(map(len, lines[: self.processes.rank]))
            return Draw(update, [line for part in lines for line in part], first)

        return claim(self.books, own, draw)

    def draw(self, clients: Tensor, params: Params, key: NoiseKey, round: int) -> PrivateUpdate:
        """Train, clip and add noise; nothing is paid for yet, so nothing may be handed out."""
        if self.books is None:
            return self._unprotected(clients, params, key.derive("coins"), round)
        history, layout = self.books.history, self.clients.layout
        multiplier = self.books.budget.multiplier[clients]
        if not len(clients):
            policy = history.policy(clients, multiplier)
            return PrivateUpdate.nothing(params, policy, layout.num_layers)
        coins, noise = key.derive("coins"), key.derive("noise")
        named = {"key": noise, "clients": clients, "multiplier": multiplier}
        named["numbers"] = self.clients.numbers[clients]
        privacy = self.rules.privacy
        if privacy.unit == "record":
            hook = PrivateRecordGradient(self.clients.clipped_sums, history, layout, **named)
            update = self.clients.train(clients, params, coins, round, hook)
            assert self.clients.training.sampling_rate is not None
            return hook.private_update(update, self.clients.training.sampling_rate)
        # The noise of `abstract` alone may be less than what its nominal ε is computed from.
        nominal = privacy.comparator.nominal_sensitivity == "records"
        sizes = self.clients.data.client_sizes[clients]
        policy = history.policy(clients, multiplier / sizes if nominal else multiplier)
        update = self.clients.train(clients, params, coins, round)
        return release_updates(update, policy, history, layout, **named)

    def _unprotected(
        self, clients: Tensor, params: Params, coins: NoiseKey, round: int
    ) -> PrivateUpdate:
        """The updates as they are; those that are not finite are zero."""
        if not len(clients):
            return PrivateUpdate.nothing(params, None, self.clients.layout.num_layers)
        update = self.clients.train(clients, params, coins, round)
        finite = torch.stack([_finite_rows(v) for v in update.values()]).all(0)
        if not bool(finite.all()):
            update = {n: v.masked_fill(~columns(finite, v), 0.0) for n, v in update.items()}
        return PrivateUpdate(
            clients=clients,
            update=update,
            events=[],
            steps=0,
            policy=None,
            sim_only={"nonfinite": (~finite).cpu().float()},
        )

    def _lines(self, update: PrivateUpdate, round: int, key: NoiseKey) -> list[Release]:
        """One ledger line a client."""
        assert self.books is not None
        assert update.policy is not None
        privacy, budget, history = self.rules.privacy, self.books.budget, self.books.history
        # What each client lets others see: `abstract` shows no history.
        seen = list(update.update.values())
        if privacy.setting != "abstract":
            seen.append(history.l1_norm[update.clients])
        shown = digests.digests(seen)
        write = line_writer(self.books, privacy, update.policy, key, round, update.steps)
        return [
            write(
                i,
                client=client,
                event=update.events[i],
                extra=budget.extra(client),
                first_step=int(budget.spent[client]),
                digest=shown[i],
            )
            for i, client in enumerate(update.clients.tolist())
        ]

    def add_to(self, mean: WeightedMean, update: PrivateUpdate, round: int) -> None:
        """Add what arrives in time to the server's mean, with its weights."""
        late = self.rules.faults.late(update.clients.numpy(), round)
        update = update.select(np.flatnonzero(~late).tolist()) if late.any() else update
        weigh(mean, update, self.rules, self.clients)

    def meet(
        self,
        mean: WeightedMean,
        released: list[PrivateUpdate],
        cohort: Tensor,
        params: Params,
    ) -> list[PrivateUpdate]:
        """Sum the mean over the processes, in place; what all of them released."""
        if self.processes.size == 1:
            return released
        parts = [self.processes.part_of(group) for group in self.groups(cohort)]
        return add_up(
            self.processes,
            mean,
            None if self.books is None else self.books.history,
            released,
            cohort=cohort,
            trained=torch.cat([cohort[:0], *parts]),
            params=params,
        )


def weigh(mean: WeightedMean, update: PrivateUpdate, rules: Rules, clients: Clients) -> None:
    """Add releases of single clients to a mean, with the weights that the rules give them."""
    expected_batch = clients.expected_batch(update.clients)
    weights = client_weights(
        rules.weighting,
        client_sizes=clients.data.client_sizes[update.clients],
        expected_batch=expected_batch,
        policy=update.policy,
        num_layers=clients.layout.num_layers,
    )
    variance = None
    if rules.denoise:
        assert update.policy is not None
        lr = rules.client_lr if rules.privacy.unit == "record" else 1.0
        mechanism = rules.privacy.mechanism
        variance = noise_variance(update.policy, mechanism, lr / expected_batch.double())
    mean.add(update.update, weights, variance)


def _own_part(
    processes: Processes,
    work: Callable[[], PrivateUpdate],
    lines: Callable[[PrivateUpdate], list[Release]] = lambda _: [],
) -> tuple[PrivateUpdate, list[list[Release]]]:
    """This process's update, and the ledger lines of all processes by rank."""
    made: list[PrivateUpdate] = []

    def both() -> list[Release]:
        made.append(work())
        return lines(made[0])

    found = processes.together(both)
    return made[0], found


def _finite_rows(value: Tensor) -> Tensor:
    """Whether all numbers of each row are finite, [k]."""
    row = flat_rows(value)
    finite = row.sum(1).isfinite()
    # Where a sum overflows its numbers may still be finite.
    return finite if bool(finite.all()) else row.isfinite().all(1)
