"""Real sets whose records have owners: tests of 50 clinics, tweets of 16 accounts, under privacy.

    python scripts/fetch_data.py covid_testing; python scripts/fetch_data.py health_tweets
    python scripts/fetch_data.py minilm
    python -m bench natural         # twenty minutes on one core; resumes

`record+local`, δ = 1e-5. Every case has the same number of trials at every ε, each judged by
held-out training records of one seed; the seeds from 1 on read the test records once each, after
the last round.
"""

from __future__ import annotations

import itertools
import logging
import statistics
from dataclasses import dataclass, field
from typing import Any

from bench import pages
from bench.accuracy import EPSILONS, RESULTS, SEEDS, TRIAL_SEED, Options, Results, Run
from bench.accuracy_report import shown, table
from bench.accuracy_runs import records

PATH = RESULTS / "accuracy_natural.json"
_LR, _CLIP = "model.server_optimizer.init_args.lr", "privacy.clip_norm"
_SCALE = "model.network.init_args.scale"


@dataclass(frozen=True)
class Case:
    """A set, who holds what, and what is tried at every ε.

    Attributes:
        config: configuration file.
        figure: what judges a trial and stands in the table first: accuracy, or a metric's name.
        second: what stands in brackets.
        steps: learning rates times clip norms, which is how far a round moves the model.
        clips: clip norms.
        rates: learning rates without privacy.
        options: what is changed in the configuration.
        starts: further options that are tried with each step.
    """

    config: str
    figure: str
    second: str
    steps: tuple[float, ...]
    clips: tuple[float, ...]
    rates: tuple[float, ...]
    options: Options = field(default_factory=dict)
    starts: tuple[Options, ...] = ({},)

    def trials(self, epsilon: float | None) -> list[Options]:
        """What is tried; without privacy nothing is clipped."""
        if epsilon is None:
            none = self.options | {"privacy.setting": "none"}
            return [none | start | {_LR: lr} for start in self.starts for lr in self.rates]
        return [
            self.options | start | {_CLIP: clip, _LR: round(step / clip, 4)}
            for start, clip, step in itertools.product(self.starts, self.clips, self.steps)
        ]


_TWEETS = {
    "config": "configs/best/health_tweets.yaml",
    "figure": "accuracy",
    "second": "MulticlassRecall",
    "steps": (30.0, 100.0, 300.0),
    "clips": (0.1,),
    "rates": (100.0, 300.0, 1000.0),
    "starts": ({_SCALE: 0.0}, {_SCALE: 20.0}),
}
_IID: Options = {"data.partition": "iid", "data.num_clients": 10}
CASES = {
    "covid_testing, 50 clinics": Case(
        "configs/best/covid_testing.yaml", "MulticlassAUROC", "accuracy",
        (1.0, 3.0, 10.0), (0.3, 1.0), (0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
    ),
    "health tweets, 16 accounts": Case(**_TWEETS),
    "health tweets, 10 clients alike": Case(**_TWEETS, options=_IID),
}  # fmt: skip


def run_all() -> None:
    """Run what is not in the file of results yet."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    results, load = Results(PATH), records()
    for name in CASES:
        for epsilon in (*EPSILONS, None):
            tuned(name, epsilon, results, load)


def tuned(name: str, epsilon: float | None, results: Results, load: Any) -> None:
    """Trials of one case at one ε, judged by held-out records, then the seeds of the best."""
    case = CASES[name]

    def figure(seed: int, options: Options, trial: int | None = None) -> float:
        one = Run("natural", name, epsilon, seed, (case.config,), options, trial)
        return of(results.do(one, load), case.figure)

    trials = case.trials(epsilon)
    found = [figure(TRIAL_SEED, options, i) for i, options in enumerate(trials)]
    for seed in SEEDS:
        figure(seed, trials[found.index(max(found))])


def of(run: dict[str, Any], figure: str) -> float:
    """A figure of a run, in percent."""
    return run["accuracy"] if figure == "accuracy" else 100 * run["figures"][figure]


def report() -> None:
    """The table into the page of results; nothing where nothing was run."""
    runs = Results(PATH).runs
    if runs:
        pages.put(pages.RESULTS, "natural", natural_table(runs))


_CALLED = {
    "accuracy": "accuracy",
    "MulticlassAUROC": "AUROC",
    "MulticlassRecall": "mean recall of classes",
}


def natural_table(runs: dict[str, Any]) -> str:
    """Cases at every ε: a figure in percent over the seeds, and in brackets the other's mean."""
    rows = []
    for name, case in CASES.items():
        what = f"{_CALLED[case.figure]} ({_CALLED[case.second]})"
        cells = [_cell(runs, name, case, e) for e in (1.0, 3.0, 8.0, None)]
        rows.append((name, what, *cells))
    head = ("set and clients", "figure, %", "ε = 1", "ε = 3", "ε = 8", "no privacy")
    return table(head, rows)


def _cell(runs: dict[str, Any], name: str, case: Case, epsilon: float | None) -> str:
    what = (name, epsilon, None)
    found = [r for r in runs.values() if (r["case"], r["target_epsilon"], r["trial"]) == what]
    if len(found) < len(SEEDS):
        return "–"
    first, second = ([of(r, figure) for r in found] for figure in (case.figure, case.second))
    return f"{shown(first)} ({statistics.mean(second):.1f})"
