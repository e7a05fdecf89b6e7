"""A run that is a candidate of a charged search checks its costs before its first release."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from fl_lightning.ledger.search_checks import check_search


class SearchCheck(pl.Callback):
    """Refuses a candidate whose choice would cost more than its search plans for."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Before round 0; the ledger has its header and no release."""
        if pl_module.ledger is not None:
            check_search(pl_module.ledger.header)
