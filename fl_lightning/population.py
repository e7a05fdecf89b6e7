"""The simulated clients: their records, secrets, histories and budgets, and how they release.

In a deployment each client runs this for itself. Everything a client computes before the ledger
line is written is private to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from aadp_kernels import Layout, NoiseKey, grid
from fl_lightning import binding, pooled, secrets
from fl_lightning.client import (
    Batch,
    CohortGradient,
    GradientHook,
    Loss,
    columns,
    flat_rows,
    gather,
    input_dtype,
    plain_gradient,
    poisson_rows,
    shuffled_rows,
    train_cohort,
)
from fl_lightning.data import FederatedDataModule
from fl_lightning.ledger import Ledger
from fl_lightning.privacy.budget import Budget
from fl_lightning.privacy.clipping import clipped_sums
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.privacy.mechanism import PrivateRecordGradient, release_updates
from fl_lightning.processes import Processes
from fl_lightning.release import ALL_CLIENTS, Release
from fl_lightning.sharing import record
from fl_lightning.types import Params, PrivateUpdate


@dataclass(frozen=True)
class LocalTraining:
    """Public rules of local training; see `FederatedModule` for their meaning."""

    lr: float
    momentum: float
    sampling_rate: float | None
    batch_size: int | None
    local_steps: int | None
    local_epochs: int
    seed: int

    @property
    def noised_steps(self) -> int:
        """Local steps a round under Poisson sampling: an epoch is 1/q steps."""
        if self.local_steps is not None:
            return self.local_steps
        assert self.sampling_rate is not None
        return self.local_epochs * max(1, round(1 / self.sampling_rate))


class ClientPopulation:
    """All clients of a simulation.

    Args:
        data: records and who holds them.
        network, loss, layout: what is trained.
        privacy: the privacy configuration.
        training: rules of local training.
        history: released history of all clients.
        budget: multipliers and steps spent.
        key: the run's secret.
        ledger: where releases are written before they leave; None without privacy.
        vectorize: train clients under one vmap, or one after another.
        max_examples: records computed at once.
        pool: how a cohort is drawn and weighted, for the settings that release a sum.
        processes: those that share the clients of a release; None: this one trains all.
    """

    def __init__(
        self,
        data: FederatedDataModule,
        network: nn.Module,
        loss: Loss,
        layout: Layout,
        *,
        privacy: PrivacyConfig,
        training: LocalTraining,
        history: ReleasedHistory,
        budget: Budget,
        key: NoiseKey,
        ledger: Ledger | None,
        vectorize: bool,
        max_examples: int,
        pool: pooled.Pool | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.data = data
        self.network = network
        self.loss = loss
        self.layout = layout
        self.privacy = privacy
        self.training = training
        self.history = history
        self.budget = budget
        self.key = key
        self.ledger = ledger
        self.vectorize = vectorize
        self.max_examples = max_examples
        self.pool = pool
        self._whole: dict[tuple[int, ...], Batch] = {}
        self.processes = processes or Processes()
        device = next(network.parameters()).device
        self.dtype = input_dtype(network, data.x)
        example = data.x[:1].to(device, self.dtype)
        self.plain = CohortGradient(
            network, loss, vectorize=vectorize, max_examples=max_examples, record=True
        )
        if privacy.unit == "record":
            self.clipped_sums = clipped_sums(
                network,
                loss,
                layout,
                p=privacy.p,
                vectorize=vectorize,
                max_examples=max_examples,
                example=example,
                grid=privacy.mechanism if privacy.noise_form == "grid" else None,
                clipping=privacy.clipping,
                mechanism=privacy.mechanism,
                automatic=privacy.clip_function == "automatic",
            )

    @property
    def steps(self) -> int:
        """Noised events in one release."""
        return self.training.noised_steps if self.privacy.unit == "record" else 1

    def expected_batch(self, clients: Tensor) -> Tensor:
        """What the noise of a release is divided by, public, [k].

        B = q·n_k for records, 1 for whole updates, whose noise is added undivided.
        """
        if self.privacy.unit != "record":
            return torch.ones(len(clients))
        rate = self.training.sampling_rate
        return self.data.client_sizes[clients] * (1.0 if rate is None else rate)

    def able(self, clients: np.ndarray, round: int) -> np.ndarray:
        """Whether each client can pay for a release or has paid for that of this round, [k]."""
        if not self.privacy.private:
            return np.ones(len(clients), dtype=bool)
        assert self.ledger is not None
        able = self.budget.can_release_each(clients, self.steps)
        if self.privacy.pooled:
            for line in self.ledger.find(ALL_CLIENTS, round):
                able |= line.covers(clients)
            return able
        for i in np.flatnonzero(~able):
            able[i] = bool(self.ledger.find(int(clients[i]), round))
        return able

    def may_release(self, client: int, round: int) -> bool:
        """`able` for one client."""
        return bool(self.able(np.array([client]), round)[0])

    def participants(self, cohort: Tensor, released: Sequence[PrivateUpdate]) -> int:
        """Clients of a round as far as that is public: their expected number if coins decide."""
        count = sum(len(update.clients) for update in released)
        if self.pool is None or count == 0:
            return count
        return round((self.pool.rate or 1.0) * len(cohort))

    def release(self, clients: Tensor, params: Params, round: int, context: str) -> PrivateUpdate:
        """Train, clip, add noise, and write the ledger before anything is handed out.

        The noise and the coins are a function of the secret and of all that the update depends
        on (of the public seed and the rules in a simulated run, see `binding`). The same inputs
        give the same bytes again, which is the same release and costs nothing; other inputs get
        other noise and are charged. Should equal inputs ever give other bytes, new coins and noise
        are drawn and charged.

        Args:
            clients: ids [k], of which this process trains its share.
            params: global model.
            round: round number.
            context: digest of everything else that local training depends on.

        Returns:
            The update of those clients of this process that could pay; the sum of all processes
            in the settings that release one.

        Raises:
            Exception: what any process raised, in all of them.
        """
        if self.privacy.pooled:
            return pooled.release(self, clients, params, round, context)
        clients = self.processes.share(clients)
        if not self.privacy.private:
            return self._own(lambda: self.without_privacy(clients, params, round))[0]
        before = self.history.rows(clients)
        try:
            return self._charged_release(clients, params, round, context, before)
        except BaseException:
            # What is not in the ledger must not be in a history that a checkpoint could keep.
            self.history.restore(clients, before)
            raise

    def _own(
        self,
        work: Callable[[], PrivateUpdate],
        entries: Callable[[PrivateUpdate], list[Release]] = lambda _: [],
    ) -> tuple[PrivateUpdate, list[list[Release]]]:
        """This process's update, and the ledger lines of all processes by rank."""
        made: list[PrivateUpdate] = []

        def both() -> list[Release]:
            made.append(work())
            return entries(made[0])

        lines = self.processes.together(both)
        return made[0], lines

    def _charged_release(
        self,
        clients: Tensor,
        params: Params,
        round: int,
        context: str,
        before: dict[str, Tensor],
    ) -> PrivateUpdate:
        assert self.ledger is not None
        multiplier = self.budget.multiplier[clients]
        inputs = [clients, multiplier, *params.values(), *before.values()]
        redraw = 0
        while True:
            key = binding.round_key(self.key, context, round, redraw, *inputs)
            update, lines = self._own(
                lambda key=key: self.private_update(clients, params, key, round),
                lambda update, key=key: self._entries(update, round, key),
            )
            entries = [entry for part in lines for entry in part]
            known = [self.ledger.find(entry.client, round) for entry in entries]
            if not any(map(_same_noise_other_bytes, entries, known)):
                break
            self.history.restore(clients, before)
            redraw += 1
        paid = [
            any(old.digest == entry.digest for old in lines)
            for entry, lines in zip(entries, known, strict=True)
        ]
        keep = [
            i
            for i, entry in enumerate(entries)
            if paid[i] or self.budget.can_release(entry.client, entry.steps)
        ]
        first = sum(map(len, lines[: self.processes.rank]))
        own = [i - first for i in keep if 0 <= i - first < len(clients)]
        left = [i for i in range(len(clients)) if i not in own]
        if left:
            rows = torch.tensor(left)
            self.history.restore(clients[rows], {n: v[rows] for n, v in before.items()})
        fresh = [entries[i] for i in keep if not paid[i]]
        record(self.ledger, fresh, self.processes)
        for entry in fresh:
            self.budget.spend(entry)
        return update.select(own) if left else update

    def rehearse(self, params: Params, examples: int = 1024) -> None:
        """One local step on zeros of the usual shape, to time it."""
        sizes = self.data.client_sizes
        rate, batch_size = self.training.sampling_rate, self.training.batch_size
        width = max(1, round(rate * float(sizes.double().mean()))) if rate else batch_size
        assert width is not None
        k = min(len(sizes), max(2, examples // width))
        device = next(self.network.parameters()).device
        batch = Batch(
            torch.zeros(k, width, *self.data.x.shape[1:], dtype=self.dtype, device=device),
            torch.zeros(k, width, *self.data.y.shape[1:], dtype=self.data.y.dtype, device=device),
            torch.ones(k, width, device=device),
            torch.full((k,), float(width), device=device),
            torch.ones(k, dtype=torch.bool, device=device),
        )
        shared = self.training.local_steps == 1
        if not shared:
            params = {name: p.expand(k, *p.shape).clone() for name, p in params.items()}
        with torch.random.fork_rng(), torch.no_grad():
            if self.privacy.unit == "record":
                clients = torch.arange(k)
                policy = self.history.policy(clients, self.budget.multiplier[clients])
                self.clipped_sums(params, shared, batch, policy)
            else:
                self.plain(params, batch, shared=shared)

    def private_update(
        self, clients: Tensor, params: Params, key: NoiseKey, round: int
    ) -> PrivateUpdate:
        """Train, clip and add noise; nothing is paid for yet, so nothing may be handed out."""
        multiplier = self.budget.multiplier[clients]
        if not len(clients):
            policy = self.history.policy(clients, multiplier)
            return PrivateUpdate.nothing(params, policy, self.layout.num_layers)
        coins = key.derive("coins")
        noise = key.derive("noise")
        if self.privacy.unit == "record":
            hook = PrivateRecordGradient(
                self.clipped_sums,
                self.history,
                self.layout,
                key=noise,
                clients=clients,
                multiplier=multiplier,
            )
            update = self.train(clients, params, hook, coins, round)
            assert self.training.sampling_rate is not None
            return hook.private_update(update, self.training.sampling_rate)
        # The noise of `abstract` alone may be less than what its nominal ε is computed from.
        nominal = self.privacy.nominal_sensitivity == "records"
        noised = multiplier / self.data.client_sizes[clients] if nominal else multiplier
        policy = self.history.policy(clients, noised)
        update = self.train(clients, params, plain_gradient(self.plain), coins, round)
        return release_updates(
            update,
            policy,
            self.history,
            self.layout,
            key=noise,
            clients=clients,
            multiplier=multiplier,
        )

    def without_privacy(self, clients: Tensor, params: Params, round: int) -> PrivateUpdate:
        """The updates as they are; those that are not finite are zero."""
        if not len(clients):
            return PrivateUpdate.nothing(params, None, self.layout.num_layers)
        coins = self.key.derive("round", round, "coins")
        update = self.train(clients, params, plain_gradient(self.plain), coins, round)
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

    def train(
        self, clients: Tensor, params: Params, hook: GradientHook, coins: NoiseKey, round: int
    ) -> Params:
        """Local training of some clients; private."""
        stream = coins.derive("torch", int(clients[0]))  # one a group
        torch_seed = int(secrets.public_name(stream)[:15], 16)
        with _seeded(torch_seed, next(self.network.parameters()).device), torch.no_grad():
            return train_cohort(
                params,
                self._batches(clients.tolist(), coins, round),
                hook,
                lr=self.training.lr,
                momentum=self.training.momentum,
            )

    def _batches(self, clients: list[int], coins: NoiseKey, round: int) -> Iterator[Batch]:
        rows = [self.data.partition.client(k) for k in clients]
        sizes = [len(r) for r in rows]
        rate, divisor = self.training.sampling_rate, None
        if rate == 1:
            for _ in range(self.training.noised_steps):
                yield self._all_records(tuple(clients))
            return
        if rate is not None:
            steps = self.training.noised_steps
            chosen = poisson_rows(sizes, rate, steps, key=coins, clients=clients)
            divisor = torch.tensor([rate * n for n in sizes])
        else:
            assert self.training.batch_size is not None
            seeds = [[self.training.seed, round, k] for k in clients]
            chosen = shuffled_rows(
                sizes,
                self.training.batch_size,
                self.training.local_steps,
                self.training.local_epochs,
                seeds=seeds,
            )
        device = next(self.network.parameters()).device
        for step in chosen:
            records = [r[s] for r, s in zip(rows, step, strict=True)]
            yield gather(
                self.data.x, self.data.y, records, divisor=divisor, device=device, dtype=self.dtype
            )

    def _all_records(self, clients: tuple[int, ...]) -> Batch:
        """Every record of some clients, gathered once: at rate 1 every step has the same batch."""
        if clients not in self._whole:
            if set(clients) & {client for known in self._whole for client in known}:
                self._whole.clear()  # other cohorts: hold each record at most once
            records = [self.data.partition.client(k) for k in clients]
            self._whole[clients] = gather(
                self.data.x,
                self.data.y,
                records,
                divisor=torch.tensor([float(len(r)) for r in records]),
                device=next(self.network.parameters()).device,
                dtype=self.dtype,
            )
        return self._whole[clients]

    def _entries(self, update: PrivateUpdate, round: int, key: NoiseKey) -> list[Release]:
        """One ledger line a client, with all that its ε follows from."""
        policy = update.policy
        assert policy is not None
        assert self.ledger is not None
        name = secrets.public_name(key)
        digests = self._digests(update)
        clip_norm, shares = policy.clip_norm.tolist(), policy.shares.tolist()
        votes = policy.vote_noise_scale
        entries = []
        for i, client in enumerate(update.clients.tolist()):
            event, extra = update.events[i], self.budget.extra(client)
            entries.append(
                Release(
                    client=client,
                    round=round,
                    attempt=len(self.ledger.find(client, round)),
                    first_step=int(self.budget.spent[client]),
                    steps=update.steps,
                    mechanism=event.mechanism,
                    noise_multiplier=event.noise_multiplier,
                    sampling_rate=event.sampling_rate,
                    adjacency=event.adjacency,
                    vote_noise_scale=None if votes is None else float(votes[i]),
                    num_layers=self.layout.num_layers,
                    clip_norm=tuple(clip_norm[i]),
                    shares=tuple(shares[i]),
                    binding=name,
                    digest=digests[i],
                    quantum=self.quantum(policy.noise_scale[i]),
                    epsilon_inflation=update.steps * extra.epsilon,
                    tail_delta=update.steps * extra.delta,
                    guarantee=self.privacy.guarantee,
                )
            )
        return entries

    def _digests(self, update: PrivateUpdate) -> list[str]:
        """Of all that each client lets others see."""
        seen = list(update.update.values())
        if self.privacy.setting != "abstract":
            seen.append(self.history.l1_norm[update.clients])
        return secrets.digests(seen)

    def quantum(self, noise_scale: Tensor) -> float | None:
        """Coarsest grid of a release, None where it is not on a grid."""
        if self.privacy.noise_form != "grid":
            return None
        return float(grid.quantum(noise_scale, self.privacy.mechanism).max())


def _finite_rows(value: Tensor) -> Tensor:
    """Whether all numbers of each row are finite, [k]."""
    row = flat_rows(value)
    finite = row.sum(1).isfinite()
    # Where a sum overflows its numbers may still be finite.
    return finite if bool(finite.all()) else row.isfinite().all(1)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of torch from a seed, for dropout and the like.

    `torch.manual_seed` on a machine without CUDA would keep a stack trace of every call.
    """
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.default_generators[cuda[0]].manual_seed(seed)
        yield


def _same_noise_other_bytes(entry: Release, known: list[Release]) -> bool:
    return any(old.binding == entry.binding and old.digest != entry.digest for old in known)
