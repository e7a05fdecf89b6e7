"""The messages of secure sums at a node: what its socket answers, and what its journal keeps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fl_lightning.deploy.policy import Refused
from fl_lightning.deploy.secure_sum.begun import Begun
from fl_lightning.deploy.secure_sum.client import Contribution, SumClient
from fl_lightning.deploy.secure_sum.keys import Identity
from fl_lightning.deploy.secure_sum.policy import SumPolicy
from fl_lightning.deploy.secure_sum.terms import SumTerms, check_terms, parse_terms

_LOG = logging.getLogger("fl_lightning.deploy")
IDENTITY_FILE = "identity.key"
# (terms, words and tensors that came with them) → what the node adds; refuses what it cannot.
Contribute = Callable[[SumTerms, Mapping[str, Any], Mapping[str, Tensor]], Contribution]


class SumActions:
    """The actions `sum-terms` to `sum-signatures` of a node; one sum at a time.

    Args:
        identity: of the node.
        policy: of its holder.
        folder: of the node, private; one process has it open.
        contribute: called for terms that the policy allows, before keys are made.
    """

    def __init__(
        self, identity: Identity, policy: SumPolicy, folder: Path, contribute: Contribute
    ) -> None:
        self._identity = identity
        self._policy = policy
        self._contribute = contribute
        self._begun = Begun(folder, policy.runs)
        self._now: SumClient | None = None

    @property
    def name(self) -> str:
        """Public name of the node's identity, 64 hex digits."""
        return self._identity.name

    def answer(
        self, do: str, head: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> bytes:
        """The answer to one message.

        Raises:
            Refused: the node does not take part, or no longer.
            LedgerError: its line cannot be written; nothing was sent.
        """
        if do == "sum-terms":
            return self._begin(head, tensors or {})
        now = self._now
        if now is None or (head.get("run"), head.get("round")) != (now.terms.run, now.terms.round):
            raise Refused("sum: no such sum is under way at this node")
        if do == "sum-keys":
            return now.share(head)
        if do == "sum-shares":
            return now.mask(head)
        if do == "sum-survivors":
            return now.confirm(head)
        if do == "sum-signatures":
            return now.reveal(head)
        raise Refused("request: it is no message of a sum")

    def _begin(self, head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
        """Agree to terms: the sum before is forgotten, whatever its state."""
        try:
            terms = parse_terms(head.get("terms"))
        except ValueError as error:
            raise Refused(str(error)) from error
        number = check_terms(terms, self._policy, self._identity.name)
        contribution = self._contribute(terms, head, tensors)
        self._begun.begin(terms.run, terms.round)
        self._now = SumClient(self._identity, number, terms, contribution)
        return self._now.advertise()
