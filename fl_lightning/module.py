"""The federated LightningModule: one training step is one round of AADP-FL."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from aadp_kernels import Layout, NoiseKey
from fl_lightning import binding, secrets
from fl_lightning.aggregate import WeightedMean, client_weights, noise_variance
from fl_lightning.client import bytes_per_example, faster_execution, input_dtype
from fl_lightning.cohort import cohort_schedule, participations_of
from fl_lightning.data import FederatedDataModule
from fl_lightning.evaluation import batch_sums, class_scores, record_loss
from fl_lightning.faults import Faults
from fl_lightning.header import ledger_header
from fl_lightning.ledger import Ledger, LedgerError
from fl_lightning.network_check import check_network
from fl_lightning.pooled import make_pool, shares_needed
from fl_lightning.population import ClientPopulation, LocalTraining
from fl_lightning.preflight import check_run, check_training
from fl_lightning.privacy.budget import Budget
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.resumption import (
    check_promise,
    check_resumption,
    promise_of,
    run_facts,
    training_facts,
)
from fl_lightning.server_step import make_optimizer, make_schedule
from fl_lightning.sharing import add_up, check_agreement
from fl_lightning.strategy import processes_of
from fl_lightning.types import Params, PrivateUpdate, RoundResult


def server_sgd(parameters: Any) -> torch.optim.Optimizer:
    """Plain FedAvg: add the mean update to the model."""
    return torch.optim.SGD(parameters, lr=1.0)


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each record: (logits [B, classes], or what has them, labels [B]) → [B]."""
    scores = outputs if isinstance(outputs, Tensor | tuple | list) else class_scores(outputs)
    assert isinstance(scores, Tensor), f"it takes logits, not a {type(outputs).__name__}"
    return nn.functional.cross_entropy(scores, labels, reduction="none")


