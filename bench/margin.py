"""Whether dividing the budget over layers pays where theory says that it can: margin against R.

    python scripts/fetch_data.py reuters_r8; python scripts/fetch_data.py minilm
    python -m bench margin                      # half an hour on one idle core; resumes

Networks from R = 1 to R = 0.4 (docs/algorithm.md), ten clients, `record+local`. Every method has
three trials, a search for the learning rate on held-out training records of one seed; the seeds
from 1 on read the test records once each, after the last round. Runs are those of
bench/lean_rounds.py, kept in bench/results/margin.json, and none is run twice.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import machine
from bench.accuracy_runs import compose
from bench.lean_rounds import Plan, RawRatios, share_right, trained
from fl_lightning import FederatedDataModule
from fl_lightning.data import Arrays
from fl_lightning.data.sources import load
from fl_lightning.data.transform import transformed
from fl_lightning.models import MLP
from fl_lightning.networks.pretrained import text_classifier

PATH = machine.ROOT / "bench" / "results" / "margin.json"
EPSILONS = (1.0, 3.0)
SEEDS = (1, 2, 3, 4, 5)
TRIAL_SEED, CLIENTS = 0, 10
_FACTOR = 3.0  # between learning rates of the search
_TOKENS, _FROZEN = 8, 5
_R8 = ("configs/best/reuters_r8.yaml",)

_AADP = {"thresholds": "quantile"}
METHODS: dict[str, dict[str, Any]] = {
    "flat, fixed": {"clipping": "flat", "thresholds": "fixed", "allocation": "uniform"},
    "per layer, fixed": {"thresholds": "fixed", "allocation": "uniform"},
    "per layer, quantile": {"thresholds": "quantile", "allocation": "uniform"},
    "AADP: contribution": _AADP | {"allocation": "contribution"},
    "AADP: joint, contribution": _AADP | {"clipping": "joint", "allocation": "contribution"},
    "AADP: joint, mse": _AADP | {"clipping": "joint", "allocation": "mse"},
    "AADP: joint, snr": _AADP | {"clipping": "joint", "allocation": "snr"},
}
BASE = "flat, fixed"
# A run of LoRA takes as long as ten of the others.
FEW_SEEDS = SEEDS[:3]
FEW = tuple(m for m in METHODS if m not in ("per layer, fixed", "AADP: contribution"))


@dataclass(frozen=True)
class Case:
    """A network and its records.

    Attributes:
        records: loads them.
        network: makes the network of a seed.
        rounds, rate: of a run.
        lr: middle of the search for the learning rate.
        clip_norm: of all layers together; the first where it is tracked.
    """

    records: Callable[[], Arrays]
    network: Callable[[int], nn.Module]
    rounds: int
    rate: float
    lr: float
    clip_norm: float


@functools.lru_cache(maxsize=1)
def _digits() -> Arrays:
    return load("digits")


@functools.lru_cache(maxsize=1)
def _r8(transform: str) -> Arrays:
    config = compose(_R8, {"data.source_args.max_tokens": _TOKENS})["data"]
    arguments = dict(config["transform_args"])
    if transform == "hidden_states":
        arguments["frozen_layers"] = _FROZEN
    arrays = load(config["source"], source_args=config["source_args"])
    return transformed(arrays, transform, arguments)


def _mlp(inputs: int, classes: int, hidden: tuple[int, ...]) -> Callable[[int], nn.Module]:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return MLP(in_features=inputs, hidden=hidden, num_classes=classes)

    return make


@functools.lru_cache(maxsize=2)
def _adapted(start: str) -> nn.Module:
    given = compose(_R8, {})["model"]["network"]["init_args"]
    return text_classifier(
        given["model"], 8, labels=given["labels"], label_scale=given["scale"],
        frozen_layers=_FROZEN, lora_start=start,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def _lora(start: str) -> Callable[[int], nn.Module]:
    return lambda seed: copy.deepcopy(_adapted(start))


_STATES, _FEATURES = (functools.partial(_r8, t) for t in ("hidden_states", "sentence_features"))
CASES: dict[str, Case] = {
    "digits, one layer": Case(_digits, _mlp(64, 10, ()), 10, 1.0, 3.0, 1.0),
    "digits, 32-32-32": Case(_digits, _mlp(64, 10, (32, 32, 32)), 10, 1.0, 2.0, 1.0),
    "digits, 512-16": Case(_digits, _mlp(64, 10, (512, 16)), 10, 1.0, 1.0, 1.0),
    "R8, MiniLM's features, 32": Case(_FEATURES, _mlp(384, 8, (32,)), 10, 1.0, 3.0, 1.0),
    "R8, LoRA of MiniLM, A frozen": Case(_STATES, _lora("frozen_a"), 10, 0.05, 0.3, 1.0),
    "R8, LoRA of MiniLM, orthogonal": Case(_STATES, _lora("orthogonal"), 10, 0.05, 0.1, 1.0),
}


class Study:
    """The file of results, written whole after every run."""

    def __init__(self, path: Path = PATH) -> None:
        self.path = path
        self.runs: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def do(
        self, case: str, method: str, epsilon: float, seed: int, lr: float, trial: bool
    ) -> float:
        """Accuracy of a run in percent, from the file if it is there."""
        what = f"trial, lr {lr:.4g}" if trial else f"seed {seed}"
        key = f"{case} | {method} | {epsilon} | {what}"
        if key not in self.runs:
            found = one_run(CASES[case], method, epsilon, seed, lr, trial)
            facts = {"case": case, "method": method, "epsilon": epsilon, "seed": seed, "lr": lr}
            self.runs[key] = facts | {"trial": trial} | found
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.runs, indent=0, ensure_ascii=False) + "\n")
            os.replace(part, self.path)
            print(f"{key}: {found['accuracy']:.2f} %, {found['cpu_seconds']} s", flush=True)
        return self.runs[key]["accuracy"]


def one_run(
    case: Case, method: str, epsilon: float, seed: int, lr: float, trial: bool
) -> dict[str, Any]:
    """One run: accuracy on held-out records (a trial) or on the test records, and R."""
    start = time.process_time()
    arrays = case.records()
    held = 0.3 if trial else 0.1
    data = FederatedDataModule(arrays, CLIENTS, seed=seed, val_fraction=held)
    network = case.network(seed).train()
    raw = RawRatios(network, data, () if trial else (0, case.rounds // 2, case.rounds))
    options = METHODS[method] | {"epsilon": epsilon, "clip_norm": case.clip_norm}
    found = trained(network, data, Plan(options, case.rounds, case.rate, lr), seed, watch=raw)
    known = data._prepared
    x, y = (known.x_val, known.y_val) if trial else (arrays.x_test, arrays.y_test)
    return {
        "accuracy": round(share_right(network, x, y), 3),
        **found,
        "raw_ratios": raw.found,
        "raw_norms": raw.norms,
        "cpu_seconds": round(time.process_time() - start, 2),
    }


def tuned(study: Study, case: str, method: str, epsilon: float) -> None:
    """Three learning rates, up or down from the middle, then the seeds with the best."""
    found: dict[float, float] = {}

    def accuracy(lr: float) -> float:
        found[lr] = study.do(case, method, epsilon, TRIAL_SEED, lr, True)
        return found[lr]

    middle = CASES[case].lr
    up = accuracy(middle * _FACTOR) > accuracy(middle)
    accuracy(middle * _FACTOR**2 if up else middle / _FACTOR)
    best = max(found, key=lambda lr: found[lr])
    for seed in FEW_SEEDS if "LoRA" in case else SEEDS:
        study.do(case, method, epsilon, seed, best, False)


def run_all() -> None:
    """Run what is not in the file of results yet, ε = 1 first."""
    study = Study()
    for epsilon in EPSILONS:
        for case in CASES:
            for method in FEW if "LoRA" in case else METHODS:
                tuned(study, case, method, epsilon)
