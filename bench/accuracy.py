"""What privacy costs: every method under one ledger, on the same network, tuned alike.

    python -m bench accuracy                    # all studies, hours on one core; resumes
    python -m bench accuracy --only digits      # one study

Studies: `best` (the best networks), `digits` and `fashion` (the comparison on a network of four
layers), `measures` (what improves accuracy), `personal` (clients with ε of 1, 3 and 8). In a
comparison every method has the same number of trials, each judged by the validation records of the
trial seeds; the winner's runs with seeds from 1 on read the test records once each, after the last
round. Every run is kept in bench/results/accuracy_<study>.json, and none is run twice.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine
from bench.accuracy_runs import compose, records, run

RESULTS = machine.ROOT / "bench" / "results"
FOLDER = "configs/comparators"
SEEDS = (1, 2, 3, 4, 5)
SEEDS_OF = {"digits": (*SEEDS, 6, 7, 8, 9, 10), "fashion": SEEDS}
EPSILONS = (8.0, 3.0, 1.0)
TRIAL_SEED = 0
Options = dict[str, Any]

COMPARATORS = {
    "flat, fixed": "flat_fixed",
    "flat, quantile": "flat_quantile",
    "flat, automatic": "automatic",
    "per layer, fixed": "layer_fixed",
    "per layer, quantile": "layer_quantile",
    "per layer, median and cosine": "median_cosine",
    "per layer, moving average": "moving_average",
}
AADP = {
    "AADP: joint quantile, contribution": "aadp_joint_contribution",
    "AADP: joint quantile, mse": "aadp_joint_mse",
    "AADP: joint quantile, uniform": "aadp_joint_uniform",
    "AADP: quantile, contribution": "aadp_quantile_contribution",
    "AADP: quantile, mse": "aadp_quantile_mse",
    "AADP: released, contribution": "aadp_released_contribution",
    "AADP: released, mse": "aadp_released_mse",
    "AADP: fixed, contribution": "aadp_fixed_contribution",
}
BEST_AADP = "AADP: joint quantile, contribution"
DEFAULT_AADP = "AADP: quantile, contribution"
RELEASED_AADP = "AADP: released, contribution"
AADP_SHOWN = (BEST_AADP, "AADP: joint quantile, mse", DEFAULT_AADP, RELEASED_AADP)
NOMINAL = {
    "NbAFL": "nbafl",
    "median and cosine, published": "median_cosine_published",
    "moving average, published": "moving_average_published",
}
PUBLIC = {"FedAvg without privacy": "fedavg"}
METHODS = PUBLIC | COMPARATORS | AADP | NOMINAL

# Trials. The server's learning rate times the clip norm is what matters, so the learning rates of a
# method are multiples of one number, by study and ε, over its clip norm; a quantile is tuned as the
# clip norm is. The numbers were found on training records, in a sketch of these networks.
_LR = "model.server_optimizer.init_args.lr"
_MOMENTUM = "model.server_optimizer.init_args.momentum"
_CLIP, _QUANTILE = "privacy.clip_norm", "privacy.quantile"
RATES = {
    "digits": {8.0: 1.6, 3.0: 0.8, 1.0: 0.3},
    "fashion": {8.0: 4.0, 3.0: 2.0, 1.0: 0.8},
}
STEPS = {"digits": (0.5, 1.0, 2.0), "fashion": (0.5, 1.0)}
TRIAL_SEEDS = {"digits": (0, 100), "fashion": (0,)}
# The typical norm that each clip norm or quantile stands for.
CLIP_NORMS = {1.0: 1.0, 4.0: 4.0}
QUANTILES = {"digits": {0.5: 2.0, 0.8: 2.0}, "fashion": {0.8: 4.0, 0.95: 4.0}}
# Whole updates, and steps without clipping, have other scales.
WHOLE_UPDATES = (0.01, 0.03, 0.06, 0.1, 0.2, 0.4)
WITHOUT_PRIVACY = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
BASES = {"digits": "digits", "fashion": "fashion_mnist"}


@dataclass(frozen=True)
class Run:
    """One run: where it belongs and what it is made of."""

    study: str
    case: str
    epsilon: float | None
    seed: int
    files: tuple[str, ...]
    options: Options
    trial: int | None = None

    @property
    def key(self) -> str:
        """Name in the results."""
        what = f"seed {self.seed}" if self.trial is None else f"trial {self.trial}"
        if self.trial is not None and self.seed != TRIAL_SEED:
            what += f", seed {self.seed}"
        return f"{self.study} | {self.case} | {self.epsilon} | {what}"


class Results:
    """The file of results; written whole after every run, so that a stop loses one run at most."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def do(self, one: Run, load: Any) -> dict[str, Any]:
        """The result of a run, from the file if it is there."""
        if one.key in self.runs:
            return self.runs[one.key]
        options = dict(one.options)
        if one.epsilon is not None:
            options["privacy.epsilon"] = one.epsilon
        config = compose(one.files, options)
        found = run(config, one.seed, test=one.trial is None, arrays=load(config))
        facts = {"study": one.study, "case": one.case, "target_epsilon": one.epsilon}
        facts |= {"seed": one.seed, "trial": one.trial, "files": list(one.files)}
        self.runs[one.key] = facts | {"options": options} | found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.runs, indent=0, ensure_ascii=False) + "\n")
        os.replace(part, self.path)
        print(f"{one.key}: {found['accuracy']:.2f} %, {found['seconds']} s", flush=True)
        return self.runs[one.key]


