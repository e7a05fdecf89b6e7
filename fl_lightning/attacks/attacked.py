"""A finished run, made again from its folder, which stays as it is."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from torch import Tensor

from fl_lightning.attacks.witness import Observer, Witness
from fl_lightning.data import FederatedDataModule
from fl_lightning.keys.run_key import KEY_FILE
from fl_lightning.ledger import FILE_NAME, read
from fl_lightning.module import FederatedModule
from fl_lightning.output.checkpoint import CHECKPOINT, AtomicCheckpointIO
from fl_lightning.privacy.config import PrivacyConfig
from fl_lightning.resumption import rounds_done
from fl_lightning.values.release import Release

_SECTIONS = ("data", "model", "privacy")
_PREFIX = "network."


@dataclass(frozen=True)
class AttackedRun:
    """A run and the model that it gave away. The records in it are private.

    Args:
        folder: of the run.
        module: as it was before round 0.
        data: records and who holds them.
        weights: of the last model, by parameter.
        rounds: that were done.
        planned: rounds that noise and cohorts were planned for.
        multiplier: noise multiplier of each client, float64 [K]; None without privacy.
        header, releases: of the ledger; none without privacy.
    """

    folder: Path
    module: FederatedModule
    data: FederatedDataModule
    weights: Mapping[str, Tensor]
    rounds: int
    planned: int
    multiplier: Tensor | None
    header: Mapping[str, Any] | None
    releases: Sequence[Release]


def load_run(folder: str | Path) -> AttackedRun:
    """Make a run again from its configuration and last checkpoint; the folder is only read.

    Raises:
        FileNotFoundError: configuration or checkpoint are missing.
        LedgerError: the ledger cannot be trusted.
        ValueError: the configuration cannot be read, or the run has done no round.
    """
    folder = Path(folder).expanduser()
    for name in (Path("config.yaml"), CHECKPOINT):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: is {folder} a finished run's?")
    checkpoint = AtomicCheckpointIO().load_checkpoint(
        folder / CHECKPOINT, map_location="cpu", weights_only=True
    )
    state = checkpoint.get("aadp_fl")
    rounds = 0 if state is None else rounds_done(checkpoint)
    if state is None or not rounds:
        raise ValueError(f"run={folder}: it has done no round, so there is nothing to attack")
    if state.get("processes", [1]) != [1]:
        raise ValueError(f"run={folder}: it was computed by several processes; attack one of one")
    module, data = _made(folder / "config.yaml")
    if module.rules.personal:
        raise ValueError(
            f"run={folder}: it has personal layers, so that no one model answers for all clients; "
            "attacks know the global model alone"
        )
    header, releases = (None, []) if not module.privacy.private else read(folder / FILE_NAME)
    weights = {
        name.removeprefix(_PREFIX): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(_PREFIX)
    }
    multiplier = state["budget"]["multiplier"] if header is not None else None
    planned = state["planned_rounds"]
    return AttackedRun(folder, module, data, weights, rounds, planned, multiplier, header, releases)


def _made(path: Path) -> tuple[FederatedModule, FederatedDataModule]:
    """Module and data of a configuration, as the command that trained made them."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FederatedDataModule, "data")
    parser.add_class_arguments(FederatedModule, "model")
    parser.add_class_arguments(PrivacyConfig, "privacy")
    parser.link_arguments("privacy", "model.privacy", apply_on="instantiate")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        seed = config["seed_everything"]
        sections = {name: dict(config[name]) for name in _SECTIONS}
        for name in ("model", "data"):
            sections[name]["seed"] = 0 if isinstance(seed, bool) else seed
        parsed = parser.parse_object(sections)
    except (ArgumentError, TypeError, KeyError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from error
    if isinstance(seed, bool):
        raise ValueError(f"{path}: seed_everything={seed}: its first model is not known")
    with torch.random.fork_rng([]):
        pl.seed_everything(seed, verbose=False)
        made = parser.instantiate(parsed)
    return made.model, made.data


def replay(run: AttackedRun, observers: Sequence[Observer]) -> None:
    """Compute the run again, so that observers see what a server saw. Nothing is released by it.

    The same secret and the same inputs give the same releases, bit for bit; they are compared with
    the ledger. All files of the repetition are in a folder of its own that is removed; the secret
    is read where it lies.

    Raises:
        ValueError: other releases came out than the ledger has (another version, another machine
            or another number of threads).
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if (run.folder / KEY_FILE).exists():
            (folder / KEY_FILE).symlink_to((run.folder / KEY_FILE).absolute())
        module = run.module
        module.run_dir = str(folder)
        fit_watched(module, run.data, observers, rounds=run.rounds, planned=run.planned)
        if run.header is None:
            _compare_models(run, module)
        else:
            _compare_releases(run, read(folder / FILE_NAME)[1])


def fit_watched(
    module: FederatedModule,
    data: FederatedDataModule,
    observers: Sequence[Observer],
    *,
    rounds: int,
    planned: int | None = None,
) -> None:
    """Train, and show every release to the observers.

    Args:
        module: with a folder of its own; noise is planned for `planned` rounds, None: `rounds`.
        data: records and who holds them.
        observers: see `Witness`.
        rounds: to do.
    """
    if planned is not None and module.rules.planned_rounds is None:
        module.rules = replace(module.rules, planned_rounds=planned)
    trainer = pl.Trainer(
        max_epochs=rounds,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[Witness(observers)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=str(module.run_dir),
    )
    trainer.fit(module, datamodule=data)


def _compare_releases(run: AttackedRun, again: Sequence[Release]) -> None:
    known = {(r.client, r.round, r.evaluation): r.digest for r in run.releases}
    for line in again:
        if known.get((line.client, line.round, line.evaluation)) != line.digest:
            raise ValueError(
                f"run={run.folder}: computed again, client {line.client} released other bytes in "
                f"round {line.round} than its ledger has; use the version, the machine and the "
                "number of threads of the run"
            )


def _compare_models(run: AttackedRun, module: FederatedModule) -> None:
    found = module.network.state_dict()
    if any(not torch.allclose(found[n], v, atol=1e-3) for n, v in run.weights.items()):
        raise ValueError(
            f"run={run.folder}: computed again, it gives another model than its checkpoint has; "
            "use the version and the machine of the run"
        )
