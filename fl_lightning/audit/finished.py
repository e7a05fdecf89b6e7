"""A finished run as its folder describes it, made again as far as its first round."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl

from fl_lightning.accounting.cohort import cohort_schedule
from fl_lightning.command.run_folder import RunFolder
from fl_lightning.data import FederatedDataModule
from fl_lightning.fit import FederatedCLI
from fl_lightning.ledger import Release
from fl_lightning.ledger import read as read_ledger
from fl_lightning.ledger.accounts import Account, accounts
from fl_lightning.module import FederatedModule
from fl_lightning.privacy.config import per_client
from fl_lightning.processes.stopping import Stop
from fl_lightning.rules import Rules


@dataclass(frozen=True)
class Finished:
    """A run that is over, and its network, data and rules as they were before round 0.

    Args:
        module, data, trainer: made from the run's configuration, checked, not run.
        header, releases: of its ledger, which is only read.
        rounds: rounds that it did.
        vmaps: whether its clients can be trained together under vmap.
    """

    module: FederatedModule
    data: FederatedDataModule
    trainer: pl.Trainer
    header: Mapping[str, Any]
    releases: Sequence[Release]
    rounds: int
    vmaps: bool

    @property
    def rules(self) -> Rules:
        """The run's own rules."""
        return self.module.rules

    def worst(self) -> tuple[int, Account]:
        """The client with the largest proven ε, and its account.

        Raises:
            ValueError: nothing was released, or nothing is proven.
        """
        found = accounts(self.header, self.releases)
        charged = {client: account for client, account in found.items() if account.charges}
        proven = all(c.guarantee for account in charged.values() for c in account.charges)
        if not charged or not proven:
            raise ValueError(
                f"setting={self.header['setting']!r} with {len(self.releases)} releases: nothing "
                "is proven there that an audit could compare with"
            )
        client = max(charged, key=lambda k: charged[k].epsilon())
        if not np.isfinite(charged[client].epsilon()):
            raise ValueError(f"client {client} has epsilon=inf: there is nothing to audit")
        return client, charged[client]

    def multipliers(self) -> list[float]:
        """Noise multipliers by client, as the run calibrated them."""
        stated = self.header["noise_multiplier"]
        return per_client(stated, self.data.num_clients)

    def participations(self, client: int) -> int:
        """Rounds in which a client took part, by the public schedule and not by the ledger."""
        rules, everyone = self.rules, self.data.num_clients
        schedule = cohort_schedule(
            everyone, rules.cohort_size(everyone), self.planned, rules.seed,
            one_order=rules.privacy.correlated,
        )  # fmt: skip
        times = sum(
            client in row and not bool(rules.faults.failing(np.array([client]), round)[0])
            for round, row in enumerate(schedule[: self.rounds])
        )
        affordable = self.header.get("affordable_steps")
        if affordable is None or not self.header["noise_multiplier_given"]:
            return times
        most = per_client(affordable, everyone)[client]
        return min(times, int(most) // rules.steps_a_release)

    @property
    def planned(self) -> int:
        """Rounds that cohorts and noise were planned for."""
        return self.rules.planned_rounds or self.trainer.max_epochs or self.rounds


class _Described(FederatedCLI):
    """The objects of a configuration; nothing is trained."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


def read_finished(run: Path) -> Finished:
    """Read a run's folder and make its network and data again.

    Args:
        run: folder of a run by `python -m fl_lightning.fit`, which wrote its configuration there.

    Raises:
        ValueError: no run has ended there, or it cannot be made again.
        OSError: a file cannot be read.
        LedgerError: the ledger cannot be trusted.
    """
    for name in ("summary.json", "config.yaml", "ledger.jsonl"):
        if not (run / name).is_file():
            why = (
                "it has no ledger, so nothing is proven there"
                if name == "ledger.jsonl" and (run / "summary.json").is_file()
                else "is it the folder of a run by fl_lightning.fit that has ended?"
            )
            raise ValueError(f"{run}: there is no {name}: {why}")
    try:
        rounds = int(json.loads((run / "summary.json").read_text(encoding="utf-8"))["rounds"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run / 'summary.json'} cannot be read: {error!r}") from error
    header, releases = read_ledger(run)
    with tempfile.TemporaryDirectory() as elsewhere:
        made = _Described(
            RunFolder(), Stop(program=False), None, None, FederatedModule, FederatedDataModule,
            args=_arguments(run, elsewhere), seed_everything_default=1,
            auto_configure_optimizers=False, save_config_callback=None,
            parser_kwargs={"exit_on_error": False, "fit": {"exit_on_error": False}},
        )  # fmt: skip
        module, data = made.model, made.datamodule
        module.check(data, made.trainer)
    assert module._checked is not None
    return Finished(module, data, made.trainer, header, releases, rounds, module._checked[1])


def _arguments(run: Path, elsewhere: str) -> list[str]:
    """The options of the run, but for where it writes and what it logs to."""
    places = ["--run_dir", elsewhere, "--trainer.logger", "false", "--ckpt_path", "null"]
    quiet = ["--trainer.callbacks", "null", "--trainer.enable_progress_bar", "false"]
    quiet += ["--tensorboard", "false"]
    return ["fit", "--config", str(run / "config.yaml"), *places, *quiet]
