"""Membership on Fashion-MNIST: what attacks reach, beside what the ledger allows at most.

    python -m bench membership              # cases that have no result yet; resumes

All cases train the same network on a small set of records, so that it can learn them by heart, and
differ in their privacy alone. Targets have half of a pool of records each; members are told from
the other half. Shadow models of the likelihood ratio have halves of the same pool, and are trained
as the targets are, with the same clipping and noise. The attacks were tuned on a target of a seed
of its own.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from bench import machine, pages
from bench.accuracy_report import table
from bench.accuracy_runs import build, compose
from fl_lightning import from_arrays
from fl_lightning.attacks import membership as attack
from fl_lightning.attacks.attacked import fit_watched
from fl_lightning.attacks.candidates import Candidates, candidates_of
from fl_lightning.attacks.passive import PassiveServer
from fl_lightning.attacks.pictures import png, roc_panels
from fl_lightning.attacks.shadows import Plan, shadow_confidences
from fl_lightning.data.sources import load

RESULTS = machine.ROOT / "bench" / "results" / "membership.json"
PAGE = machine.ROOT / "docs" / "attacks.md"
IMAGE = machine.ROOT / "docs" / "images" / "membership.png"
CONFIG = "configs/fashion_mnist_aadp.yaml"
RECORDS, SHADOWS, ROUNDS, CLIENTS = 500, 32, 60, 5
TUNING, SEEDS, FIRST_MODEL = 0, (1, 2), 1
_ALL: dict[str, Any] = {
    "model.network": {
        "class_path": "fl_lightning.models.MLP",
        "init_args": {"in_features": 784, "hidden": [16], "standardize": True},
    },
    "data.num_clients": CLIENTS,
    "data.val_fraction": 0.0,
    "model.sampling_rate": 1.0,
    "trainer.max_epochs": ROUNDS,
}
CASES: dict[str, Mapping[str, Any]] = {
    "without privacy": {"privacy.setting": "none"},
    "abstract, nominal ε = 8": {"privacy.setting": "abstract", "privacy.mechanism": "laplace"},
    "ε = 8": {"privacy.epsilon": 8.0},
    "ε = 3": {"privacy.epsilon": 3.0},
    "ε = 1": {"privacy.epsilon": 1.0},
}
NAMES = {
    attack.LOSS: "loss of the last model",
    attack.ONLINE: "likelihood ratio of the last model",
    attack.PASSIVE: "server that watches all releases",
}


def pool() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Records that targets and shadows draw from, and the test records."""
    arrays = load("fashion_mnist")
    chosen = np.random.default_rng(0).permutation(len(arrays.x_train))[: 2 * RECORDS]
    rows = torch.from_numpy(np.sort(chosen))
    return arrays.x_train[rows], arrays.y_train[rows], arrays.x_test, arrays.y_test


def target(case: str, seed: int, records: Any, folder: str) -> tuple[Any, Any, np.ndarray]:
    """Module, data and order of the pool (members first) of one target."""
    x, y = records[:2]
    order = np.random.default_rng([1, seed]).permutation(len(x))
    inside, outside = (torch.from_numpy(part) for part in (order[:RECORDS], order[RECORDS:]))
    arrays = from_arrays(x[inside], y[inside], x_test=x[outside], y_test=y[outside], num_classes=10)
    config = compose((CONFIG,), _ALL | CASES[case])
    module, data, _ = build(config, arrays, seed, folder)
    first = build(config, arrays, FIRST_MODEL, folder)[0].network.state_dict()
    module.network.load_state_dict(first)
    return module, data, order


def attacked(case: str, seed: int, records: Any, shadows: Any) -> dict[str, Any]:
    """Train a target, attack it, and keep its scores' curves."""
    with tempfile.TemporaryDirectory() as folder:
        module, data, order = target(case, seed, records, folder)
        plan = Plan(copy.deepcopy(module), data.partition.sizes, ROUNDS, ROUNDS, None)
        candidates = candidates_of(data, seed=seed)
        passive = PassiveServer(module, candidates, data.partition.sizes)
        start = time.perf_counter()
        fit_watched(module, data, [passive], rounds=ROUNDS)
        watched = time.perf_counter() - start
        told, had = shadows
        scores = attack.model_scores(
            plan.module, module.network, candidates, (told[:, order], had[:, order])
        )
        scores[attack.PASSIVE] = passive.scores
        run = module.run
        proven = attack.ceilings(run.ledger.header, run.ledger.releases) if run.ledger else None
        return {
            "case": case,
            "seed": seed,
            # Members first: half of them.
            "scores": {n: [float(f"{v:.5g}") for v in s] for n, s in scores.items()},
            "ceiling": None
            if proven is None
            else [[round(float(v), 6) for v in c] for c in proven],
            "train_accuracy": accuracy(module.network, data.x, data.y),
            "test_accuracy": accuracy(module.network, *records[2:]),
            "epsilon": None if run.ledger is None else float(run.epsilon_spent().max()),
            "seconds": round(watched, 1),
        }


