"""The ledger of a run that begins or goes on."""

from __future__ import annotations

from typing import Any

from fl_lightning.accounting.budget import Budget
from fl_lightning.header import correlation_facts, ledger_header
from fl_lightning.ledger import Ledger, LedgerError
from fl_lightning.run_spec import RunSpec
from fl_lightning.values.plain_json import plain


def open_ledger(spec: RunSpec, budget: Budget, run_id: str) -> Ledger:
    """The ledger: the file itself in process 0, a copy elsewhere.

    Raises:
        LedgerError: it is not that of the run.
    """
    opened: list[Ledger] = []

    def facts() -> tuple[Any, ...]:
        opened.append(ledger := _ledger_file(spec, budget, run_id))
        return ledger.header, ledger.rounds, ledger.head_hash

    known = spec.processes.first(facts)
    return opened[0] if opened else Ledger.copy_of(spec.folder, *known)


def _ledger_file(spec: RunSpec, budget: Budget, run_id: str) -> Ledger:
    if spec.resumed is None:
        facts = {} if spec.search is None else {"search": spec.search}
        header = ledger_header(spec.rules, spec.data, spec.layout, budget, run_id) | facts
        if spec.federation is not None:
            header["nodes"] = [member.name for member in spec.federation.members]
        if spec.number is not None and spec.rules.privacy.summed:
            header["member"] = spec.number
        return Ledger.create(spec.folder, header)
    ledger = Ledger.open(spec.folder, spec.resumed)
    facts = correlation_facts(spec.rules, budget)
    if any(ledger.header.get(name) != plain(value) for name, value in facts.items()):
        ledger.close()
        raise LedgerError(
            f"{spec.folder}: the ledger has other coefficients, rounds or sensitivities than the "
            "run now has; noise that rounds share is planned once"
        )
    if spec.rules.privacy.summed and not ledger.header.get("schema"):
        ledger.close()
        raise LedgerError(
            f"{spec.folder}: the ledger is of schema 0, which had a line for every client of "
            "a sum: go on with the version that began the run, or start a new one"
        )
    return ledger