def trials_of(study: str, method: str, epsilon: float) -> list[Options]:
    """Trials of a method, as many for each; kinds of methods differ in what there is to tune."""
    steps, rate = STEPS[study], RATES[study][epsilon]
    count = 2 * len(steps)
    if method in NOMINAL:
        return [{"model.client_lr": lr, _MOMENTUM: 0.0} for lr in WHOLE_UPDATES[:count]]
    if method in PUBLIC:
        return [{_LR: lr} for lr in WITHOUT_PRIVACY[:count]]
    voting = "quantile" in method
    option, norms = (_QUANTILE, QUANTILES[study]) if voting else (_CLIP, CLIP_NORMS)
    return [
        {option: value, _LR: round(rate * step / norm, 4)}
        for value, norm in norms.items()
        for step in steps
    ]


def planned(study: str, epsilons: tuple[float, ...]) -> Iterator[tuple[str, str, float]]:
    """Methods with their files at every ε; on Fashion-MNIST the ablation comes last, at ε = 3."""
    shown = PUBLIC | COMPARATORS | {name: AADP[name] for name in AADP_SHOWN}
    for epsilon in epsilons:
        for method, file in (METHODS if study == "digits" else shown).items():
            yield method, file, epsilon
    if study != "digits" and 3.0 in epsilons:
        yield from ((m, file, 3.0) for m, file in AADP.items() if m not in AADP_SHOWN)


def compare(study: str, results: Results, load: Any, epsilons: tuple[float, ...]) -> None:
    """Trials of every method at every ε, then other seeds of the best trial."""
    for method, file, epsilon in planned(study, epsilons):
        tuned(study, method, file, epsilon, results, load)


def tuned(study: str, method: str, file: str, epsilon: float, results: Results, load: Any) -> None:
    """Trials of one method, judged by validation, then the seeds of the best."""
    target = None if method in PUBLIC else epsilon
    files = (f"{FOLDER}/{BASES[study]}.yaml", f"{FOLDER}/{file}.yaml")

    def accuracy(seed: int, options: Options, trial: int | None = None) -> float:
        one = Run(study, method, target, seed, files, options, trial)
        return results.do(one, load)["accuracy"]

    trials = trials_of(study, method, epsilon)
    found = [
        statistics.mean(accuracy(seed, options, i) for seed in TRIAL_SEEDS[study])
        for i, options in enumerate(trials)
    ]
    for seed in SEEDS_OF[study]:
        accuracy(seed, trials[found.index(max(found))])


