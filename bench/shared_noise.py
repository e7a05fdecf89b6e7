"""Whole clients of Fashion-MNIST under noise that rounds share: accuracy beside other cohorts.

    python -m bench shared_noise            # runs that have no result yet, an hour or two; resumes

1,000 clients of 54 records, 50 a round, 200 rounds, δ = 1e-4. Every method has the same trials of
clip norm and learning rate, each judged by the validation records of the trial seed; the winner's
runs with other seeds read the test records once each, after the last round.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

from bench import machine, pages
from bench.accuracy import SEEDS, TRIAL_SEED, Options, Results, Run
from bench.accuracy_report import margin, shown, signed, table
from bench.accuracy_runs import records

RESULTS = machine.ROOT / "bench" / "results" / "accuracy_shared_noise.json"
PAGE = machine.ROOT / "docs" / "correlated.md"
FILES = ("configs/best/fashion_mnist_clients.yaml",)
EPSILONS = (1.0, 3.0, 8.0)
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
CLIP_NORMS = (0.05, 0.1)
# Learning rate times clip norm is how far a round moves the model.
STEPS = {1.0: (0.03, 0.1, 0.3), 3.0: (0.08, 0.2, 0.4), 8.0: (0.15, 0.4, 1.0)}
# Tried last, by all: of the first three the smallest was best for independent noise.
SMALLER = {1.0: (0.01,), 3.0: (0.03,), 8.0: (0.06,)}
RATES_WITHOUT = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


def trials(method: str, epsilon: float | None) -> list[Options]:
    """What each method tries: clip norms and learning rates, eight of them."""
    if epsilon is None:
        plain = {"privacy.setting": "none", "privacy.correlation": "none"}
        return [plain | {_LR: lr} for lr in RATES_WITHOUT]
    pairs = [p for steps in (STEPS, SMALLER) for p in itertools.product(CLIP_NORMS, steps[epsilon])]
    return [METHODS[method] | {_CLIP: c, _LR: round(step / c, 4)} for c, step in pairs]


def run_all() -> None:
    """Run what is missing, then write the page's table."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    results, load = Results(RESULTS), records()
    cases = [(WITHOUT, None), *itertools.product(METHODS, EPSILONS)]
    for case, epsilon in cases:
        tuned(case, epsilon, results, load)
    report()


def tuned(case: str, epsilon: float | None, results: Results, load: Any) -> None:
    """Trials of one method, judged by validation, then the seeds of the best."""

    def accuracy(seed: int, options: Options, trial: int | None = None) -> float:
        one = Run("shared_noise", case, epsilon, seed, FILES, options, trial)
        return results.do(one, load)["accuracy"]

    tried = trials(case, epsilon)
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
    """Every method at every ε, and its margin over independent noise."""
    plain = next(iter(METHODS))
    rows = []
    for method in METHODS:
        cells = []
        for epsilon in EPSILONS:
            mine = scores(runs, method, epsilon)
            cells.append(shown(mine.values()))
            if method != plain:
                cells[-1] += f" ({signed(margin(mine, scores(runs, plain, epsilon)))})"
        rows.append((method, *cells))
    rows.append((WITHOUT, *[shown(scores(runs, WITHOUT, None).values())] * len(EPSILONS)))
    return table(("noise and cohorts", *(f"ε = {e:g}" for e in EPSILONS)), rows)


def report() -> None:
    """The table into its page; nothing where nothing was run."""
    runs = Results(RESULTS).runs
    if runs:
        pages.put(PAGE, "accuracy", accuracy_table(runs))
