"""Prepares a run before its first round: secret, ledger, budget, history, and who trains."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadp_kernels import NoiseKey
from fl_lightning.accounting.budget import Budget
from fl_lightning.accounting.cohort import cohort_schedule, participations_of
from fl_lightning.accounting.correlated import CorrelatedPlan, best_for
from fl_lightning.accounting.evaluation import EvaluationPlan
from fl_lightning.keys import binding, run_key
from fl_lightning.keys.released_noise import ReleasedNoise
from fl_lightning.ledger import Ledger, LedgerError
from fl_lightning.ledger.accounts import accounts
from fl_lightning.local.execution import bytes_per_example, faster_execution
from fl_lightning.local.rules import named_rules
from fl_lightning.networks.inputs import input_dtype
from fl_lightning.privacy.history import ReleasedHistory
from fl_lightning.privacy.named_options import named_options
from fl_lightning.release.agreement import Agreement, network_digest
from fl_lightning.release.claim import Books
from fl_lightning.release.clients import Clients
from fl_lightning.release.evaluation import Evaluated, Evaluations, plan_evaluations
from fl_lightning.release.federation import agreements, write_members
from fl_lightning.release.one_by_one import OneByOne
from fl_lightning.release.remote import Remote, join
from fl_lightning.release.remote_evaluation import RemoteEvaluations, held_out_elsewhere
from fl_lightning.release.remote_sum import RemoteSum
from fl_lightning.release.summed import Summed, noise_parts_needed
from fl_lightning.resumption import check_promise
from fl_lightning.run_ledger import open_ledger
from fl_lightning.run_spec import RunSpec

_LOG = logging.getLogger("pytorch_lightning")


@dataclass(frozen=True)
class Run:
    """What the rounds of a run share.

    Args:
        spec: what was asked for.
        planned_rounds: rounds that cohorts and noise are planned for.
        schedule: clients of every planned round, int64 [rounds, m].
        history: what releases showed.
        budget: noise multipliers, and steps spent.
        ledger: where releases are written; None without privacy.
        key: the run's secret.
        run_id: public name of the secret.
        records: public name of the records and who holds them.
        releases: how numbers leave the clients.
        max_examples: records computed at once.
        evaluations: private evaluations; None: there are none.
        process_counts: how many processes the run began with, then how many it went on with.
        last_paid_round: last round in the ledger when the run began, -1 if none.
    """

    spec: RunSpec
    planned_rounds: int
    schedule: np.ndarray
    history: ReleasedHistory
    budget: Budget
    ledger: Ledger | None
    key: NoiseKey
    run_id: str
    records: str
    releases: OneByOne | Summed | Remote
    evaluations: Evaluations | RemoteEvaluations | None
    max_examples: int
    process_counts: list[int]
    last_paid_round: int

    def cohort(self, round: int) -> Tensor:
        """Clients that take part in a round: those on the schedule that can still pay, [m]."""
        return self.releases.cohort(self.schedule[round], round)

    def context(self, cohort: Tensor) -> str:
        """Digest of all that a round's updates depend on and that the round does not hold."""
        spec, clients = self.spec, self.releases.clients
        return binding.round_context(
            spec.network,
            spec.loss,
            data=spec.data.digest(),
            rules=(named_options(spec.rules.privacy), named_rules(clients.training)),
            execution=(str(clients.device), int(clients.vectorize), self.max_examples),
            cohort=cohort,
            processes=self.process_counts,
            bits=spec.rules.privacy.seed is None,
        )

    def evaluate(self, round: int) -> Evaluated | None:
        """Release the private evaluation that a round ends with; None where it has none."""
        if self.evaluations is None or not self.evaluations.due(round):
            return None
        return self.evaluations.release(round, self.context(self.evaluations.clients))

    def epsilon_spent(self) -> np.ndarray:
        """Upper bound of ε so far of every client, [K]; infinite without privacy."""
        if self.ledger is None:
            return np.full(self.spec.data.num_clients, np.inf)
        return self.budget.epsilon_spent()

    def epsilon_at_the_end(self) -> np.ndarray:
        """ε of every client as the ledger has it, [K]; infinite without privacy."""
        running = self.budget.running
        if self.ledger is None or running is None or running.exact:
            return self.epsilon_spent()
        found = accounts(self.ledger.header, self.ledger)
        return np.array([found[client].epsilon() for client in sorted(found)])

    def nobody_is_left(self, round: int) -> bool:
        """Whether no client can pay for another round and none that is paid for is left to repeat.

        After a crash the ledger may be ahead of the checkpoint by whole rounds.
        """
        if self.ledger is None or round < self.last_paid_round:
            return False
        return self.budget.nobody_can_pay(self.spec.rules.steps_a_release)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: everything but the secret, which stays in its private file."""
        return {
            "history": self.history.checkpoint(),
            "budget": self.budget.state_dict(),
            "planned_rounds": self.planned_rounds,
            "vectorize": self.releases.clients.vectorize,
            "processes": self.process_counts,
            "run_id": self.run_id,
            "releases": 0 if self.ledger is None else len(self.ledger),
            "ledger_head": None if self.ledger is None else self.ledger.head_hash,
        }


def begin_run(spec: RunSpec, planned: int) -> Run:
    """Calibrate or restore the noise, open the ledger, choose how clients train together.

    Raises:
        ValueError: naming the argument and its value.
        LedgerError: the ledger is not that of the run.
    """
    rules, data, resumed = spec.rules, spec.data, spec.resumed
    counts = _agree_on_start(spec)
    everyone = data.num_clients
    rate = rules.cohort_rate(everyone)
    size = everyone if rate else rules.cohort_size(everyone)
    one_order = rules.privacy.correlated
    schedule = cohort_schedule(everyone, size, planned, rules.seed, one_order=one_order)
    histories = 1 if rules.privacy.summed else everyone
    history = ReleasedHistory(rules.privacy, histories, spec.layout.dims)
    plan = _correlated_plan(spec, schedule)
    budget = _budget(spec, schedule, rate, plan, planned)
    key = _find_key(spec)
    run_id = run_key.public_name(key.derive("run"))
    terms = _join(spec, budget, run_id, planned)
    records = run_key.public_name(key.derive("records", data.digest()))
    if resumed is not None:
        if resumed["run_id"] != run_id:
            raise LedgerError(
                f"{spec.folder}: the checkpoint is of another run than the secret there"
            )
        check_promise(rules, resumed["promise"], records)
        history.load_checkpoint(resumed["history"])
        budget.load_state_dict(resumed["budget"])
    ledger = open_ledger(spec, budget, run_id) if rules.privacy.private else None
    if ledger is not None:
        budget.follow(ledger.header)
    last_paid_round = -1
    for release in ledger or ():
        budget.spend(release)
        last_paid_round = max(last_paid_round, release.round)
    example = data.x[0].to(
        next(spec.network.parameters()).device, input_dtype(spec.network, data.x)
    )
    memory = rules.memory_budget * 2**30
    max_examples = max(1, int(memory / bytes_per_example(spec.network, example)))
    books = None if ledger is None else Books(history, budget, ledger, spec.processes)
    noise = _released_noise(spec, key, ledger) if plan is not None else None
    releases = _releases(spec, key, books, max_examples, noise, terms)
    return Run(
        spec=spec,
        planned_rounds=planned,
        schedule=schedule,
        history=history,
        budget=budget,
        ledger=ledger,
        key=key,
        run_id=run_id,
        records=records,
        releases=releases,
        evaluations=_evaluations(spec, key, books, releases),
        max_examples=max_examples,
        process_counts=counts,
        last_paid_round=last_paid_round,
    )


def _agree_on_start(spec: RunSpec) -> list[int]:
    """One model in all processes; how many there were and are."""
    processes = spec.processes
    if processes.size > 1:
        state = spec.network.state_dict
        known = processes.first(lambda: {n: v.cpu() for n, v in state().items()})
        spec.network.load_state_dict(known)
    counts = [] if spec.resumed is None else list(spec.resumed.get("processes", [1]))
    return counts if counts[-1:] == [processes.size] else [*counts, processes.size]


def _correlated_plan(spec: RunSpec, schedule: np.ndarray) -> CorrelatedPlan | None:
    """The coefficients of noise that rounds share, chosen once, and what they cost each client."""
    privacy, everyone = spec.rules.privacy, spec.data.num_clients
    if not privacy.correlated or not len(schedule):
        return None

    def chosen() -> tuple[float, ...]:
        if spec.resumed is not None:
            return tuple(spec.resumed["budget"].get("coefficients", (1.0,)))
        found = best_for(privacy.bands, spec.last_model(len(schedule)), schedule, everyone)
        if len(found) == 1:
            _LOG.info(
                "correlation='banded' has nothing to gain with these cohorts: the noise of each "
                "round is its own"
            )
        return found

    return CorrelatedPlan.of(spec.processes.first(chosen), schedule, everyone)


def _released_noise(spec: RunSpec, key: NoiseKey, ledger: Ledger | None) -> ReleasedNoise:
    """Keys of the noise of released rounds. Every round of the ledger must have one."""
    noise = ReleasedNoise(key, spec.folder, once=spec.processes.first)
    for release in ledger or ():
        noise.find(release.binding)
    return noise


def _budget(
    spec: RunSpec,
    schedule: np.ndarray,
    cohort_rate: float | None,
    plan: CorrelatedPlan | None,
    rounds: int,
) -> Budget:
    """Multipliers for the schedule, calibrated unless a checkpoint has them."""
    rules, everyone = spec.rules, spec.data.num_clients
    steps = rules.steps_a_release
    budget = Budget(
        rules.privacy,
        (participations_of(schedule, everyone) * steps).tolist(),
        (rules.sampling_rate if rules.privacy.unit == "record" else cohort_rate) or 1.0,
        spec.layout.dims,
        noise_parts_needed(rules, everyone),
        plan,
        _planned_evaluations(spec, rounds),
    )
    if spec.resumed is None and rules.privacy.private and spec.federation is None:

        def calibrated() -> dict[str, object]:
            budget.calibrate(steps)
            return budget.state_dict()

        budget.load_state_dict(spec.processes.first(calibrated))
    return budget


def _planned_evaluations(spec: RunSpec, rounds: int) -> EvaluationPlan | None:
    """Private evaluations of the records that clients, or nodes, hold out; None: there are none."""
    privacy = spec.rules.privacy
    if not privacy.evaluate_every:
        return None
    if spec.federation is not None:
        records = held_out_elsewhere(spec.federation.members, privacy)
    else:
        records = spec.data.held_out_partition.sizes
    return plan_evaluations(privacy, records, spec.span or rounds)


def _evaluations(
    spec: RunSpec, key: NoiseKey, books: Books | None, releases: OneByOne | Summed | Remote
) -> Evaluations | RemoteEvaluations | None:
    """Who releases the private evaluations that are planned."""
    if books is None or books.budget.evaluations is None:
        return None
    if spec.federation is None:
        return Evaluations(spec, key, books, spec.number)
    assert isinstance(releases, Remote)
    return RemoteEvaluations(releases, spec.rules.privacy, spec.params)


def _join(spec: RunSpec, budget: Budget, run_id: str, planned: int) -> list[Agreement]:
    """The terms of each node. A run that begins takes the noise multipliers that nodes computed."""
    if spec.federation is None:
        return []
    terms = agreements(
        spec.rules,
        spec.federation.members,
        run=run_id,
        network=network_digest(spec.network, spec.loss),
        steps=budget.planned_steps,
        span=planned,
    )
    if spec.resumed is None:
        join(spec.federation, terms, budget)
        write_members(spec.folder, spec.federation.members)
    return terms


def _find_key(spec: RunSpec) -> NoiseKey:
    """The key of the run, which process 0 makes and the others read in the same folder."""
    rules, folder, processes = spec.rules, spec.folder, spec.processes
    if len(set(processes.together(lambda: str(folder.absolute())))) > 1:
        raise ValueError(
            f"run_dir={folder}: the processes of the run have different folders; give --run_dir, "
            "one that all of them see"
        )
    # Without privacy there is nothing to keep secret: the coins follow the public seed.
    seed = rules.privacy.seed if rules.privacy.private else rules.seed

    def key(resume: bool) -> NoiseKey:
        return run_key.run_key(folder, seed=seed, rng=rules.privacy.rng, resume=resume)

    def make() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        key(spec.resumed is not None)

    processes.first(make)
    return key(True)


def _releases(
    spec: RunSpec,
    key: NoiseKey,
    books: Books | None,
    max_examples: int,
    noise: ReleasedNoise | None,
    terms: list[Agreement],
) -> OneByOne | Summed | Remote:
    """How numbers leave the clients, in the execution that is faster."""
    rules, data = spec.rules, spec.data

    def clients(vectorize: bool) -> Clients:
        return Clients(
            data,
            spec.network,
            spec.loss,
            spec.layout,
            privacy=rules.privacy,
            training=rules.training,
            vectorize=vectorize,
            max_examples=max_examples,
            at_once=rules.clients_at_once(int(data.client_sizes.max()), max_examples),
            numbers=None if spec.number is None else torch.tensor([spec.number]),
        )

    if spec.federation is not None:
        assert books is not None
        if rules.privacy.summed:
            return RemoteSum(clients(False), rules, key, books, spec.federation, terms)
        return Remote(clients(False), rules, books, spec.federation, terms)
    chosen = clients(spec.processes.first(lambda: _choose_execution(spec, clients, books)))
    if rules.privacy.summed:
        assert books is not None
        return Summed(chosen, rules, key, books, noise)
    return OneByOne(chosen, rules, key, books, spec.processes)


def _choose_execution(
    spec: RunSpec, clients: Callable[[bool], Clients], books: Books | None
) -> bool:
    """Whether clients train together under vmap."""
    if spec.resumed is not None:
        return bool(spec.resumed["vectorize"])
    if spec.rules.execution != "auto" or not spec.vmaps:
        return spec.vmaps
    params, policy = spec.params(), None
    if spec.rules.privacy.unit == "record":
        assert books is not None
        few = torch.arange(min(spec.data.num_clients, 1024))
        policy = books.history.policy(few, books.budget.multiplier[few])
    vectorize, reason = faster_execution(lambda v: clients(v).rehearse(params, policy))
    _LOG.info(reason)
    return vectorize
