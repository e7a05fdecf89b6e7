"""Fine-tuning under privacy: topics of Reuters' news (R8) by MiniLM and a head, ten clients.

    python scripts/fetch_data.py reuters_r8; python scripts/fetch_data.py minilm
    python -m bench pretrained

The encoder stays as it is, so that its features are computed once; the head starts at the words
for its classes, or at zeros. Either start is tuned alike at every ε, on the validation records of
one seed; the seeds from 1 on read the test records once each, after the last round.
"""

from __future__ import annotations

import statistics
from typing import Any

from bench import pages
from bench.accuracy import EPSILONS, RESULTS, SEEDS, TRIAL_SEED, Options, Results, Run
from bench.accuracy_runs import records
from bench.machine import ROOT

STUDY = "pretrained"
PATH = RESULTS / "accuracy_pretrained.json"
PAGE = ROOT / "docs" / "pretrained.md"
FILES = ("configs/best/reuters_r8.yaml",)
_LR = "model.server_optimizer.init_args.lr"
_CLIP = "privacy.clip_norm"
_SCALE = "model.network.init_args.scale"
# A step is the learning rate times the clip norm; as many trials for either start.
_STEPS = (10.0, 30.0, 100.0)
SCALES = {"starts at the words": (20.0, 40.0), "starts at zeros": (0.0,)}
_CLIPS = {"starts at the words": (0.1,), "starts at zeros": (0.1, 0.3)}
_RATES = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


def trials_of(start: str, private: bool) -> list[Options]:
    """Six trials of a start; without privacy nothing is clipped."""
    if not private:
        return [{_SCALE: SCALES[start][0], _LR: rate} for rate in _RATES]
    return [
        {_SCALE: scale, _CLIP: clip, _LR: round(step / clip, 4)}
        for scale in SCALES[start]
        for clip in _CLIPS[start]
        for step in _STEPS
    ]


def run_all() -> None:
    """Run what is not in the file of results yet."""
    results, load = Results(PATH), records()
    for start in SCALES:
        for epsilon in (*EPSILONS, None):
            _tuned(start, epsilon, results, load)


def _tuned(start: str, epsilon: float | None, results: Results, load: Any) -> None:
    none = {"privacy.setting": "none"} if epsilon is None else {}

    def done(seed: int, options: Options, trial: int | None = None) -> float:
        one = Run(STUDY, start, epsilon, seed, FILES, none | options, trial)
        return results.do(one, load)["accuracy"]

    trials = trials_of(start, epsilon is not None)
    found = [done(TRIAL_SEED, options, i) for i, options in enumerate(trials)]
    for seed in SEEDS:
        done(seed, trials[found.index(max(found))])


def report() -> None:
    """The table into its page; nothing where nothing was run."""
    runs = Results(PATH).runs
    if runs:
        pages.put(PAGE, "accuracy", table(runs))


def table(runs: dict[str, Any]) -> str:
    """Accuracy in percent, mean and standard deviation over seeds, and macro recall."""
    lines = ["| head | ε = 1 | ε = 3 | ε = 8 | no privacy |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows(runs))])


def rows(runs: dict[str, Any]) -> list[list[str]]:
    """Rows of the table: a start and its figures at every ε, mean and spread over seeds."""
    table = []
    for start in SCALES:
        cells = []
        for epsilon in (1.0, 3.0, 8.0, None):
            found = [
                r
                for r in runs.values()
                if (r["case"], r["target_epsilon"]) == (start, epsilon) and r["trial"] is None
            ]
            cells.append(_cell(found))
        table.append([start, *cells])
    return table


def _cell(found: list[dict[str, Any]]) -> str:
    if len(found) < len(SEEDS):
        return "-"
    accuracies = [r["accuracy"] for r in found]
    recall = statistics.mean(r["figures"]["MulticlassRecall"] for r in found)
    return f"{statistics.mean(accuracies):.1f} ± {statistics.stdev(accuracies):.1f} ({recall:.2f})"
