"""The simulated clients: who holds which records, and how some of them train together.

In a deployment each client runs this for itself. Everything here is private to the clients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from aadp_kernels import Layout, NoiseKey
from fl_lightning.data import FederatedDataModule
from fl_lightning.keys import run_key
from fl_lightning.local.batches import Batch, gather, poisson_rows, shuffled_rows
from fl_lightning.local.gradient import CohortGradient, GradientHook, Loss, plain_gradient
from fl_lightning.local.personal import fit_personal, start_of
from fl_lightning.local.rules import LocalTraining
from fl_lightning.local.training import train_cohort
from fl_lightning.networks.inputs import input_dtype
from fl_lightning.privacy.clipping import clipped_sums
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.values.round import LayerPolicy, Params


class Clients:
    """All clients of a simulation.

    Args:
        data: records and who holds them.
        network, loss, layout: what is trained.
        privacy: the privacy configuration.
        training: rules of local training.
        vectorize: train clients under one vmap, or one after another.
        max_examples: records computed at once.
        at_once: clients trained together; None: all of a release.
        numbers: what the coins and the noise of each client are drawn under [K]; None: its id. At a
            node, whose one client has id 0, it is the client's number in the federation.
        stacked: whether each client trains a model of its own, [k, ...]: clients of several
            federations, side by side.
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
        vectorize: bool,
        max_examples: int,
        at_once: int | None = None,
        numbers: Tensor | None = None,
        stacked: bool = False,
    ) -> None:
        self.data = data
        self.network = network
        self.layout = layout
        self.privacy = privacy
        self.training = training
        self.vectorize = vectorize
        self.stacked = stacked
        self.at_once = at_once or data.num_clients
        self.numbers = torch.arange(data.num_clients) if numbers is None else numbers
        self.device = next(network.parameters()).device
        self.dtype = input_dtype(network, data.x)
        self._whole: dict[tuple[int, ...], Batch] = {}
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
                example=data.x[:1].to(self.device, self.dtype),
                grid=privacy.mechanism if privacy.noise_form == "grid" else None,
                clipping=privacy.clipping,
                mechanism=privacy.mechanism,
                automatic=privacy.comparator.clip_function == "automatic",
            )

    @property
    def steps(self) -> int:
        """Noised events in one release."""
        return self.training.noised_steps if self.privacy.unit == "record" else 1

    def expected_batch(self, clients: Tensor) -> Tensor:
        """The public number that a sum and its noise are divided by, [k].

        B = q·n_k for records, 1 for whole updates, whose noise is added undivided.
        """
        if self.privacy.unit != "record":
            return torch.ones(len(clients))
        rate = self.training.sampling_rate
        return self.data.client_sizes[clients] * (1.0 if rate is None else rate)

    def train(
        self,
        clients: Tensor,
        params: Params,
        coins: NoiseKey,
        round: int,
        hook: GradientHook | None = None,
    ) -> Params:
        """Local training of some clients; private.

        Args:
            clients: ids [k], at least one.
            params: global model; of each client [k, ...] where they are stacked.
            coins: key of the batches and of what the network draws.
            round: round number.
            hook: gives the descent direction of a batch; None: its mean gradient.

        Returns:
            Local minus global parameters, each [k, ...].
        """
        known = None if not self.training.personal else self.fit_personal(clients, params)
        stream = coins.derive("torch", int(self.numbers[clients[0]]))  # one a group
        torch_seed = int(run_key.public_name(stream)[:15], 16)
        with _seeded(torch_seed, self.device), torch.no_grad():
            return train_cohort(
                params,
                self._batches(clients.tolist(), coins, round),
                hook or plain_gradient(self.plain, known),
                lr=self.training.lr,
                momentum=self.training.momentum,
                proximal=self.training.proximal,
                stacked=self.stacked,
            )

    def fit_personal(self, clients: Tensor, params: Params) -> Params:
        """Personal layers of some clients, fitted to all their training records; private.

        Args:
            clients: ids [k], at least one.
            params: global model, as for `train`.

        Returns:
            Their parameters, each [k, ...].
        """
        rules = self.training
        with torch.no_grad():
            return fit_personal(
                self.plain,
                start_of(self.network, rules.personal),
                params,
                self._all_records(tuple(clients.tolist())),
                steps=rules.personal_steps,
                lr=rules.personal_lr,
                stacked=self.stacked,
            )

    def rehearse(self, params: Params, policy: LayerPolicy | None, examples: int = 1024) -> None:
        """One local step on zeros of the usual shape, to time it.

        Args:
            params: global model.
            policy: of at least as many clients as are timed; None where records are not clipped.
            examples: records of the step.
        """
        sizes = self.data.client_sizes
        rate, batch_size = self.training.sampling_rate, self.training.batch_size
        width = max(1, round(rate * float(sizes.double().mean()))) if rate else batch_size
        assert width is not None
        k = min(len(sizes), max(2, examples // width))
        data, device = self.data, self.device
        batch = Batch(
            torch.zeros(k, width, *data.x.shape[1:], dtype=self.dtype, device=device),
            torch.zeros(k, width, *data.y.shape[1:], dtype=data.y.dtype, device=device),
            torch.ones(k, width, device=device),
            torch.full((k,), float(width), device=device),
            torch.ones(k, dtype=torch.bool, device=device),
        )
        shared = self.training.local_steps == 1
        if not shared:
            params = {name: p.expand(k, *p.shape).clone() for name, p in params.items()}
        with torch.random.fork_rng(), torch.no_grad():
            if policy is not None:
                self.clipped_sums(params, shared, batch, policy.select(torch.arange(k)))
            else:
                self.plain(params, batch, shared=shared)

    def _batches(self, clients: list[int], coins: NoiseKey, round: int) -> Iterator[Batch]:
        rows = [self.data.partition.client(k) for k in clients]
        sizes, numbers = [len(r) for r in rows], self.numbers[clients].tolist()
        rate, divisor = self.training.sampling_rate, None
        if rate == 1:
            for _ in range(self.training.noised_steps):
                yield self._all_records(tuple(clients))
            return
        if rate is not None:
            steps = self.training.noised_steps
            chosen = poisson_rows(sizes, rate, steps, key=coins, clients=numbers)
            divisor = torch.tensor([rate * n for n in sizes])
        else:
            assert self.training.batch_size is not None
            seeds = [[self.training.seed, round, k] for k in numbers]
            chosen = shuffled_rows(
                sizes,
                self.training.batch_size,
                self.training.local_steps,
                self.training.local_epochs,
                seeds=seeds,
            )
        x, y = self.data.x, self.data.y
        for step in chosen:
            records = [r[s] for r, s in zip(rows, step, strict=True)]
            yield gather(x, y, records, divisor=divisor, device=self.device, dtype=self.dtype)

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
                device=self.device,
                dtype=self.dtype,
            )
        return self._whole[clients]


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