def accuracy(network: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of right predictions in percent."""
    with torch.no_grad():
        return round(100 * float((network(x).argmax(1) == y).float().mean()), 2)


def shadows_of(case: str, records: Any) -> tuple[np.ndarray, np.ndarray]:
    """Confidences of the shadow models about the pool, and what each had."""
    x, y = records[:2]
    with tempfile.TemporaryDirectory() as folder:
        module, data, _ = target(case, TUNING, records, folder)
        multiplier = None
        if module.privacy.private:
            fit_watched(module, data, [], rounds=1, planned=ROUNDS)
            multiplier = module.budget.multiplier
            module, data, _ = target(case, TUNING, records, folder)
        candidates = Candidates(x, y, np.zeros(len(x), bool), np.zeros(len(x), np.int64))
        plan = Plan(module, data.partition.sizes, ROUNDS, ROUNDS, multiplier)
        return shadow_confidences(plan, candidates, shadows=SHADOWS, seed=7)


def run_all() -> None:
    """Run the cases that have no result yet, then write table and picture."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    found = results()
    records = pool()
    for case in CASES:
        if case in found:
            continue
        start, load_before = time.process_time(), os.getloadavg()[0]
        shadows = shadows_of(case, records)
        targets = [attacked(case, seed, records, shadows) for seed in SEEDS]
        found[case] = {
            "targets": targets,
            "records": RECORDS,
            "shadows": SHADOWS,
            "rounds": ROUNDS,
            "cpu_seconds": round(time.process_time() - start, 1),
            "load": round(load_before, 1),
        }
        RESULTS.write_text(json.dumps(found, ensure_ascii=False) + "\n")
        print(case, found[case]["cpu_seconds"], "s", flush=True)
    report()


def results() -> dict[str, Any]:
    """Committed results by case."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def pooled(case: dict[str, Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores of members and of others, of all targets of a case together."""
    rows = np.array([t["scores"][name] for t in case["targets"]])
    half = rows.shape[1] // 2
    return rows[:, :half].ravel(), rows[:, half:].ravel()


def of_ceiling(case: dict[str, Any], which: int, rate: float) -> str:
    """The largest share of right alarms that the least protected target's ledger allows."""
    curves = [t["ceiling"] for t in case["targets"]]
    if None in curves:
        return "none"
    return f"{100 * max(float(np.interp(rate, attack.RATES, c[which])) for c in curves):.0f} %"


def membership_table(found: dict[str, Any]) -> str:
    """Area and right alarms of every attack in every case, and the ceilings."""
    rows = []
    for name, case in found.items():
        figures = {a: attack.attack_figures(*pooled(case, a)) for a in NAMES}
        mean = {
            k: np.mean([t[k] for t in case["targets"]]) for k in ("train_accuracy", "test_accuracy")
        }
        rows.append(
            (
                name,
                f"{mean['train_accuracy']:.0f} / {mean['test_accuracy']:.0f} %",
                *(_area(f["auc"]) for f in figures.values()),
                *(_share(f["tpr_at_0.01"]) for f in figures.values()),
                of_ceiling(case, 0, 0.01),
                of_ceiling(case, 1, 0.01),
            )
        )
    short = ("loss", "LiRA", "server")
    head = (
        "privacy", "accuracy, training / test", *(f"AUC, {n}" for n in short),
        *(f"TPR at 1 % FPR, {n}" for n in short), "at most, of use", "at most, of a swap",
    )  # fmt: skip
    return table(head, rows)


def _area(one: dict[str, float]) -> str:
    return f"{one['value']:.3f} ({one['low']:.3f}–{one['high']:.3f})"


def _share(one: dict[str, float]) -> str:
    return f"{100 * one['value']:.1f} % ({100 * one['low']:.1f}–{100 * one['high']:.1f})"


def notes(found: dict[str, Any]) -> str:
    """One line on what was run."""
    one = next(iter(found.values()))
    seconds = sum(case["cpu_seconds"] for case in found.values())
    return (
        f"{one['records']} training records of Fashion-MNIST over {CLIENTS} clients, "
        f"{one['rounds']} rounds, {one['shadows']} shadow models a case, {len(SEEDS)} targets a "
        f"case; {seconds / 60:.0f} minutes of one CPU core in all."
    )


def report() -> None:
    """Table and picture; nothing where nothing was run."""
    found = results()
    if not found:
        return
    pages.put(PAGE, "membership", f"{membership_table(found)}\n\n{notes(found)}")
    panels = {c: {NAMES[a]: pooled(case, a) for a in NAMES} for c, case in found.items()}
    proven = {}
    for name, case in found.items():
        curves = [t["ceiling"] for t in case["targets"]]
        proven[name] = None
        if None not in curves:
            proven[name] = (attack.RATES, *(np.max([c[i] for c in curves], axis=0) for i in (0, 1)))
    IMAGE.write_bytes(png(roc_panels(panels, proven, columns=len(panels))))