BEST = ("configs/best/fashion_mnist.yaml",)
DIRICHLET = {"data.partition": "dirichlet", "data.alpha": 0.5}
_ROUNDS = ("trainer.max_epochs", "model.server_scheduler.init_args.total_iters")


def _rounds(count: int, lr: float) -> Options:
    return {_ROUNDS[0]: count, _ROUNDS[1]: count, _LR: lr}


# By ε: rounds and learning rate, chosen on the validation records of seed 1.
BEST_OPTIONS = {8.0: {}, 3.0: _rounds(60, 80.0), 1.0: _rounds(60, 40.0)}
BEST_CASES: dict[str, tuple[Options, tuple[int, ...]]] = {
    "IID, 10 clients": ({}, SEEDS),
    "Dirichlet(0.5), 10 clients": (DIRICHLET, SEEDS),
    "IID, 100 clients": ({"data.num_clients": 100}, SEEDS[:3]),
}


def best_runs() -> Iterator[Run]:
    """Fashion-MNIST with everything that helps."""
    for case, (options, seeds) in BEST_CASES.items():
        for epsilon in EPSILONS:
            for seed in seeds:
                yield Run("best", case, epsilon, seed, BEST, BEST_OPTIONS[epsilon] | options)


def without_privacy(results: Results, load: Any) -> None:
    """The same network and rounds without clipping and noise, its learning rate tuned."""
    case, options = "IID, 10 clients, without privacy", {"privacy.setting": "none"}
    trials = [options | _rounds(100, lr) for lr in (10.0, 30.0, 100.0)]
    found = [
        results.do(Run("best", case, None, TRIAL_SEED, BEST, trial, i), load)
        for i, trial in enumerate(trials)
    ]
    best = max(range(len(trials)), key=lambda i: found[i]["accuracy"])
    for seed in SEEDS:
        results.do(Run("best", case, None, seed, BEST, trials[best]), load)


MEASURES_EPSILON = 3.0
_FEATURES = "data.transform"
_PIXELS = {_FEATURES: None, "data.transform_args": {}, "model.network.init_args.in_features": 784}
# One measure of the best run at a time, at ε = 3 with 1024 whitened features unless said otherwise.
MEASURES: dict[str, Options] = {
    "all of them": {},
    "without the schedule": {"model.server_scheduler": None, _LR: 20.0},
    "without momentum": {_MOMENTUM: 0.0, _LR: 400.0},
    "Nesterov's momentum": {"model.server_optimizer.init_args.nesterov": True},
    "average of the released models (EMA 0.9)": {"averaging": 0.9},
    "20 rounds": _rounds(20, 240.0),
    "a tenth of the records a step (q = 0.1)": {"model.sampling_rate": 0.1},
    "four local steps a round, 15 rounds": {
        "model.local_steps": 4,
        _ROUNDS[0]: 15,
        _ROUNDS[1]: 15,
        _LR: 80.0,
    },
    "pixels in place of features": _PIXELS | {_LR: 0.5},
    "noise shrunk out of every mean": {"model.denoise": True},
    "noise shrunk out of every mean, without momentum": {
        "model.denoise": True,
        _MOMENTUM: 0.0,
        _LR: 400.0,
    },
    "warm-up over 6 rounds, then the schedule": {
        "model.server_scheduler": {
            "class_path": "torch.optim.lr_scheduler.OneCycleLR",
            "init_args": {
                "max_lr": 80.0,
                "total_steps": 61,
                "pct_start": 0.1,
                "anneal_strategy": "linear",
                "cycle_momentum": False,
            },
        },
    },
}
# The same on the comparison's network of four layers, under AADP with joint clipping.
_ACTIVATION = "model.network.init_args.activation"
DEEP_MEASURES: dict[str, Options] = {
    "four layers: tanh, records standardised": {},
    "four layers: relu": {_ACTIVATION: "relu"},
    "four layers: gelu": {_ACTIVATION: "gelu"},
    "four layers: records not standardised": {"model.network.init_args.standardize": False},
    "four layers: without momentum": {_MOMENTUM: 0.0, _LR: 5.0},
    "four layers: every record in every round (q = 1)": {"model.sampling_rate": 1.0},
}
# The same on a network of one convolution and one dense layer on pixels, in 30 rounds of AADP.
_NETWORK = "model.network"
_CNN = {
    "image_size": 28,
    "channels": [32],
    "kernel_sizes": [8],
    "strides": [4],
    "standardize": True,
}
_COPIES = {"class_path": "fl_lightning.augmentation.Shifts"}


