"""One client's half of one run: train, clip, noise, pay and write; then answer, twice if need be.

It is a run of a population of one: the same code as a simulated run, whose server is elsewhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from fl_lightning.deploy.holding import Holding, member_module
from fl_lightning.deploy.policy import Refused
from fl_lightning.kernel_choice import kernels_for
from fl_lightning.keys import digests
from fl_lightning.ledger.statement import privacy_statement
from fl_lightning.output.checkpoint import CHECKPOINT, AtomicCheckpointIO
from fl_lightning.processes.together import Processes
from fl_lightning.release.agreement import (
    Agreement,
    parse_agreement,
    terms_of,
)
from fl_lightning.release.evaluation import Evaluations
from fl_lightning.release.sum_part import SumPart
from fl_lightning.release.summed import Summed
from fl_lightning.resumption import promise_of
from fl_lightning.run import Run, begin_run
from fl_lightning.run_spec import RunSpec
from fl_lightning.values.message import encode
from fl_lightning.values.release import release_entry
from fl_lightning.values.round import Params

TERMS_FILE = "terms.json"
ME = torch.tensor([0])  # the one client of a node's population
_POLICY = ("clip_norm", "shares", "contribution", "noise_scale")


class ClientRun:
    """One client's part in a run, open for releases.

    Open one with `begin` or `resume`; `close` gives the ledger back.

    Guarantees:
        A release stands in the ledger, on disk, before its answer exists. The same request gets the
        same answer again and is charged once; any other request has other noise and is charged.
    """

    def __init__(self, holding: Holding, terms: Agreement, folder: Path) -> None:
        self.terms = terms
        self.folder = folder
        self._policy = holding.policy
        self._module = member_module(holding, terms, folder)
        self._data = holding.data
        self._module.check(holding.data, _no_trainer(terms.rounds))
        self._run: Run | None = None
        self._answered: dict[str, Any] = {}

    @classmethod
    def begin(cls, holding: Holding, terms: Agreement, folder: Path) -> ClientRun:
        """Agree to a run: secret, ledger and terms in a folder of its own; nothing is released.

        Raises:
            Refused: the policy does not allow it, or the terms make no sense.
            ValueError: the records do not fit them.
        """
        made = cls(holding, terms, folder)
        folder.mkdir(parents=True, mode=0o700)
        made._run = begin_run(made._spec(None), terms.rounds)
        made._save()
        _write_whole(folder / TERMS_FILE, json.dumps(terms_of(terms)))
        return made

    @classmethod
    def resume(cls, holding: Holding, folder: Path) -> ClientRun:
        """Go on with a run of this node, from its ledger and its last state.

        Raises:
            LedgerError: the ledger is not whole, or not the one of the last state.
            ValueError: secret or state are missing, or the holder's promise is another one now.
        """
        terms = parse_agreement(json.loads((folder / TERMS_FILE).read_text(encoding="utf-8")))
        made = cls(holding, terms, folder)
        state = AtomicCheckpointIO().load_checkpoint(
            folder / CHECKPOINT, map_location="cpu", weights_only=True
        )
        made._answered = state.get("answers", {})
        made._run = begin_run(made._spec(state["aadp_fl"]), terms.rounds)
        return made

    @property
    def run(self) -> Run:
        assert self._run is not None
        return self._run

    @property
    def releases(self) -> int:
        """Lines of its ledger, without the header."""
        assert self.run.ledger is not None
        return len(self.run.ledger)

    def facts(self, known: int) -> dict[str, Any]:
        """What the server learns of the run without a release: budget, ledger head, lines.

        Raises:
            Refused: the server has more lines than the ledger.
        """
        self._check_known(known)
        return {
            "noise_multiplier": float(self.run.budget.multiplier[0]),
            "affordable": int(self.run.budget.affordable[0]),
            "evaluation_multiplier": float(self.run.budget.evaluation_multiplier[0]),
            **self._lines(known),
        }

    def _check_known(self, known: int) -> None:
        if known > self.releases:
            raise Refused(
                f"ledger: the server has {known} of its lines, it has {self.releases}: lines were "
                "lost here, and with them what was spent; the holder must put them back"
            )

    def _lines(self, first: int) -> dict[str, Any]:
        """Ledger lines from one on, and the head."""
        ledger = self.run.ledger
        assert ledger is not None
        lines = ledger.releases[first:]
        return {"lines": [release_entry(line) for line in lines], "head": ledger.head_hash}

    def release(self, params: Params, round: int, context: str, known: int) -> bytes:
        """A release of one round, as the message that leaves the node.

        Args:
            params: global model, checked for names, shapes and dtypes.
            round: round number.
            context: what noise of a public seed is bound to; ignored otherwise.
            known: ledger lines that the server has.

        Raises:
            Refused: nothing is left to spend, or the server has more lines than the ledger.
            LedgerError: the ledger cannot be written; nothing was released.
        """
        if self._module.rules.privacy.summed:
            raise Refused("request: the run has sums, whose parts are never released alone")

        def made(context: str) -> dict[str, Tensor]:
            if not len(self.run.releases.cohort(ME.numpy(), round)):
                raise Refused("spent: nothing is left of the budget of this run")
            return self._released(params, round, context)

        return self._answer("release", params, round, context, known, made)

    def evaluate(self, params: Params, round: int, context: str, known: int) -> bytes:
        """A private evaluation of a model, as the message that leaves the node.

        Args, Raises: as of `release`; and none may be due after that round.
        """
        run, evaluations = self.run, self.run.evaluations
        if not isinstance(evaluations, Evaluations) or not evaluations.due(round):
            raise Refused(f"request: no evaluation is due after round {round}")

        def made(context: str) -> dict[str, Tensor]:
            with torch.no_grad():
                for name, value in run.spec.params().items():
                    value.copy_(params[name])
            answers, _, paid = evaluations.noised(round, context)
            if not paid:
                raise Refused("evaluation: all that were planned are released")
            return {"answers": answers}

        return self._answer("evaluate", params, round, context, known, made)

    def _answer(
        self,
        what: str,
        params: Params,
        round: int,
        context: str,
        known: int,
        made: Callable[[str], dict[str, Tensor]],
    ) -> bytes:
        """What is released: the kept answer to the same request, else one that is made and kept."""
        self._check_known(known)
        if self._module.rules.privacy.seed is None:
            context = self.run.context(torch.tensor([self.terms.client]))
        request = digests.digest([context, round, *params.values()])
        if self._answered.get(what, {}).get("request") != request:
            tensors = made(context)
            line = self.releases - 1  # of the release, or of one that it repeats
            self._answered[what] = {"request": request, "tensors": tensors, "line": line}
            self._save()
        kept = self._answered[what]
        return encode({"did": what, **self._lines(min(known, kept["line"]))}, kept["tensors"])

    def _released(self, params: Params, round: int, context: str) -> dict[str, Tensor]:
        """The numbers of a release, which is paid for."""
        run, rules = self.run, self._module.rules
        with kernels_for(rules, run.spec.layout, run.spec.data.client_sizes, run.planned_rounds):
            update = run.releases.release(ME, params, round, context)
        if not len(update.clients):
            raise Refused("spent: nothing is left of the budget of this run")
        assert update.policy is not None
        policy = {f"policy.{name}": getattr(update.policy, name)[0] for name in _POLICY}
        released = {f"update.{name}": value[0] for name, value in update.update.items()}
        history = {"l1_norm": self.run.history.l1_norm[0]}
        return {n: t.clone() for n, t in (policy | released | history).items()}

    @property
    def noise_parts(self) -> int | None:
        """Clients whose parts of the noise are the whole in a secure sum, as agreed."""
        return self._module.rules.privacy.min_survivors

    def sum_part(
        self, params: Params, history: dict[str, Tensor], *, round: int, **sum: Any
    ) -> SumPart:
        """What this client adds to a secure sum; nothing is paid for yet.

        Args:
            params: global model, checked.
            history: row of the released history, as the server has it.
            round: round number.
            sum: multiplier, asked and context of `SumPart`.

        Raises:
            Refused: the run has no sums, nothing is left to spend, or the history is none.
        """
        releases = self.run.releases
        if not isinstance(releases, Summed):
            raise Refused("sum: the run was agreed without sums")
        rows = releases.books.history.rows(ME)
        alike = sorted(rows) == sorted(history) and all(
            v.shape == history[n].shape and v.dtype == history[n].dtype for n, v in rows.items()
        )
        if not alike or not all(bool((v.isfinite() & (v >= 0)).all()) for v in history.values()):
            raise Refused("sum: the history is not of this network and these rules")
        releases.books.history.restore(ME, history)
        try:
            return SumPart(releases, params, round=round, **sum)
        except ValueError as error:  # of public numbers alone
            raise Refused(f"spent: {error}") from error

    def keep(self) -> None:
        """Make the state durable after a line was written."""
        self._save()

    def _save(self) -> None:
        """State and last answer, durable: after a crash before it, the ledger is one line ahead."""
        run, module = self.run, self._module
        state = run.state_dict() | {"promise": promise_of(module.rules, run.records)}
        kept = {"aadp_fl": state, "answers": self._answered}
        AtomicCheckpointIO().save_checkpoint(kept, self.folder / CHECKPOINT)

    def write_statement(self) -> None:
        """`privacy_statement.md` of the run as it stands."""
        assert self.run.ledger is not None
        text = privacy_statement(self.run.ledger)
        _write_whole(self.folder / "privacy_statement.md", text)

    def close(self) -> None:
        """Give up the lock on the ledger."""
        if self._run is not None and self._run.ledger is not None:
            self._run.ledger.close()

    def _spec(self, resumed: dict[str, Any] | None) -> RunSpec:
        module = self._module
        return RunSpec(
            module.rules,
            module.network,
            module.loss,
            module.layout,
            self._data,
            self.folder,
            Processes(),
            vmaps=False,
            last_model=_never,
            resumed=resumed,
            number=self.terms.client,
            span=self.terms.span,
        )

    def checked_params(self, tensors: dict[str, Tensor]) -> Params:
        """The model of a request, if it is one of this run's network.

        Raises:
            Refused: names, shapes or dtypes are others, or a number is not finite.
        """
        wanted = self._spec(None).params()
        if sorted(tensors) != sorted(wanted):
            raise Refused("request: the model has other parameters than the network")
        for name, like in wanted.items():
            value = tensors[name]
            if value.shape != like.shape or value.dtype != like.dtype:
                raise Refused(f"request: parameter '{name}' is not {like.dtype} {[*like.shape]}")
            if not bool(value.isfinite().all()):
                raise Refused(f"request: parameter '{name}' is not finite")
        return {name: tensors[name].to(like.device) for name, like in wanted.items()}


def _never(rounds: int) -> Any:
    raise AssertionError("noise that rounds share is not for nodes")


def _no_trainer(rounds: int) -> pl.Trainer:
    """A Trainer for the checks of a run; nothing is trained by it."""
    return pl.Trainer(
        max_epochs=rounds,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that a crash leaves all of it or none."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
