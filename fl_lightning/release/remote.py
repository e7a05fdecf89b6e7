"""The server's half of releases that nodes make: ask, compare, copy the ledger lines, hand on.

A node has paid and written before it answers. The server's ledger is a copy of all nodes' lines, so
that statement and pictures of the run are those of a simulation; the ledger that counts is each
node's own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fl_lightning.accounting.budget import Budget
from fl_lightning.keys import digests
from fl_lightning.release.agreement import Agreement
from fl_lightning.release.claim import Books
from fl_lightning.release.clients import Clients
from fl_lightning.release.federation import Answer, Federation, join_request
from fl_lightning.release.one_by_one import weigh
from fl_lightning.rules import Rules
from fl_lightning.server.aggregate import WeightedMean
from fl_lightning.values.message import encode
from fl_lightning.values.release import Release, parse_release
from fl_lightning.values.round import LayerPolicy, Params, PrivateUpdate

_LOG = logging.getLogger("pytorch_lightning")
_POLICY = ("clip_norm", "shares", "contribution", "noise_scale")
# Words at the head of a refusal that the server can do something about.
NOT_JOINED, SPENT = "not joined", "spent"


def join(federation: Federation, terms: Sequence[Agreement], budget: Budget) -> None:
    """Agree with every node, and take the multipliers that they calibrated.

    Args:
        federation: the nodes.
        terms: for each.
        budget: its multipliers and affordable steps become those of the nodes.

    Raises:
        ValueError: a node refuses, or does not answer.
    """
    answers = federation.answers({k: join_request(one, 0) for k, one in enumerate(terms)})
    for client, member in enumerate(federation.members):
        who = f"nodes: client {client} ({member.name[:16]})"
        if client not in answers:
            raise ValueError(f"{who} does not answer")
        head, _ = answers[client]
        if "refused" in head:
            raise ValueError(f"{who} refuses: {head['refused']}")
        budget.multiplier[client] = float(head["noise_multiplier"])
        budget.affordable[client] = int(head["affordable"])
        if budget.evaluations is not None:
            budget.evaluation_multiplier[client] = float(head["evaluation_multiplier"])


class Remote:
    """Releases of nodes.

    Args:
        clients: of the server's public sample: shapes, sizes and rules.
        rules: of the run.
        books: the copy of the nodes' ledgers, and what it says of budgets.
        federation: the nodes.
        terms: what was proposed to each.
    """

    def __init__(
        self,
        clients: Clients,
        rules: Rules,
        books: Books,
        federation: Federation,
        terms: Sequence[Agreement],
    ) -> None:
        self.clients = clients
        self.rules = rules
        self.books = books
        self.federation = federation
        self.terms = terms
        self.heads: dict[int, str] = {}
        self._known = [0] * len(terms)
        self._left: set[int] = set()
        for line in books.ledger:
            self._known[line.client] += 1

    # What a round asks for; see OneByOne ---------------------------------------------------------

    def cohort(self, scheduled: np.ndarray, round: int) -> Tensor:
        """Clients of the schedule that have something left to spend, as far as is known, [m]."""
        remaining = [int(k) for k in scheduled if int(k) not in self._left]
        return torch.tensor(remaining, dtype=torch.int64)

    def groups(self, cohort: Tensor) -> Sequence[Tensor]:
        """All nodes of a round work at the same time."""
        return [cohort] if len(cohort) else []

    def participants(self, cohort: Tensor, released: Sequence[PrivateUpdate]) -> int:
        """Clients that released something that came in time."""
        return sum(len(update.clients) for update in released)

    def release(self, clients: Tensor, params: Params, round: int, context: str) -> PrivateUpdate:
        """The releases of those nodes that answer in time.

        Args:
            clients: ids [k].
            params: global model.
            round: round number.
            context: what the noise of a simulation is bound to; nodes with a secret use their own.

        Raises:
            LedgerError: the copy of the ledger cannot be written.
        """
        answers = self.ask("release", clients.tolist(), params, round, context)
        taken: list[tuple[int, Params, dict[str, Tensor], Release]] = []
        for client, (head, tensors) in answers.items():
            try:
                update = _update(tensors, params)
                seen = [*(v[None] for v in update.values()), tensors["l1_norm"][None]]
                policy = _policy(tensors, self.clients.layout.num_layers)
                line = self.paid(client, head, seen)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                _LOG.warning(f"client {client}: its release is left out: {error}")
                continue
            self.books.history.l1_norm[client] = tensors["l1_norm"].double()
            taken.append((client, update, policy, line))
        if not taken:
            nobody = self.books.history.policy(clients[:0], self.books.budget.multiplier[:0])
            return PrivateUpdate.nothing(params, nobody, self.clients.layout.num_layers)
        return PrivateUpdate(
            clients=torch.tensor([k for k, *_ in taken]),
            update={n: torch.stack([u[n] for _, u, _, _ in taken]) for n in params},
            events=[line.event for *_, line in taken],
            steps=taken[0][3].steps,
            policy=LayerPolicy(*(torch.stack([p[n] for _, _, p, _ in taken]) for n in _POLICY)),
        )

    def add_to(self, mean: WeightedMean, update: PrivateUpdate, round: int) -> None:
        """Add releases to the server's mean, with their weights."""
        weigh(mean, update, self.rules, self.clients)

    def meet(
        self, mean: WeightedMean, released: list[PrivateUpdate], cohort: Tensor, params: Params
    ) -> list[PrivateUpdate]:
        """One server: nothing to put together."""
        return released

    # What is asked of nodes ----------------------------------------------------------------------

    def ask(
        self, what: str, clients: list[int], params: Params, round: int, context: str
    ) -> dict[int, Answer]:
        """Answers of a round that came in time; nodes that forgot the run join it again first.

        Args:
            what: "release", or "evaluate" for a private evaluation.
            clients: ids.
            params: global model.
            round: round number.
            context: as in `release`.
        """

        def request(client: int) -> bytes:
            head = {"do": what, "run": self.terms[client].run, "round": round}
            head |= {"context": context, "known": self._known[client]}
            return encode(head, params)

        answers = self.federation.answers({k: request(k) for k in clients})
        strangers = [k for k, a in answers.items() if _reason(a).startswith(NOT_JOINED)]
        if strangers:
            joined = self.federation.answers(
                {k: join_request(self.terms[k], self._known[k]) for k in strangers}
            )
            again = [k for k, answer in joined.items() if not _reason(answer)]
            answers |= joined | self.federation.answers({k: request(k) for k in again})
        for client in clients:
            if client not in answers:
                _LOG.warning(f"round {round}: client {client} did not answer in time")
            elif reason := _reason(answers[client]):
                _LOG.warning(f"round {round}: client {client} refuses: {reason}")
                if reason.startswith(SPENT):
                    self._left.add(client)
        return {k: a for k, a in answers.items() if not _reason(a) and "lines" in a[0]}

    def paid(self, client: int, head: dict[str, Any], seen: Sequence[Tensor]) -> Release:
        """The ledger line of an answer, which is copied with all others that came along.

        Args:
            client: who answers.
            head: of the answer.
            seen: what was released, each [1, ...].

        Raises:
            ValueError: no line stands for it, or one is not as agreed; nothing is copied.
            LedgerError: the copy of the ledger cannot be written.
        """
        lines = [replace(parse_release(e), client=client) for e in head["lines"]]
        for line in lines:
            self._check(line)
        functions = {digests.function_of(line.digest) for line in lines}
        shown = {digests.digests(seen, like=each)[0] for each in functions}
        own = [line for line in lines if line.digest in shown]
        if not own:
            raise ValueError("it is not what the ledger line stands for")
        self._copy(client, lines, str(head["head"]))
        return own[-1]

    def _check(self, line: Release) -> None:
        """Whether a node's ledger line is of this run and its noise."""
        header, budget = self.books.ledger.header, self.books.budget
        if line.evaluation:
            wanted = (header["mechanism"], 1.0, header["adjacency"], 1)
            multiplier = budget.evaluation_multiplier[line.client]
        else:
            rate, layers = header["sampling_rate"], len(header["layers"])
            wanted = (header["mechanism"], rate, header["adjacency"], layers)
            multiplier = budget.multiplier[line.client]
        facts = (line.mechanism, line.sampling_rate, line.adjacency, line.num_layers)
        if facts != wanted:
            raise ValueError(f"its ledger line is of {facts}, the run of {wanted}")
        if line.noise_multiplier != float(multiplier):
            raise ValueError(f"its ledger line has multiplier {line.noise_multiplier}")

    def _copy(self, client: int, lines: list[Release], head: str) -> None:
        ledger = self.books.ledger

        def is_new(line: Release) -> bool:
            known = ledger.find(client, line.round, evaluation=line.evaluation)
            return all(old.attempt != line.attempt for old in known)

        fresh = [line for line in lines if is_new(line)]
        ledger.append(fresh)
        for line in fresh:
            self.books.budget.spend(line)
        self._known[client] += len(fresh)
        self.heads[client] = head


def _reason(answer: Answer) -> str:
    """Why a node refuses; "" if it does not."""
    return str(answer[0].get("refused", ""))


def _update(tensors: dict[str, Tensor], params: Params) -> Params:
    """The released tensors, of the model's names, shapes and dtypes.

    Raises:
        ValueError: they are not.
    """
    update = {name: tensors.get(f"update.{name}") for name in params}
    for name, value in update.items():
        like = params[name]
        if value is None or value.shape != like.shape or value.dtype != like.dtype:
            raise ValueError(f"'{name}' is missing or of another shape")
        if not bool(value.isfinite().all()):
            raise ValueError(f"'{name}' is not finite")
    return {name: value.to(params[name].device) for name, value in update.items()}  # pyright: ignore


def _policy(tensors: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    found = {name: tensors[f"policy.{name}"].double() for name in _POLICY}
    if any(value.shape != (num_layers,) for value in found.values()):
        raise ValueError("its policy has another number of layers")
    return found