class FederatedModule(pl.LightningModule):
    """Federated training of a network with personalised differential privacy.

    A training batch is a round number; `max_epochs` of the Trainer is the number of rounds.

    Args:
        network: the model; records in, one row of outputs a record. No batch statistics.
        privacy: what is promised to whom; see PrivacyConfig.
        clients_per_round: clients in a round's cohort; null: all of them.
        sampling_rate: Poisson rate q of a record in a local step, in (0, 1]; needed for
            record+local. Null: shuffled minibatches of batch_size.
        batch_size: records in a shuffled minibatch; null with sampling_rate.
        local_steps: local steps a client takes a round; null: local_epochs passes.
        local_epochs: passes over the client's records a round (1/q steps each under Poisson
            sampling); only if local_steps is null.
        client_lr: learning rate of local SGD.
        client_momentum: momentum of local SGD, in [0, 1).
        server_optimizer: torch.optim class applied to the mean update as if it were a gradient;
            SGD with lr 1 is FedAvg, with momentum FedAvgM, Adam FedAdam.
        server_scheduler: torch.optim.lr_scheduler class stepped once a round, or null.
        weighting: weight of a client in the mean: records (n_k), uniform, or precision (inverse
            noise variance, for clients with different ε).
        denoise: whether the server shrinks each layer's mean by the share of its energy that is
            noise (post-processing); needs noise added once a release, by each client for itself.
        planned_rounds: rounds that the noise is calibrated for; null: the Trainer's max_epochs.
        execution: whether the clients of a cohort are trained together under vmap, one after
            another in a loop, or in whichever way is measured to be faster (auto).
        memory_budget: memory for the activations of clients trained together, in GiB.
        dropout: probability that a client of the cohort fails in a round before it releases
            anything, in [0, 1); simulated from the public seed. It is not charged then.
        deadline: virtual time after which an upload is not used, in medians of the clients' times;
            null: none. A late upload was released all the same and is charged.
        seed: public seed of the cohort schedule, of shuffled minibatches and of faults.
        loss: loss of each record, (outputs, labels) → [B]; null: cross entropy.
        run_dir: folder of the run: ledger, secret, statement. Null: the Trainer's
            default_root_dir.

    Raises:
        ValueError: for values out of range, here or, where they need the data, before round 0.
    """

    def __init__(
        self,
        network: nn.Module,
        privacy: PrivacyConfig | None = None,
        clients_per_round: int | None = None,
        sampling_rate: float | None = 0.1,
        batch_size: int | None = None,
        local_steps: int | None = 1,
        local_epochs: int = 1,
        client_lr: float = 0.1,
        client_momentum: float = 0.0,
        server_optimizer: OptimizerCallable = server_sgd,
        server_scheduler: LRSchedulerCallable | None = None,
        weighting: Literal["records", "uniform", "precision"] = "records",
        denoise: bool = False,
        planned_rounds: int | None = None,
        execution: Literal["auto", "vmap", "loop"] = "auto",
        memory_budget: float = 1.0,
        dropout: float = 0.0,
        deadline: float | None = None,
        seed: int = 0,
        loss: nn.Module | None = None,
        run_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = network
        self.privacy = privacy or PrivacyConfig()
        self.clients_per_round = clients_per_round
        self.sampling_rate = sampling_rate
        self.batch_size = batch_size
        self.local_steps = local_steps
        self.local_epochs = local_epochs
        self.client_lr = client_lr
        self.client_momentum = client_momentum
        self.server_optimizer = server_optimizer
        self.server_scheduler = server_scheduler
        self.weighting = weighting
        self.denoise = denoise
        self.planned_rounds = planned_rounds
        self.execution = execution
        self.memory_budget = memory_budget
        self.faults = Faults(dropout, deadline, seed)
        self.seed = seed
        self.loss: Callable[[Tensor, Tensor], Tensor] = record_loss(loss or cross_entropy)
        self.run_dir = run_dir
        self.network_spec: dict[str, Any] | None = None  # class_path and init_args, if known
        check_training(self)
        check_network(network)
        self.ledger: Ledger | None = None
        self.result: RoundResult | None = None
        self._resumed: dict[str, Any] | None = None
        self._checked: tuple[pl.Trainer, bool] | None = None  # and whether clients can be vmapped
        self._last_paid_round = -1
        self._evaluated = torch.zeros(4, dtype=torch.float64)  # see `batch_sums`

    # The algorithm ------------------------------------------------------------------------------

    def training_step(self, batch: int, batch_idx: int) -> None:
        """One round: every client of the cohort releases; the server adds the mean."""
        started = time.perf_counter()
        cohort = self.cohort(self.current_epoch)
        context = binding.round_context(
            self.network,
            self.loss,
            data=self.data.digest(),
            rules=(self.privacy, self.clients.training),
            execution=(str(self.device), int(self.vectorize), self._max_examples),
            cohort=cohort,
            processes=self._process_counts,
            bits=self.privacy.seed is None,
        )
        params = self._global_params()
        check_agreement(self.processes, [*params.values(), *self.history.state_dict().values()])
        mean, released, groups = WeightedMean(self.layout), [], self._groups(cohort)
        for clients in groups:
            # Clip norms and shares from released history, local training, clipping, noise,
            # ledger: after this line everything is public.
            update = self.clients.release(clients, params, self.current_epoch, context)
            released.append(update)
            in_time = self._in_time(update)
            mean.add(in_time.update, self._weights(in_time), self._noise_variance(in_time))
        if self.processes.size > 1 and not self.privacy.pooled:
            released = add_up(
                self.processes,
                mean,
                self.history if self.privacy.private else None,
                released,
                cohort=cohort,
                trained=torch.cat([cohort[:0], *map(self.processes.share, groups)]),
                params=params,
            )
        if mean.weight.any():
            mean.write_gradient(self.network, denoise=self.denoise)
            self._server_step()
        spent = self.budget.epsilon_spent() if self.privacy.private else None
        self.result = RoundResult.of(
            self.current_epoch,
            released,
            participants=self.clients.participants(cohort, released),
            epsilon_spent=np.full(self.data.num_clients, np.inf) if spent is None else spent,
            seconds=time.perf_counter() - started,
        )
        if self._nobody_is_left():
            self.trainer.should_stop = True

    def cohort(self, round: int) -> Tensor:
        """Clients that take part in a round: those on the schedule that can still pay, [m]."""
        scheduled = self.schedule[round]
        there = scheduled[~self.faults.failing(scheduled, round)]
        if self.privacy.pooled:
            there = there[~self.faults.late(there, round)]  # a sum does not wait
        return torch.from_numpy(there[self.clients.able(there, round)])

    def _groups(self, cohort: Tensor) -> Sequence[Tensor]:
        """Clients that release together: as many as fit into memories, or the whole sum."""
        if self.privacy.pooled or not len(cohort):
            return [cohort] if len(cohort) else []
        return cohort.split(self.clients_at_once * self.processes.size)

    def _in_time(self, update: PrivateUpdate) -> PrivateUpdate:
        """The part of a release that the server waits for."""
        if self.privacy.pooled:
            return update
        late = self.faults.late(update.clients.numpy(), self.current_epoch)
        return update.select(np.flatnonzero(~late).tolist()) if late.any() else update

    def _nobody_is_left(self) -> bool:
        """Whether no client can pay for another round and none that is paid for is left to repeat.

        After a crash the ledger may be ahead of the checkpoint by whole rounds.
        """
        if not self.privacy.private or self.current_epoch < self._last_paid_round:
            return False
        return self.budget.exhausted(self.clients.steps)

    def _global_params(self) -> Params:
        parameters = dict(self.network.named_parameters())
        return {name: parameters[name].detach() for name in self.layout.names}

    def _weights(self, update: PrivateUpdate) -> Tensor:
        if self.privacy.pooled:
            return torch.ones(len(update.clients), self.layout.num_layers, dtype=torch.float64)
        return client_weights(
            self.weighting,
            client_sizes=self.data.client_sizes[update.clients],
            expected_batch=self.clients.expected_batch(update.clients),
            policy=update.policy,
            num_layers=self.layout.num_layers,
        )

    def _noise_variance(self, update: PrivateUpdate) -> Tensor | None:
        if not self.denoise:
            return None
        assert update.policy is not None
        lr = self.client_lr if self.privacy.unit == "record" else 1.0
        factor = lr / self.clients.expected_batch(update.clients).double()
        return noise_variance(update.policy, self.privacy.mechanism, factor)

    def _server_step(self) -> None:
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
            scheduler.step()  # pyright: ignore[reportCallIssue]

    def configure_optimizers(self) -> Any:
        """The server optimizer, and its schedule if there is one."""
        trained = [p for p in self.network.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.server_optimizer, trained)
        schedule = make_schedule(self.server_scheduler, optimizer)
        return optimizer if schedule is None else {"optimizer": optimizer, "lr_scheduler": schedule}

    # Before round 0 -----------------------------------------------------------------------------

    @cached_property
    def layout(self) -> Layout:
        """The trained parameters and their layers, once lazy layers have theirs."""
        trained = {n: p for n, p in self.network.named_parameters() if p.requires_grad}
        flat = dict.fromkeys(trained, "all") if self.privacy.clipping == "flat" else None
        return Layout.build(trained, flat)

    @property
    def run_path(self) -> Path:
        """Folder of the run."""
        return Path(self.run_dir or self.trainer.default_root_dir).expanduser()

    @property
    def data(self) -> FederatedDataModule:
        """Records of the run and who holds them."""
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(data, FederatedDataModule):
            raise ValueError(
                f"datamodule={data!r}: FederatedModule needs a FederatedDataModule, which knows "
                "who holds which record"
            )
        return data

    def check(self, data: FederatedDataModule, trainer: pl.Trainer) -> None:
        """Check the run and do a dry round, so that nothing is done yet when `fit` begins.

        Raises:
            ValueError: naming the argument and its value.
        """
        self._checked = trainer, check_run(self, data, trainer)

    def setup(self, stage: str) -> None:
        """Check everything before anything is done."""
        self.processes = processes_of(self.trainer)
        if stage == "fit" and (self._checked is None or self._checked[0] is not self.trainer):
            self.check(self.data, self.trainer)

    def on_fit_start(self) -> None:
        """Calibrate or restore the noise, open the ledger, choose how to train together."""
        data, resumed = self.data, self._resumed
        self._share_start()
        planned = self._planned_rounds = self._plan()
        self._training_facts = training_facts(self)
        everyone, size = data.num_clients, self.clients_per_round or data.num_clients
        poisson = self.privacy.poisson_cohort and size < everyone
        self.schedule = cohort_schedule(everyone, everyone if poisson else size, planned, self.seed)
        training = LocalTraining(
            lr=self.client_lr,
            momentum=self.client_momentum,
            sampling_rate=self.sampling_rate,
            batch_size=self.batch_size,
            local_steps=self.local_steps,
            local_epochs=self.local_epochs,
            seed=self.seed,
        )
        record = self.privacy.unit == "record"
        participations = participations_of(self.schedule, data.num_clients)
        histories = 1 if self.privacy.pooled else data.num_clients
        self.history = ReleasedHistory(self.privacy, histories, self.layout.dims)
        rate = self.sampling_rate if record else size / everyone if poisson else None
        self.budget = Budget(
            self.privacy,
            (participations * (training.noised_steps if record else 1)).tolist(),
            rate or 1.0,
            self.layout.dims,
            shares_needed(self.privacy, size),
        )
        if resumed is None and self.privacy.private:
            self._calibrate(training.noised_steps if record else 1)
        self._key = self._find_key(resumed is not None)
        self._run_id = secrets.public_name(self._key.derive("run"))
        self._records = secrets.public_name(self._key.derive("records", data.digest()))
        if resumed is not None:
            self._restore(resumed)
        self._open_ledger()
        self._prepare_clients(training)

    def _plan(self) -> int:
        """Rounds that cohorts and noise are planned for; a private run keeps its plan."""
        resumed = (self._resumed or {}).get("planned_rounds") if self.privacy.private else None
        planned = resumed or self.planned_rounds or self.trainer.max_epochs
        assert planned is not None
        return planned

    def _share_start(self) -> None:
        """One model in all processes, and how many there were and are."""
        if self.processes.size > 1:
            state = self.network.state_dict
            known = self.processes.first(lambda: {n: v.cpu() for n, v in state().items()})
            self.network.load_state_dict(known)
        counts = [] if self._resumed is None else list(self._resumed.get("processes", [1]))
        if counts[-1:] != [self.processes.size]:
            counts.append(self.processes.size)
        self._process_counts = counts

    def _calibrate(self, steps_a_release: int) -> None:
        def state() -> dict[str, object]:
            self.budget.calibrate(steps_a_release)
            return self.budget.state_dict()

        self.budget.load_state_dict(self.processes.first(state))

    def _find_key(self, resume: bool) -> NoiseKey:
        """The key of the run, which process 0 makes and the others read in the same folder."""
        if len(set(self.processes.together(lambda: str(self.run_path.absolute())))) > 1:
            raise ValueError(
                f"run_dir={self.run_dir}: the processes of the run have different folders; give "
                "--run_dir, one that all of them see"
            )
        # Without privacy there is nothing to keep secret: the coins follow the public seed.
        public = self.privacy.seed if self.privacy.private else self.seed

        def key(resume: bool) -> NoiseKey:
            return secrets.run_key(self.run_path, seed=public, rng=self.privacy.rng, resume=resume)

        def make() -> None:
            self.run_path.mkdir(parents=True, exist_ok=True)
            key(resume)

        self.processes.first(make)
        return key(True)

    def _restore(self, resumed: dict[str, Any]) -> None:
        if resumed["run_id"] != self._run_id:
            raise LedgerError(
                f"{self.run_path}: the checkpoint is of another run than the secret there"
            )
        check_promise(self, resumed["promise"], self._records)
        self.history.load_checkpoint(resumed["history"])
        self.budget.load_state_dict(resumed["budget"])

    def _open_ledger(self) -> None:
        if not self.privacy.private:
            return

        def facts() -> tuple[Any, ...]:
            self.ledger = ledger = self._ledger_file()
            return ledger.header, ledger.releases, ledger.head_hash

        known = self.processes.first(facts)
        if self.ledger is None:
            self.ledger = Ledger.copy_of(self.run_path, *known)
        for release in self.ledger:
            self.budget.spend(release)
            self._last_paid_round = max(self._last_paid_round, release.round)

    def _ledger_file(self) -> Ledger:
        resumed = self._resumed
        if resumed is None:
            return Ledger.create(self.run_path, ledger_header(self, self._run_id))
        ledger = self.ledger = Ledger.open(self.run_path, resumed)
        if self.privacy.pooled and not ledger.header.get("schema"):
            raise LedgerError(
                f"{self.run_path}: the ledger is of schema 0, which had a line for every client of "
                "a sum: go on with the version that began the run, or start a new one"
            )
        return ledger

    def _prepare_clients(self, training: LocalTraining) -> None:
        data = self.data
        example = data.x[0].to(self.device, input_dtype(self.network, data.x))
        self._max_examples = max(
            1, int(self.memory_budget * 2**30 / bytes_per_example(self.network, example))
        )

        rate = self.sampling_rate
        width = self.batch_size or math.ceil((rate or 1.0) * int(data.client_sizes.max()))
        self.clients_at_once = max(1, self._max_examples // width)
        pool = make_pool(
            self.privacy,
            data.client_sizes,
            clients_per_round=self.clients_per_round,
            weighting=self.weighting,
            clients_at_once=self.clients_at_once,
        )

        def population(vectorize: bool) -> ClientPopulation:
            return ClientPopulation(
                data,
                self.network,
                self.loss,
                self.layout,
                privacy=self.privacy,
                training=training,
                history=self.history,
                budget=self.budget,
                key=self._key,
                ledger=self.ledger,
                vectorize=vectorize,
                max_examples=self._max_examples,
                pool=pool,
                processes=self.processes,
            )

        self.vectorize = self.processes.first(lambda: self._choose_execution(population))
        self.clients = population(self.vectorize)

    def _choose_execution(self, population: Callable[[bool], ClientPopulation]) -> bool:
        if self._resumed is not None:
            return bool(self._resumed["vectorize"])
        assert self._checked is not None
        (_, vmaps), self._checked = self._checked, None
        if self.execution != "auto" or not vmaps:
            return vmaps
        params = self._global_params()
        vectorize, reason = faster_execution(lambda v: population(v).rehearse(params))
        logging.getLogger("pytorch_lightning").info(reason)
        return vectorize

    # What a checkpoint keeps --------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Everything but the secret, which stays in the run's private file."""
        if not hasattr(self, "history"):
            return
        checkpoint["aadp_fl"] = {
            "history": self.history.checkpoint(),
            "budget": self.budget.state_dict(),
            "promise": promise_of(self, self._records),
            "planned_rounds": self._planned_rounds,
            "training": self._training_facts,
            "run": run_facts(self, checkpoint),
            "vectorize": self.vectorize,
            "processes": self._process_counts,
            "run_id": self._run_id,
            "releases": 0 if self.ledger is None else len(self.ledger),
            "ledger_head": None if self.ledger is None else self.ledger.head_hash,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state until `on_fit_start` can check it against the ledger."""
        trainer = self._trainer
        if trainer is not None and trainer.state.fn == "fit":
            check_resumption(self, checkpoint, trainer.max_epochs)
        self._resumed = checkpoint.get("aadp_fl")

    def teardown(self, stage: str) -> None:
        """Release the lock on the ledger."""
        if stage == "fit" and self.ledger is not None:
            self.ledger.close()

    # What is shown ------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the global model."""
        return self.network(x)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Held-out records of the clients: private, so only a simulation may look."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log what all processes found."""
        self._log_evaluation("sim_only/val_")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Test records, read once at the end."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Log what all processes found."""
        self._log_evaluation("test/")

    def _evaluate(self, batch: list[Tensor]) -> None:
        x, y = batch
        if not len(x):
            return  # fewer records than processes
        outputs = self.network(x.to(input_dtype(self.network, x)))
        self._evaluated += batch_sums(outputs, y, self.loss, self.data.num_classes)

    def _log_evaluation(self, prefix: str) -> None:
        (sums,) = self.processes.sum([self._evaluated])
        self._evaluated = torch.zeros(4, dtype=torch.float64)
        several = self.processes.size > 1  # the maximum of equal values is each of them
        values = {"loss": sums[1] / sums[0]}
        if sums[3]:  # some outputs say nothing of a class
            values["accuracy"] = sums[2] / sums[0]
        for name, value in values.items():
            self.log(f"{prefix}{name}", value.float(), sync_dist=several, reduce_fx="max")
