"""Whether dividing the budget over layers pays where theory says that it can: margin against R.

    python scripts/fetch_data.py reuters_r8; python scripts/fetch_data.py minilm
    python -m bench margin                      # ten minutes on one idle core; resumes

Networks of several R (docs/algorithm.md), ten clients, `record+local`. Every method has three
trials, a search for the learning rate on held-out training records of one seed; the seeds from 1 on
read the test records once each, after the last round. Networks of MiniLM are looked at before their
first round alone. Runs are those of bench/lean_rounds.py, kept in bench/results/margin.json, and
none is run twice.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aadp_kernels import Layout
from bench import machine
from bench.accuracy_runs import compose
from bench.lean_rounds import Plan, RawRatios, harm_ratio, multiplier, share_right, trained
from fl_lightning import FederatedDataModule
from fl_lightning.data import Arrays
from fl_lightning.data.sources import load
from fl_lightning.data.transform import transformed
from fl_lightning.models import MLP
from fl_lightning.networks.pretrained import text_classifier

PATH = machine.ROOT / "bench" / "results" / "margin.json"
EPSILONS = (1.0, 3.0)
SEEDS = (1, 2, 3, 4, 5)
HARM_SEEDS = SEEDS[:3]
TRIAL_SEED, CLIENTS = 0, 10
FACTOR = 3.0  # between learning rates of the search
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


@dataclass(frozen=True)
class Case:
    """A network and its records.

    Attributes:
        records: loads them.
        network: makes the network of a seed.
        rounds, rate: of a run.
        lr: middle of the search for the learning rate.
        clip_norm: of all layers together; the first where it is tracked.
        vectorize: see `Plan`.
    """

    records: Callable[[], Arrays]
    network: Callable[[int], nn.Module]
    rounds: int
    rate: float
    lr: float
    clip_norm: float
    vectorize: bool = True


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
    options: dict[str, Any] = {"train": "all"} if start == "all" else {"lora_start": start}
    return text_classifier(
        given["model"], 8, labels=given["labels"], label_scale=given["scale"],
        frozen_layers=_FROZEN, **options,
    )  # fmt: skip


def _upper(start: str) -> Callable[[int], nn.Module]:
    """MiniLM's last layer, by a start of LoRA, or all of it."""
    return lambda seed: copy.deepcopy(_adapted(start))


_STATES, _FEATURES = (functools.partial(_r8, t) for t in ("hidden_states", "sentence_features"))
CASES: dict[str, Case] = {
    "digits, one layer": Case(_digits, _mlp(64, 10, ()), 10, 1.0, 3.0, 1.0),
    "digits, 32-32-32": Case(_digits, _mlp(64, 10, (32, 32, 32)), 10, 1.0, 2.0, 1.0),
    "digits, 512-16": Case(_digits, _mlp(64, 10, (512, 16)), 10, 1.0, 1.0, 1.0),
    "digits, 256": Case(_digits, _mlp(64, 10, (256,)), 10, 1.0, 1.0, 1.0),
}


# Networks that are looked at before the first round alone.
STARTS: dict[str, tuple[Callable[[], Arrays], Callable[[int], nn.Module]]] = {
    **{name: (case.records, case.network) for name, case in CASES.items()},
    "R8, MiniLM's features, 32": (_FEATURES, _mlp(384, 8, (32,))),
    "R8, LoRA of MiniLM, A frozen": (_STATES, _upper("frozen_a")),
    "R8, LoRA of MiniLM, orthogonal": (_STATES, _upper("orthogonal")),
    "R8, LoRA of MiniLM, A trained from B = 0": (_STATES, _upper("default")),
    "R8, all of MiniLM's last layer": (_STATES, _upper("all")),
}
_START_NOISE = 0.01  # a coordinate: small, so that the curvature alone is seen


class Study:
    """Cases, methods, and the file of results, written whole after every run."""

    def __init__(
        self,
        path: Path = PATH,
        cases: Mapping[str, Case] = CASES,
        methods: Mapping[str, dict[str, Any]] = METHODS,
    ) -> None:
        self.path, self.cases, self.methods = path, cases, methods
        self.runs: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def do(
        self, case: str, method: str, epsilon: float | None, seed: int, lr: float, trial: bool
    ) -> float:
        """Accuracy of a run in percent, from the file if it is there."""
        what = f"trial, lr {lr:.4g}" if trial else f"seed {seed}"
        key = f"{case} | {method} | {epsilon} | {what}"
        if key not in self.runs:
            found = one_run(self.cases[case], self.methods[method], epsilon, seed, lr, trial)
            facts = {"case": case, "method": method, "epsilon": epsilon, "seed": seed, "lr": lr}
            self.keep(key, facts | {"trial": trial} | found)
            print(f"{key}: {found['accuracy']:.2f} %, {found['cpu_seconds']} s", flush=True)
        return self.runs[key]["accuracy"]

    def keep(self, key: str, found: dict[str, Any]) -> None:
        """Add a result to the file."""
        self.runs[key] = found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.runs, indent=0, ensure_ascii=False) + "\n")
        os.replace(part, self.path)


