"""A node: answers the requests of whoever reaches its socket, within its holder's policy.

Requests come from an app that anybody may have written. An answer is a release, which is noised and
stands in the ledger, or a refusal, which stands in the journal. Both follow from nothing private
but what the ledger charges.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fl_lightning.deploy.client_run import TERMS_FILE, ClientRun
from fl_lightning.deploy.holding import Holding
from fl_lightning.deploy.journal import Journal
from fl_lightning.deploy.policy import Refused
from fl_lightning.ledger import FILE_NAME, LedgerError
from fl_lightning.release.agreement import PROTOCOL, parse_agreement
from fl_lightning.release.remote import NOT_JOINED
from fl_lightning.values.message import decode, encode

if TYPE_CHECKING:
    from fl_lightning.deploy.secure_sum.node import SumActions
    from fl_lightning.deploy.secure_sum.terms import SumTerms

_LOG = logging.getLogger("fl_lightning.deploy")
NAME_FILE, RUNS = "name", "runs"


class Node:
    """What a holder's records can be asked, and the runs that take part.

    Args:
        holding: records, network and policy.
        folder: private folder of the node, for its name, its runs and its journal; made if missing.
        number: client number that it asks servers for, for comparisons with a simulation.

    Raises:
        ValueError: others can read the folder.
        LedgerError: another process has it open, or a file in it is damaged.
    """

    def __init__(self, holding: Holding, folder: Path, number: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_mode & 0o077:
            raise ValueError(f"folder={folder}: others can enter it; chmod 700 it")
        self._holding = holding
        self._folder = folder
        self._number = number
        self._journal = Journal(folder)
        self._sums = self._secure_sums()
        self.name = self._sums.name if self._sums else _name(folder)
        self._open: dict[str, ClientRun] = {}
        self._stopped = ""

    def answer(self, request: bytes) -> bytes:
        """The answer to one message; never raises."""
        what, run = "unreadable", ""
        try:
            head, tensors = decode(request)
            what, run = str(head.get("do")), str(head.get("run", ""))
            if self._stopped:
                raise Refused(self._stopped)
            return self._dispatch(what, head, tensors)
        except Refused as refusal:
            return self._refuse(what, run, str(refusal))
        except LedgerError:
            _LOG.exception("the ledger failed")
            return self._refuse(what, run, "ledger: it cannot be used; the holder's log says why")
        except Exception as error:
            if what == "unreadable":
                return self._refuse(what, run, "request: it cannot be read")
            _LOG.exception("a request failed")
            return self._stop(what, run, error)

    def _dispatch(self, what: str, head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
        if what == "hello":
            return encode(self._hello())
        if what == "join":
            return encode(self._join(head))
        if what in ("release", "evaluate"):
            return self._release(what, head, dict(tensors))
        if what.startswith("sum-") and self._sums is not None:
            return self._sums.answer(what, head, tensors)
        if what == "end":
            for run in self._open.values():
                run.write_statement()
            return encode({"did": "end"})
        raise Refused("request: it must be hello, join, release, evaluate or end")

    def _hello(self) -> dict[str, Any]:
        policy, data = self._holding.policy, self._holding.data
        return {
            "protocol": PROTOCOL,
            "name": self.name,
            "epsilon": policy.epsilon,
            "delta": policy.delta,
            "records": int(data.client_sizes[0]) if policy.announce_records else None,
            "held_out": self._held_out() if policy.announce_records else None,
            "number": self._number,
        }

    def _held_out(self) -> int:
        data = self._holding.data
        return int(data.held_out_partition.sizes[0]) if data.val_fraction else 0

    def _join(self, head: Mapping[str, Any]) -> dict[str, Any]:
        known = _count(head, "known")
        try:
            terms = parse_agreement(head.get("terms"))
        except ValueError as error:
            raise Refused(str(error)) from error
        folder = self._folder / RUNS / terms.run
        if (folder / TERMS_FILE).exists():
            run = self._find(terms.run)
            if run.terms != terms:
                raise Refused("terms: they are not those that the run began with")
            return {"did": "join", **run.facts(known)}
        if self._spent_runs() >= self._holding.policy.runs:
            raise Refused("spent: the runs that the holder allows have released something")
        self._forget_unused()
        try:
            run = ClientRun.begin(self._holding, terms, folder)
        except ValueError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise error if isinstance(error, Refused) else Refused(_public_words(error)) from error
        self._open[terms.run] = run
        return {"did": "join", **run.facts(known)}

    def _release(self, what: str, head: Mapping[str, Any], tensors: dict[str, Tensor]) -> bytes:
        run, round, known = self._run_of(head), _count(head, "round"), _count(head, "known")
        context = head.get("context")
        if not isinstance(context, str) or len(context) > 128:
            raise Refused("request: context must be a short text")
        params = run.checked_params(tensors)
        answer = run.release if what == "release" else run.evaluate
        return answer(params, round, context, known)

    def _secure_sums(self) -> SumActions | None:
        """The actions of secure sums, where the holder allows any."""
        policy = self._holding.policy.secure_sum
        if policy is None:
            return None
        from fl_lightning.deploy.secure_sum.federated import RunContribution
        from fl_lightning.deploy.secure_sum.keys import Identity
        from fl_lightning.deploy.secure_sum.node import IDENTITY_FILE, SumActions

        def contribute(terms: SumTerms, words: Mapping[str, Any], tensors: Mapping[str, Tensor]):
            run = self._run_of({"run": terms.run})
            if run.releases == 0 and self._spent_runs() >= self._holding.policy.runs:
                raise Refused("spent: the holder's runs have begun; this would be another one")
            return RunContribution(run, terms, words, tensors)

        identity = Identity.kept_in(self._folder / IDENTITY_FILE)
        return SumActions(identity, policy, self._folder, contribute)

    def _run_of(self, head: Mapping[str, Any]) -> ClientRun:
        name = head.get("run")
        if not isinstance(name, str) or len(name) != 64 or not name.isalnum():
            raise Refused("request: run must be 64 hex digits")
        if not (self._folder / RUNS / name / TERMS_FILE).exists():
            raise Refused(f"{NOT_JOINED}: the node knows no such run")
        return self._find(name)

    def _find(self, name: str) -> ClientRun:
        if name not in self._open:
            try:
                self._open[name] = ClientRun.resume(self._holding, self._folder / RUNS / name)
            except (ValueError, OSError) as error:
                _LOG.exception("a run cannot go on")
                words = "run: the node cannot go on with it; its holder's log says why"
                raise Refused(words) from error
        return self._open[name]

    def _spent_runs(self) -> int:
        """Runs whose ledger holds a release."""
        ledgers = (self._folder / RUNS).glob(f"*/{FILE_NAME}")
        return sum(path.read_bytes().count(b"\n") > 1 for path in ledgers)

    def _forget_unused(self) -> None:
        """Remove runs that released nothing: a new one takes their place.

        So a run that is joined is one of those that the holder allows, and may release.
        """
        runs = self._folder / RUNS
        for folder in sorted(runs.iterdir()) if runs.is_dir() else ():
            ledger = folder / FILE_NAME
            if ledger.exists() and ledger.read_bytes().count(b"\n") > 1:
                continue
            if opened := self._open.pop(folder.name, None):
                opened.close()
            shutil.rmtree(folder)

    def _refuse(self, what: str, run: str, reason: str) -> bytes:
        self._note(what, run, reason)
        return encode({"refused": reason})

    def _note(self, what: str, run: str, reason: str) -> None:
        try:
            self._journal.refuse(what, run, reason)
        except OSError:  # a full disk must not keep others waiting
            _LOG.exception("a refusal cannot be written down: %s %s", what, reason)

    def _stop(self, what: str, run: str, error: Exception) -> bytes:
        """After an error that may depend on records nothing more is answered: one bit, once."""
        self._stopped = "stopped: the node had an error and waits for its holder"
        self._note(what, run, f"error: {type(error).__name__}")
        return encode({"refused": self._stopped})

    def close(self) -> None:
        """Write the statements of open runs and give up all locks."""
        for run in self._open.values():
            try:
                run.write_statement()
            finally:
                run.close()
        self._open.clear()
        self._journal.close()


def _name(folder: Path) -> str:
    """A random name that the node keeps."""
    path = folder / NAME_FILE
    if not path.exists():
        partial = path.with_name(NAME_FILE + ".partial")
        partial.write_text(os.urandom(32).hex() + "\n", encoding="utf-8")
        os.replace(partial, path)
    return path.read_text(encoding="utf-8").strip()


def _count(head: Mapping[str, Any], name: str) -> int:
    value = head.get(name)
    if type(value) is not int or not 0 <= value < 2**31:
        raise Refused(f"request: {name} must be a whole number from 0")
    return value


def _public_words(error: ValueError) -> str:
    """Why terms cannot be kept, without a word of the records.

    The checks before a run compare gradients of records; their words stay in the node's own log.
    """
    _LOG.warning("terms are refused: %s", error)
    return "terms: the node cannot keep them; its holder's log says why"
