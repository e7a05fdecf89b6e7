"""What a charged choice of hyper-parameters costs: random search on digits, three ways.

    python -m bench tuning            # runs that have no result yet; resumes

The space is configs/searches/digits.yaml. In each repeat a number of trials and their options are
drawn as `python -m fl_lightning.tune` draws them, and tried twice: at the part of ε that a charged
search leaves to a trial, judged by the private score, and at the whole ε, judged by the exact
validation accuracy, which nothing is charged for. Of each the chosen model's test accuracy counts.
Beside them stand the defaults of configs/base.yaml at the whole ε.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import tempfile
import time
import warnings
from typing import Any

import numpy as np
import torch
import yaml

from bench import machine, pages
from bench.accuracy_report import margin, shown, signed, table
from bench.accuracy_runs import _share_right, build, compose, records
from fl_lightning.accounting.repeat_and_select import TrialNumber, candidate_budget
from fl_lightning.tune.space import Space

RESULTS = machine.ROOT / "bench" / "results" / "tuning.json"
PAGE = machine.ROOT / "docs" / "tuning.md"
SPACE = machine.ROOT / "configs" / "searches" / "digits.yaml"
REPEATS = 10
LAST_ROUND = 10**9  # rounds between evaluations: the last round alone


def one_run(options: dict[str, Any], seed: int, load: Any) -> dict[str, Any]:
    """Train once; private, validation and test accuracy, of which a search may see its own."""
    gc.collect()
    start = time.process_time()
    config = compose([], options)
    with tempfile.TemporaryDirectory() as folder:
        module, data, trainer = build(config, load(config), seed, folder)
        data.seed = 1  # who holds which record is the same in all trials
        trainer.fit(module, datamodule=data)
        found = {
            "private": None if module.evaluated is None else 100 * module.evaluated.accuracy,
            "noise": None if module.evaluated is None else 100 * module.evaluated.standard_error,
            "validation": 100 * _share_right(module.network, data.val_dataloader()),
            "test": 100 * _share_right(module.network, data.test_dataloader()),
            "epsilon": round(float(module.run.epsilon_spent().max()), 4),
            "cpu_seconds": round(time.process_time() - start, 2),
        }
    return found


def run_all() -> None:
    """Every run that is not in the file yet; the file is written whole after each."""
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(1)
    described = yaml.safe_load(SPACE.read_text())
    space, number = Space(described["space"]), TrialNumber(**described["trials"])
    total = {"epsilon": described["epsilon"], "delta": described["delta"]}
    part = candidate_budget(number, **total)
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
    charged = {"privacy.epsilon": part.epsilon, "privacy.delta": part.delta}
    whole = {f"privacy.{name}": value for name, value in total.items()}
    load = records()
    for repeat in range(REPEATS):
        generator = np.random.default_rng([repeat, 18])
        trials = [space.draw(generator) for _ in range(number.draw(generator.random()))]
        jobs = {f"{repeat} | defaults": (whole, repeat)}
        for i, options in enumerate(trials):
            seed = 1000 * (repeat + 1) + i
            jobs[f"{repeat} | charged | {i}"] = (options | charged, seed)
            jobs[f"{repeat} | uncharged | {i}"] = (options | whole, seed)
        for key, (options, seed) in jobs.items():
            if key in runs:
                continue
            options = options | {"privacy.evaluate_every": LAST_ROUND}
            runs[key] = one_run(options, seed, load) | {"options": options, "seed": seed}
            facts = {"trials": described["trials"], "loss": part.loss, **total}
            facts |= {"candidate_epsilon": part.epsilon, "candidate_delta": part.delta}
            _write({"facts": facts, "load": os.getloadavg()[0], "runs": runs})
            print(key, runs[key]["test"], runs[key]["cpu_seconds"], flush=True)


def _write(found: dict[str, Any]) -> None:
    partial = RESULTS.with_suffix(".part")
    partial.write_text(json.dumps(found, indent=0) + "\n")
    os.replace(partial, RESULTS)


def chosen(runs: dict[str, Any], repeat: int, way: str) -> dict[str, Any]:
    """The run that a way of choosing ends with in a repeat."""
    if way == "defaults":
        return runs[f"{repeat} | defaults"]
    mine = [r for key, r in runs.items() if key.startswith(f"{repeat} | {way} | ")]
    score = {"charged": "private", "uncharged": "validation"}[way]
    return max(mine, key=lambda r: r[score])


def accuracies(runs: dict[str, Any], way: str, whole: list[int]) -> dict[int, float]:
    """Test accuracy of what a way chose, by repeat."""
    return {repeat: chosen(runs, repeat, way)["test"] for repeat in whole}


WAYS = {
    "charged": "search, charged: ε = 8 for all of it",
    "uncharged": "search, uncharged: ε = 8 for each run",
    "defaults": "fixed defaults, ε = 8",
}


def repeats(runs: dict[str, Any]) -> list[int]:
    """Repeats that are whole."""
    drawn = yaml.safe_load(SPACE.read_text())
    number, found = TrialNumber(**drawn["trials"]), []
    for repeat in range(REPEATS):
        count = number.draw(np.random.default_rng([repeat, 18]).random())
        mine = [key for key in runs if key.startswith(f"{repeat} | ")]
        found += [repeat] if len(mine) == 2 * count + 1 else []
    return found


def tuning_table(runs: dict[str, Any]) -> str:
    """Test accuracy of each way, and by how much it differs from the charged search."""
    whole = repeats(runs)
    values = {way: accuracies(runs, way, whole) for way in WAYS}
    rows = [
        (
            name,
            shown(values[way].values()),
            "" if way == "charged" else signed(margin(values[way], values["charged"])),
        )
        for way, name in WAYS.items()
    ]
    trials = [sum(k.startswith(f"{r} | charged") for k in runs) for r in whole]
    seconds = sum(run["cpu_seconds"] for run in runs.values())
    text = table(("way", "test accuracy", "more than the charged search"), rows)
    return (
        f"{text}\n\nRuns of a search: {', '.join(map(str, trials))}. {len(runs)} runs took "
        f"{seconds / 60:.0f} minutes of CPU time."
    )


def report() -> None:
    """The table into its page; nothing where nothing was run."""
    if RESULTS.exists():
        runs = json.loads(RESULTS.read_text())["runs"]
        pages.put(PAGE, "tuning", tuning_table(runs))