def _copies(**options: Any) -> Options:
    """Training on copies of every record."""
    inner = {"class_path": "fl_lightning.models.CNN", "init_args": _CNN}
    made = {"network": inner, "copies": _COPIES | {"init_args": options}}
    return {
        _NETWORK: {"class_path": "fl_lightning.augmentation.MeanOverCopies", "init_args": made},
        "model.loss": {"class_path": "torch.nn.NLLLoss", "init_args": {"reduction": "none"}},
    }


def _normalized(standardize_weights: bool) -> Options:
    options = _CNN | {"groups": 4, "standardize_weights": standardize_weights}
    return {
        _NETWORK: {"class_path": "fl_lightning.models.NormalizedCNN", "init_args": options},
    }


CNN_MEASURES: dict[str, Options] = {
    "convolution: tanh, records standardised": {},
    "convolution: five shifted copies of a record": _copies(pixels=1),
    "convolution: group normalisation": _normalized(False),
    "convolution: group normalisation, weights standardised": _normalized(True),
}
PERSONAL = {
    "(B/z)², by noise (precision)": {"model.weighting": "precision"},
    "records alike": {"model.weighting": "records"},
}


def measures_runs() -> Iterator[Run]:
    """The best run at ε = 3, then a deeper network, with one measure changed."""
    for case, options in MEASURES.items():
        for seed in SEEDS[:3]:
            base = BEST_OPTIONS[MEASURES_EPSILON]
            yield Run("measures", case, MEASURES_EPSILON, seed, BEST, base | options)
    files = (f"{FOLDER}/fashion_mnist.yaml", f"{FOLDER}/aadp_joint_mse.yaml")
    for case, options in DEEP_MEASURES.items():
        for seed in SEEDS[:3]:
            base = {_QUANTILE: 0.9, _LR: 0.5}
            yield Run("measures", case, MEASURES_EPSILON, seed, files, base | options)
    for case, options in CNN_MEASURES.items():
        for seed in SEEDS[:3]:
            base = {"trainer.max_epochs": 30}
            files = ("configs/fashion_mnist_aadp.yaml",)
            yield Run("measures", case, MEASURES_EPSILON, seed, files, base | options)


def personal_runs() -> Iterator[Run]:
    """Clients with ε of 1, 3 and 8 on digits, AADP's rules."""
    files = (f"{FOLDER}/digits.yaml", f"{FOLDER}/aadp_joint_mse.yaml")
    for case, options in PERSONAL.items():
        for seed in SEEDS:
            epsilons = {"privacy.epsilon": [1.0, 3.0, 8.0], _LR: 0.5}
            yield Run("personal", case, None, seed, files, epsilons | options)


def run_all(only: str = "", folder: Path = RESULTS) -> None:
    """Run what is missing, study after study."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    load = records()
    if not only or only == "best":
        results = Results(folder / "accuracy_best.json")
        for one in best_runs():
            results.do(one, load)
        without_privacy(results, load)
    for study, planned in (("measures", measures_runs), ("personal", personal_runs)):
        if not only or only == study:
            results = Results(folder / f"accuracy_{study}.json")
            for one in planned():
                results.do(one, load)
    for study in BASES:
        if not only or only == study:
            compare(study, Results(folder / f"accuracy_{study}.json"), load, EPSILONS)
