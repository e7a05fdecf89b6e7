"""One accuracy run from configuration files, in this process: what the command line would do."""

from __future__ import annotations

import copy
import functools
import gc
import json
import pkgutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import EMAWeightAveraging

from bench.machine import ROOT
from fl_lightning import (
    FederatedDataModule,
    FederatedModule,
    PrivacyConfig,
    fit_personal_layers,
)
from fl_lightning.data import Arrays
from fl_lightning.data.partition import Partition
from fl_lightning.data.sources import load
from fl_lightning.data.transform import transformed
from fl_lightning.privacy.comparators import Comparator
from fl_lightning.release.held_out import HeldOutFigures
from fl_lightning.release.personal_models import personal_models

Config = dict[str, Any]
Records = Callable[[Config], Arrays]


def compose(files: Sequence[str], options: Mapping[str, Any]) -> Config:
    """Configuration files one over the other, then dotted options, over configs/base.yaml."""
    config: Config = {}
    for name in ["configs/base.yaml", *files]:
        _merge(config, yaml.safe_load((ROOT / name).read_text()))
    for name, value in options.items():
        *path, last = name.split(".")
        section = config
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return config


def _merge(into: Config, changes: Config) -> None:
    for name, value in changes.items():
        here = into.get(name)
        if isinstance(here, dict) and isinstance(value, dict):
            made = here.get("class_path")
            # Another class has other arguments, as on the command line.
            if value.get("class_path", made) == made:
                _merge(here, value)
                continue
        into[name] = copy.deepcopy(value)


def records() -> Records:
    """A loader that keeps the last data set, transformed, for the runs that share it."""

    @functools.lru_cache(maxsize=1)
    def cached(described: str) -> Arrays:
        data = json.loads(described)
        arrays = load(data["source"], source_args=data.get("source_args"))
        if data.get("transform") is None:
            return arrays
        return transformed(arrays, data["transform"], data.get("transform_args") or {})

    def get(config: Config) -> Arrays:
        names = ("source", "source_args", "transform", "transform_args")
        return cached(json.dumps({n: v for n, v in config["data"].items() if n in names}))

    return get


def _made(described: Config, *arguments: Any) -> Any:
    """An object of a class with its arguments, which may be such descriptions themselves."""
    cls = pkgutil.resolve_name(described["class_path"])
    given = described.get("init_args", {}).items()
    return cls(*arguments, **{n: _made(v) if _is_class(v) else v for n, v in given})


def _is_class(value: Any) -> bool:
    return isinstance(value, dict) and "class_path" in value


def build(config: Config, arrays: Arrays, seed: int, folder: str) -> tuple[Any, Any, pl.Trainer]:
    """Module, data and Trainer as `python -m fl_lightning.fit` makes them for this seed."""
    pl.seed_everything(seed, verbose=False)
    made = ("source_args", "transform", "transform_args")  # the arrays are made already
    data = {k: v for k, v in config["data"].items() if k not in made}
    datamodule = FederatedDataModule(**{**data, "source": arrays, "seed": seed})
    model = dict(config["model"])
    network = _made(model.pop("network"))
    for name in ("loss", "metrics"):
        if model.get(name):
            model[name] = _made(model[name])
    for name in ("server_optimizer", "server_scheduler"):
        if model.get(name):
            model[name] = functools.partial(_made, model[name])
    options = {**config["privacy"], "seed": seed}
    comparator = Comparator(**options.pop("comparator", {}))
    privacy = PrivacyConfig(**options, comparator=comparator)
    module = FederatedModule(network, privacy, **model, seed=seed, run_dir=folder)
    averaging = config.get("averaging")
    callbacks: list[pl.Callback] = [EMAWeightAveraging(decay=averaging)] if averaging else []
    trainer = pl.Trainer(
        max_epochs=config["trainer"]["max_epochs"],
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=folder,
    )
    return module, datamodule, trainer


