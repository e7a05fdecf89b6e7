"""Secure sums of a federation: a server's proposals as terms, a node's run as contribution."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fl_lightning.deploy.client_run import ClientRun
from fl_lightning.deploy.policy import Refused
from fl_lightning.deploy.secure_sum.grid import Block
from fl_lightning.deploy.secure_sum.server import GivenUp, SumServer
from fl_lightning.deploy.secure_sum.terms import SumTerms
from fl_lightning.keys import digests
from fl_lightning.release.federation import Federation, SumOutcome, SumProposal

_LOG = logging.getLogger("pytorch_lightning")
_PARAMS, _HISTORY = "params.", "history."
_LONGEST_TEXT = 128


def with_secure_sums(federation: Federation, corrupt: int) -> Federation:
    """A federation whose nodes can add up what nobody may see.

    Args:
        federation: the nodes; the name of each is that of its identity.
        corrupt: nodes that may work with the server; holders insist on a number of their own.
    """

    def propose(proposal: SumProposal) -> SumOutcome:
        return _sum(federation, proposal, corrupt)

    return Federation(federation.members, federation.ask, propose)


def _sum(federation: Federation, proposal: SumProposal, corrupt: int) -> SumOutcome:
    clients = list(proposal.clients)
    tensors = {f"{_PARAMS}{n}": v for n, v in proposal.params.items()}
    tensors |= {f"{_HISTORY}{n}": v for n, v in proposal.history.items()}
    words = {"multiplier": proposal.multiplier, "context": proposal.context}
    try:
        terms = SumTerms(
            run=proposal.run,
            round=proposal.round,
            members=tuple(federation.members[k].name for k in clients),
            shares=proposal.noise_parts,
            corrupt=corrupt,
            context=_context(words, tensors),
            blocks=tuple(Block(*block) for block in proposal.blocks),
        )
    except ValueError as error:
        _LOG.warning(f"round {proposal.round}: no secure sum is possible: {error}")
        return SumOutcome(None, [], [])
    server = SumServer(terms, lambda member: {**words, "asked": proposal.asked[member]}, tensors)

    def ask(requests: Mapping[int, bytes]) -> dict[int, bytes]:
        answers = federation.ask({clients[k]: data for k, data in requests.items()})
        return {clients.index(k): data for k, data in answers.items()}

    try:
        sums = terms.grid.real(server.run(ask))
    except GivenUp as error:
        _LOG.warning(f"round {proposal.round}: the secure sum is given up: {error}")
        sums = None
    heads = {clients[k]: head for k, head in server.heads.items()}
    survivors, charged = ([clients[k] for k in m] for m in (server.survivors, server.charged))
    return SumOutcome(sums, survivors if sums else [], charged, heads)


def _context(words: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """What all members must have in common besides the terms, 64 hex digits."""
    parts = [float(words["multiplier"]), str(words["context"])]
    named = [part for name in sorted(tensors) for part in (name, tensors[name])]
    return digests.digest([*map(repr, parts), *named])


class RunContribution:
    """The part of a sum that a node's run adds, as `SumClient` asks for it.

    Args:
        run: of the node.
        terms: of the sum.
        words, tensors: that came with them.

    Raises:
        Refused: the terms are of another model, other clip norms or other noise than the node
            finds by its own rules; or nothing is left to spend.
    """

    def __init__(
        self,
        run: ClientRun,
        terms: SumTerms,
        words: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> None:
        multiplier, asked = (_positive(words.get(name)) for name in ("multiplier", "asked"))
        if asked > 1:
            raise Refused("sum: asked must be at most 1")
        context = words.get("context")
        if not isinstance(context, str) or len(context) > _LONGEST_TEXT:
            raise Refused("sum: context must be a short text")
        if terms.shares != run.noise_parts:
            raise Refused(f"sum: shares={terms.shares}, agreed were {run.noise_parts}")
        if terms.context != _context({"multiplier": multiplier, "context": context}, tensors):
            raise Refused("sum: the terms are of another model or history than came with them")
        params = run.checked_params(_named(tensors, _PARAMS))
        self._run, self._grid = run, terms.grid
        self._part = run.sum_part(
            params,
            _named(tensors, _HISTORY),
            round=terms.round,
            multiplier=multiplier,
            asked=asked,
            context=context,
        )
        if [Block(*block) for block in self._part.blocks()] != list(terms.blocks):
            raise Refused("sum: clip norms or noise are not those of the agreed rules")

    def values(self) -> Tensor:
        """The node's noised numbers on the grid: int64 [size], private."""
        return self._grid.whole(self._part.values())

    def write(self, digest: str) -> str:
        """Charge the sum and write it down, durably; the head of the ledger."""
        head = self._part.write(digest)
        self._run.keep()
        return head


def _named(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {n.removeprefix(kind): v for n, v in tensors.items() if n.startswith(kind)}


def _positive(value: Any) -> float:
    if type(value) not in (int, float) or not (value > 0 and math.isfinite(value)):
        raise Refused("sum: multiplier and asked must be positive numbers")
    return float(value)
