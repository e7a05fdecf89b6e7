"""The federated LightningModule: one training step is one round of AADP-FL."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from aadp_kernels import Layout
from fl_lightning.accounting.budget import Budget
from fl_lightning.data import FederatedDataModule
from fl_lightning.kernel_choice import kernels_for
from fl_lightning.ledger import Ledger
from fl_lightning.local.personal import take_out_personal
from fl_lightning.networks.check import check_network
from fl_lightning.networks.metrics import named_metrics
from fl_lightning.networks.outputs import class_scores, record_loss
from fl_lightning.preflight.checks import check_run
from fl_lightning.preflight.proposed_run import ProposedRun, trained_layers
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.processes.strategy import processes_of
from fl_lightning.processes.together import Processes
from fl_lightning.release.agreement import check_deployable
from fl_lightning.release.evaluation import Evaluated
from fl_lightning.release.federation import Federation
from fl_lightning.release.held_out import HeldOutFigures
from fl_lightning.release.personal_models import personal_models
from fl_lightning.resumption import check_resumption, promise_of, run_facts, training_facts
from fl_lightning.rules import Rules, planned_rounds
from fl_lightning.run import Run, begin_run
from fl_lightning.run_spec import RunSpec
from fl_lightning.server.add_up import check_agreement
from fl_lightning.server.aggregate import WeightedMean
from fl_lightning.server.faults import Faults
from fl_lightning.server.optimizer import make_optimizer, make_schedule, weights_in_last_model
from fl_lightning.values.round import RoundResult


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
        client_proximal: μ of FedProx: local steps are drawn back to the global model, at least 0.
        personal_layers: modules or parameters, by name, that each client fits to its own records in
            every round and never sends (docs/settings.md); where clients are the unit, or without
            privacy.
        personal_steps: of full gradient descent in a fit, at least 1.
        personal_lr: learning rate of a fit.
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
        loss: loss of each record, (outputs, labels) → [B]; null: cross entropy. Of torch's losses
            (reduction='none') several numbers a record are averaged; see `PerRecord`.
        metrics: torchmetrics Metric or MetricCollection, or metrics by name: further figures of
            held-out and test records, each one number. Null: none.
        run_dir: folder of ledger, secret and statement. Null: the Trainer's default_root_dir.

    Raises:
        ValueError: for values out of range, here or, where they need the data, before round 0.
    """

    federation: Federation | None = None  # nodes in place of simulated clients
    member = False  # at a node
    search: dict[str, Any] | None = None  # that the run is a candidate of
    run: Run | None = None
    result: RoundResult | None = None
    evaluated: Evaluated | None = None  # of the round at hand
    network_spec: dict[str, Any] | None = None  # class_path and init_args, if known
    _resumed: dict[str, Any] | None = None
    _training_facts: dict[str, Any]
    _checked: tuple[pl.Trainer, bool] | None = None  # and whether clients can be vmapped
    _figures: HeldOutFigures  # of the evaluation at hand

    def __init__(
        self,
        network: nn.Module,
        privacy: PrivacyConfig | None = None,
        *,
        clients_per_round: int | None = None,
        sampling_rate: float | None = 0.1,
        batch_size: int | None = None,
        local_steps: int | None = 1,
        local_epochs: int = 1,
        client_lr: float = 0.1,
        client_momentum: float = 0.0,
        client_proximal: float = 0.0,
        personal_layers: Sequence[str] = (),
        personal_steps: int = 20,
        personal_lr: float = 1.0,
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
        metrics: Metric | MetricCollection | dict[str, Metric] | None = None,
        run_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        check_network(network)
        self.network = network
        self.rules = Rules(
            privacy=privacy or PrivacyConfig(),
            clients_per_round=clients_per_round,
            sampling_rate=sampling_rate,
            batch_size=batch_size,
            local_steps=local_steps,
            local_epochs=local_epochs,
            client_lr=client_lr,
            client_momentum=client_momentum,
            client_proximal=client_proximal,
            personal=take_out_personal(network, personal_layers),
            personal_steps=personal_steps,
            personal_lr=personal_lr,
            weighting=weighting,
            denoise=denoise,
            planned_rounds=planned_rounds,
            execution=execution,
            memory_budget=memory_budget,
            seed=seed,
            faults=Faults(dropout, deadline, seed),
        )
        self.server_optimizer, self.server_scheduler = server_optimizer, server_scheduler
        self.loss: Callable[[Tensor, Tensor], Tensor] = record_loss(loss or cross_entropy)
        self.metrics = named_metrics(metrics)
        self.run_dir = run_dir
        self.processes = Processes()

    # The algorithm ------------------------------------------------------------------------------

    def training_step(self, batch: int, batch_idx: int) -> None:
        """One round: every client of the cohort releases; the server adds the mean."""
        assert self.run is not None
        with kernels_for(self.rules, self.layout, self.data.client_sizes, self.run.planned_rounds):
            self._round(self.run)

    def _round(self, run: Run) -> None:
        started, round = time.perf_counter(), self.current_epoch
        cohort, params = run.cohort(round), run.spec.params()
        context = run.context(cohort)
        check_agreement(self.processes, [*params.values(), *run.history.state_dict().values()])
        mean, released = WeightedMean(self.layout), []
        for clients in run.releases.groups(cohort):
            # Clip norms and shares from released history, local training, clipping, noise,
            # ledger: after this line everything is public.
            update = run.releases.release(clients, params, round, context)
            released.append(update)
            run.releases.add_to(mean, update, round)
        released = run.releases.meet(mean, released, cohort, params)
        if mean.weight.any():
            mean.write_gradient(self.network, denoise=self.rules.denoise)
            self._server_step()
        self.evaluated = run.evaluate(round)
        if self.evaluated is not None:
            once = {"on_step": False, "on_epoch": True, "batch_size": 1}
            self.log("val_private_accuracy", self.evaluated.accuracy, **once)
        self.result = RoundResult.of(
            round,
            released,
            participants=run.releases.participants(cohort, released),
            epsilon_spent=run.epsilon_spent(),
            seconds=time.perf_counter() - started,
        )
        if run.nobody_is_left(round):
            self.trainer.should_stop = True

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
        return trained_layers(self.network, self.rules)

    @property
    def privacy(self) -> PrivacyConfig:
        """What the run promises to whom."""
        return self.rules.privacy

    @property
    def budget(self) -> Budget:
        """Noise multipliers, and what every client has spent.

        Raises:
            RuntimeError: the run has not begun.
        """
        if self.run is None:
            raise RuntimeError("budget: the run has not begun; call trainer.fit first")
        return self.run.budget

    @property
    def batch_size(self) -> int | None:
        """Records in a minibatch, where Lightning's own tools look for it."""
        return self.rules.batch_size

    @property
    def ledger(self) -> Ledger | None:
        """What was released; None before the first round and without privacy."""
        return None if self.run is None else self.run.ledger

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
                f"datamodule={data!r} must be a FederatedDataModule, which knows who holds what"
            )
        return data

    def check(self, data: FederatedDataModule, trainer: pl.Trainer) -> None:
        """Check the run and do a dry round, so that nothing is done yet when `fit` begins.

        Raises:
            ValueError: naming the argument and its value.
        """
        if self.federation is not None:
            check_deployable(self.rules)
            data.announce_sizes([m.records or 2 for m in self.federation.members])
        self._checked = trainer, check_run(self.proposed(data, trainer))

    def proposed(self, data: FederatedDataModule, trainer: pl.Trainer) -> ProposedRun:
        """The run before anything of it exists."""
        server = self.server_optimizer, self.server_scheduler
        what = self.rules, self, self.network, self.loss
        away = self.federation is not None
        return ProposedRun(*what, *server, data, trainer, self.member, self.metrics, away)

    def setup(self, stage: str) -> None:
        """Check everything before anything is done."""
        self.processes = processes_of(self.trainer)
        self.data.by_owner = bool(self.rules.personal)
        if stage == "fit" and (self._checked is None or self._checked[0] is not self.trainer):
            self.check(self.data, self.trainer)

    def on_fit_start(self) -> None:
        """Begin the run: secret, ledger, budget and history are there before round 0."""
        self._training_facts = training_facts(self.network, self.configure_optimizers())
        spec = RunSpec(
            self.rules,
            self.network,
            self.loss,
            self.layout,
            self.data,
            self.run_path,
            self.processes,
            vmaps=self._checked is not None and self._checked[1],
            last_model=partial(weights_in_last_model, self.server_optimizer, self.server_scheduler),
            resumed=self._resumed,
            federation=self.federation,
            search=self.search,
        )
        planned = planned_rounds(self.rules, self.trainer.max_epochs, self._resumed)
        self.run = begin_run(spec, planned)
        self._checked = None

    # What a checkpoint keeps --------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Everything but the secret, which stays in the run's private file."""
        if self.run is None:
            return
        checkpoint["aadp_fl"] = self.run.state_dict() | {
            "promise": promise_of(self.rules, self.run.records),
            "training": self._training_facts,
            "run": run_facts(self.network, self.network_spec, self.rules, self.data, checkpoint),
        }

    def check_resumption(self, checkpoint: dict[str, Any], max_epochs: int | None) -> None:
        """Whether the run can go on from a checkpoint, as far as it shows without the ledger.

        Raises:
            ValueError: naming the option, its value and that of the checkpoint.
        """
        check_resumption(
            checkpoint,
            rules=self.rules,
            max_epochs=max_epochs,
            training=training_facts(self.network, self.configure_optimizers()),
            state_dict=self.state_dict(),
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state until `on_fit_start` can check it against the ledger."""
        trainer = self._trainer
        if trainer is not None and trainer.state.fn == "fit":
            self.check_resumption(checkpoint, trainer.max_epochs)
        self._resumed = checkpoint.get("aadp_fl")

    def teardown(self, stage: str) -> None:
        """Release the lock on the ledger."""
        if stage == "fit" and self.ledger is not None:
            self.ledger.close()

    # What is shown ------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the global model."""
        return self.network(x)

    def on_validation_epoch_start(self) -> None:
        """Figures are those of the model as it is now, and of clients' own where they have them."""
        vmaps = self.run is not None and self.run.releases.clients.vectorize
        proposed = self.proposed(self.data, self.trainer)
        models = personal_models(proposed, vectorize=vmaps, elsewhere=proposed.elsewhere)
        self._figures = HeldOutFigures(proposed, models)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Held-out records of the clients: private, so only a simulation may look."""
        self._figures.add(batch)

    def on_validation_epoch_end(self) -> None:
        """Log what all processes found."""
        self._log_figures("sim_only/val_")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Test records, read once at the end."""
        self._figures.add(batch)

    def on_test_epoch_end(self) -> None:
        """Log what all processes found."""
        self._log_figures("test/")

    def _log_figures(self, prefix: str) -> None:
        several = self.processes.size > 1  # the maximum of equal values is each of them
        for name, value in self._figures.values(self.processes).items():
            self.log(f"{prefix}{name}", value.float(), sync_dist=several, reduce_fx="max")
