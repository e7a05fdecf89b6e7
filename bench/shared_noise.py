"""Whole clients under noise that rounds share: accuracy beside other cohorts.

    python -m bench shared_noise            # runs that have no result yet, two hours; resumes

Two sets of clients (`STUDIES`), δ = 1e-4. Every method has the same trials of clip norm and
learning rate, each judged by the validation records of the trial seed; the winner's runs with other
seeds read the test records once each, after the last round.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine, pages
from bench.accuracy import SEEDS, TRIAL_SEED, Options, Results, Run
from bench.accuracy_report import margin, shown, signed, table
from bench.accuracy_runs import records

PAGE = machine.ROOT / "docs" / "correlated.md"
_FIXED = {"privacy.cohort_sampling": "fixed"}
METHODS: dict[str, Options] = {
    "fixed cohorts, independent": _FIXED | {"privacy.correlation": "none"},
    "secret cohorts (Poisson)": {
        "privacy.cohort_sampling": "poisson",
        "privacy.correlation": "none",
    },
    "fixed cohorts, 2 bands": _FIXED | {"privacy.correlation": "banded", "privacy.bands": 2},
    "fixed cohorts, 4 bands": _FIXED | {"privacy.correlation": "banded", "privacy.bands": 4},
}
WITHOUT = "without privacy"
_LR, _CLIP = "model.server_optimizer.init_args.lr", "privacy.clip_norm"


@dataclass(frozen=True)
class Study:
    """One data set of clients, and what every method tries on it.

    Args:
        name: of the runs in their file.
        part: name of the page's table.
        config: configuration file; clients, rounds and δ.
        pairs: tried at each ε: clip norms, and learning rates times them, which is how far a round
            moves the model.
        rates: learning rates without privacy.
    """

    name: str
    part: str
    config: str
    pairs: Mapping[float, Sequence[tuple[float, float]]]
    rates: tuple[float, ...]

    @property
    def results(self) -> Path:
        """File of its runs."""
        return machine.ROOT / "bench" / "results" / f"accuracy_{self.name}.json"


_CLIP_NORMS = (0.05, 0.1)
_STEPS = {1.0: (0.03, 0.1, 0.3), 3.0: (0.08, 0.2, 0.4), 8.0: (0.15, 0.4, 1.0)}
# Tried last, by all: of the first three the smallest was best for independent noise.
_SMALLER = {1.0: (0.01,), 3.0: (0.03,), 8.0: (0.06,)}
FASHION = Study(
    "shared_noise",
    "accuracy",
    "configs/best/fashion_mnist_clients.yaml",
    {
        e: [p for s in (_STEPS, _SMALLER) for p in itertools.product(_CLIP_NORMS, s[e])]
        for e in _STEPS
    },
    (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0),
)
_STEPS_97 = {
    1.0: (0.05, 0.12, 0.3),
    3.0: (0.1, 0.25, 0.6),
    8.0: (0.1, 0.25, 0.6),
    0.3: (0.02, 0.05, 0.12),
}
CHEM97 = Study(
    "shared_noise_chem97",
    "natural accuracy",
    "configs/best/chem97_schools.yaml",
    {e: [(0.1, step) for step in steps] for e, steps in _STEPS_97.items()},
    (0.3, 1.0, 3.0),
)
STUDIES = (FASHION, CHEM97)


def trials(study: Study, method: str, epsilon: float | None) -> list[Options]:
    """What each method tries: clip norms and learning rates."""
    if epsilon is None:
        plain = {"privacy.setting": "none", "privacy.correlation": "none"}
        return [plain | {_LR: lr} for lr in study.rates]
    return [METHODS[method] | {_CLIP: c, _LR: round(s / c, 4)} for c, s in study.pairs[epsilon]]


def run_all() -> None:
    """Run what is missing, then write the page's tables."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    load = records()
    for study in STUDIES:
        results = Results(study.results)
        for epsilon, case in [(None, WITHOUT), *itertools.product(study.pairs, METHODS)]:
            tuned(study, case, epsilon, results, load)
    report()


def tuned(study: Study, case: str, epsilon: float | None, results: Results, load: Any) -> None:
    """Trials of one method, judged by validation, then the seeds of the best."""

    def accuracy(seed: int, options: Options, trial: int | None = None) -> float:
        one = Run(study.name, case, epsilon, seed, (study.config,), options, trial)
        return results.do(one, load)["accuracy"]

    tried = trials(study, case, epsilon)
    found = [accuracy(TRIAL_SEED, options, i) for i, options in enumerate(tried)]
    for seed in SEEDS:
        accuracy(seed, tried[found.index(max(found))])


def scores(runs: dict[str, Any], case: str, epsilon: float | None) -> dict[int, float]:
    """Test accuracy by seed."""
    return {
        r["seed"]: r["accuracy"]
        for r in runs.values()
        if (r["case"], r["target_epsilon"], r["trial"]) == (case, epsilon, None)
    }


def accuracy_table(runs: dict[str, Any]) -> str:
    """Every method at every ε that was run, and its margin over independent noise."""
    plain = next(iter(METHODS))
    epsilons = sorted({r["target_epsilon"] for r in runs.values()} - {None})
    rows = []
    for method in METHODS:
        cells = []
        for epsilon in epsilons:
            mine = scores(runs, method, epsilon)
            cells.append(shown(mine.values()))
            if method != plain:
                cells[-1] += f" ({signed(margin(mine, scores(runs, plain, epsilon)))})"
        rows.append((method, *cells))
    rows.append((WITHOUT, *[shown(scores(runs, WITHOUT, None).values())] * len(epsilons)))
    return table(("noise and cohorts", *(f"ε = {e:g}" for e in epsilons)), rows)


def report() -> None:
    """The tables into their page; nothing where nothing was run."""
    for study in STUDIES:
        runs = Results(study.results).runs
        if runs:
            pages.put(PAGE, study.part, accuracy_table(runs))