def run(config: Config, seed: int, *, test: bool, arrays: Arrays) -> dict[str, Any]:
    """Train, then read the validation records (a trial) or, once, the test records.

    Returns:
        accuracy after the last round in percent, ε and δ of the ledger's accountant, seconds.
    """
    warnings.simplefilter("ignore")
    torch.set_float32_matmul_precision("highest")
    gc.collect()  # of the run before: Trainer, module and their records hold one another
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        module, data, trainer = build(config, arrays, seed, folder)
        trainer.fit(module, datamodule=data)
        figures = _judged(module, data, trainer, test=test)
        correct = figures.pop("accuracy")
        if config.get("fitted_afterwards"):
            held = (arrays.x_test, arrays.y_test) if test else data.held_out
            dealt = data.test_partition if test else data.held_out_partition
            correct = _fitted_afterwards(module, data, config["fitted_afterwards"], held, dealt)
        private = module.privacy.private
        epsilon = module.run.epsilon_spent() if private else np.array([np.inf])
        return {
            "accuracy": 100 * correct,
            **({"figures": {n: round(v, 6) for n, v in figures.items()}} if figures else {}),
            "rounds": int(trainer.current_epoch),
            "epsilon": None if not private else round(float(epsilon.max()), 4),
            "guarantee": module.privacy.guarantee,
            "seconds": round(time.perf_counter() - start, 2),
        } | _by_group(module, data)


def _share_right(network: torch.nn.Module, batches: Any) -> float:
    network.eval()
    right = total = 0
    with torch.no_grad():
        for x, y in batches:
            right += int((network(x).argmax(1) == y).sum())
            total += len(y)
    return right / total


def _judged(module: Any, data: Any, trainer: pl.Trainer, *, test: bool) -> dict[str, float]:
    """Accuracy and the metrics of the run, by name: of the global model or of clients' own."""
    run = module.proposed(data, trainer)
    found = HeldOutFigures(run, personal_models(run))
    module.network.eval()
    with torch.no_grad():
        for batch in data.test_dataloader() if test else data.val_dataloader():
            found.add(batch)
    values = found.values(module.processes)
    return {name: float(value) for name, value in values.items() if name != "loss"}


def _fitted_afterwards(
    module: Any, data: Any, layers: Sequence[str], held: Sequence[torch.Tensor], dealt: Partition
) -> float:
    """Share right where each client fits layers of the finished global model to its own records.

    Args:
        module: after its run, without personal layers.
        data: of the run.
        layers: by name.
        held: records and labels to judge by.
        dealt: whose they are, as those of a run with personal layers.
    """
    right = 0.0
    for client, size in enumerate(dealt.sizes):
        if not size:
            continue
        own = copy.deepcopy(module.network)
        mine, theirs = (torch.from_numpy(p.client(client)) for p in (data.partition, dealt))
        fit_personal_layers(own, data.x[mine], data.y[mine], layers)
        right += float(size) * _share_right(own, [[part[theirs] for part in held]])
    return right / float(dealt.sizes.sum())


def _by_group(module: Any, data: Any) -> dict[str, Any]:
    """For clients with different ε: accuracy on the groups' own training records, by ε.

    Private; only a simulation may look. The global model is the same for all groups.
    """
    epsilon = module.privacy.epsilon
    if not isinstance(epsilon, list):
        return {}
    found = {}
    for i, value in enumerate(epsilon):
        rows = [data.partition.client(k) for k in range(i, data.num_clients, len(epsilon))]
        chosen = torch.from_numpy(np.concatenate(rows))
        found[str(value)] = 100 * _share_right(module.network, [(data.x[chosen], data.y[chosen])])
    return {"sim_only_group_accuracy": found}


def fit_command(files: Sequence[str], options: Mapping[str, Any], seed: int) -> str:
    """The command that repeats a run."""
    words = ["python -m fl_lightning.fit"]
    words += [f"--config {name}" for name in files]
    words += [f"--{name} {_shown(value)}" for name, value in options.items()]
    return " ".join([*words, f"--seed_everything {seed} --privacy.seed {seed}"])


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, list) else str(value)


def configs_in(folder: Path) -> list[str]:
    """Configuration files of a folder, relative to the repository."""
    return [p.relative_to(ROOT).as_posix() for p in sorted(folder.glob("*.yaml"))]