def one_run(
    case: Case, method: dict[str, Any], epsilon: float | None, seed: int, lr: float, trial: bool
) -> dict[str, Any]:
    """One run: accuracy on held-out records (a trial) or on the test records, and R.

    Without ε there is no noise; gradients are clipped all the same.
    """
    start = time.process_time()
    arrays = case.records()
    held = 0.3 if trial else 0.1
    data = FederatedDataModule(arrays, CLIENTS, seed=seed, val_fraction=held)
    network = case.network(seed).train()
    raw = RawRatios(network, data, () if trial else (0, case.rounds // 2, case.rounds))
    options = method | {"epsilon": epsilon, "clip_norm": case.clip_norm}
    if epsilon is None:
        options["noise_multiplier"] = 0.0
    plan = Plan(options, case.rounds, case.rate, lr, case.vectorize)
    found = trained(network, data, plan, seed, watch=raw)
    known = data._prepared
    x, y = (known.x_val, known.y_val) if trial else (arrays.x_test, arrays.y_test)
    return {
        **share_right(network, x, y),
        **found,
        "raw_ratios": raw.found,
        "raw_norms": raw.norms,
        "cpu_seconds": round(time.process_time() - start, 2),
    }


def tuned(
    study: Study, case: str, method: str, epsilon: float | None, seeds: Sequence[int] = SEEDS
) -> None:
    """Three learning rates, up or down from the middle, then the seeds with the best."""
    found: dict[float, float] = {}

    def accuracy(lr: float) -> float:
        found[lr] = study.do(case, method, epsilon, TRIAL_SEED, lr, True)
        return found[lr]

    middle = study.cases[case].lr
    up = accuracy(middle * FACTOR) > accuracy(middle)
    accuracy(middle * FACTOR**2 if up else middle / FACTOR)
    best = max(found, key=lambda lr: found[lr])
    for seed in seeds:
        study.do(case, method, epsilon, seed, best, False)


def harm(study: Study, case: str, epsilon: float, seed: int) -> None:
    """How far a round's noise moves predictions, before, amid and after the flat run of a seed."""
    key = f"{case} | harm | {epsilon} | seed {seed}"
    flat = study.runs.get(f"{case} | {BASE} | {epsilon} | seed {seed}")
    if flat is None or key in study.runs:
        return
    known, found = study.cases[case], []
    data = FederatedDataModule(known.records(), CLIENTS, seed=seed, val_fraction=0.1)
    network = known.network(seed).train()
    dims = Layout.build({n: p for n, p in network.named_parameters() if p.requires_grad}).dims
    z = multiplier(epsilon, known.rounds, known.rate, dims)
    batch = known.rate * float(data.client_sizes.double().mean())
    size = flat["lr"] * z * known.clip_norm / batch / CLIENTS**0.5

    def watch(round: int, params: dict[str, Tensor]) -> None:
        if round in (0, known.rounds // 2, known.rounds):
            found.append(harm_ratio(network, params, data, size))

    options = study.methods[BASE] | {"epsilon": epsilon, "clip_norm": known.clip_norm}
    plan = Plan(options, known.rounds, known.rate, flat["lr"], known.vectorize)
    trained(network, data, plan, seed, watch=watch)
    facts = {"case": case, "method": "harm", "epsilon": epsilon, "seed": seed, "trial": False}
    study.keep(key, facts | {"harm_ratios": found})
    print(f"{key}: {found}", flush=True)


def start(study: Study, name: str) -> None:
    """R and how far noise moves predictions, before the first round of one seed."""
    key = f"{name} | start"
    if key in study.runs:
        return
    records, make = STARTS[name]
    data = FederatedDataModule(records(), CLIENTS, seed=SEEDS[0], val_fraction=0.1)
    network = make(SEEDS[0]).train()
    params = {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}
    raw = RawRatios(network, data, (0,))
    raw(0, params)
    found = harm_ratio(network, params, data, _START_NOISE)
    facts = {"case": name, "method": "start", "epsilon": None, "seed": SEEDS[0], "trial": False}
    dims = list(Layout.build(params).dims)
    more = {"raw_ratios": raw.found, "raw_norms": raw.norms, "dims": dims, "harm_ratios": [found]}
    study.keep(key, facts | more)
    print(f"{key}: R {raw.found[0]}, harm {found}", flush=True)


def run_all() -> None:
    """Run what is not in the file of results yet, ε = 1 first."""
    study = Study()
    for name in STARTS:
        start(study, name)
    for epsilon in EPSILONS:
        for case in CASES:
            for method in METHODS:
                tuned(study, case, method, epsilon)
            for seed in HARM_SEEDS:
                harm(study, case, epsilon, seed)
