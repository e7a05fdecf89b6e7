"""What personal layers win where clients differ, and how much of it is the difference itself.

    python -m bench personal_layers             # ten minutes on one core; resumes

Digits, 50 clients with few classes each (Dirichlet), whole clients protected by the aggregator's
noise (`client+aggregator`) or nothing; `record+local` refuses personal layers. Four models are
judged by test records dealt to the clients as their training records are. Every model but the last
has the same trials of the server's learning rate at every ε, each judged by held-out training
records of one seed; the seeds from 1 on read the test records once each, after the last round.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

from bench import pages
from bench.accuracy import RESULTS, SEEDS, TRIAL_SEED, Options, Results, Run
from bench.accuracy_report import margin, shown, signed, table
from bench.accuracy_runs import records

PATH = RESULTS / "personal_layers.json"
ALPHAS, EPSILONS = (0.1, 1.0), (1.0, 3.0, 8.0, None)
RATES = (0.1, 0.3, 1.0, 3.0)
_LR, _HEAD = "model.server_optimizer.init_args.lr", ["fc2"]
_COMMON: Options = {
    "data.num_clients": 50,
    "data.partition": "dirichlet",
    "model.network": {
        "class_path": "fl_lightning.models.MLP",
        "init_args": {"standardize": True},
    },
    "model.sampling_rate": None,
    "model.batch_size": 16,
    "model.local_steps": 4,
    "model.client_lr": 0.1,
    "privacy.setting": "client+aggregator",
    "privacy.delta": 1e-3,
    "privacy.clip_norm": 0.5,
}
GLOBAL, AFTERWARDS = "one global model", "global model, each client fits a head afterwards"
PERSONAL, ALONE = "personal heads", "each client fits a head alone, on random features"
MODELS: dict[str, Options] = {
    GLOBAL: {},
    AFTERWARDS: {"fitted_afterwards": _HEAD},
    PERSONAL: {"model.personal_layers": _HEAD},
}
# Nothing is learned together: the body stays as it was drawn.
_NOTHING: Options = {"model.personal_layers": _HEAD, "privacy.setting": "none", _LR: 0.0}


def trials(model: str, alpha: float, epsilon: float | None) -> list[Options]:
    """What each model tries."""
    made = _COMMON | {"data.alpha": alpha} | MODELS[model]
    if epsilon is None:
        made |= {"privacy.setting": "none"}
    return [made | {_LR: lr} for lr in RATES]


def case(model: str, alpha: float) -> str:
    """Name of a model among the runs."""
    return f"Dirichlet({alpha:g}): {model}"


def run_all() -> None:
    """Run what is not in the file of results yet."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    results, load = Results(PATH), records()
    for alpha in ALPHAS:
        for epsilon, model in itertools.product(EPSILONS, MODELS):
            tuned(model, alpha, epsilon, results, load)
        made = _COMMON | {"data.alpha": alpha} | _NOTHING
        for seed in SEEDS:
            results.do(_run(ALONE, alpha, None, seed, made), load)


def tuned(model: str, alpha: float, epsilon: float | None, results: Results, load: Any) -> None:
    """Trials of one model, judged by held-out records, then the seeds of the best."""
    tried = trials(model, alpha, epsilon)
    found = [
        results.do(_run(model, alpha, epsilon, TRIAL_SEED, options, i), load)["accuracy"]
        for i, options in enumerate(tried)
    ]
    for seed in SEEDS:
        results.do(_run(model, alpha, epsilon, seed, tried[found.index(max(found))]), load)


def _run(
    model: str,
    alpha: float,
    epsilon: float | None,
    seed: int,
    options: Options,
    trial: int | None = None,
) -> Run:
    return Run("personal_layers", case(model, alpha), epsilon, seed, (), options, trial)


def scores(
    runs: dict[str, Any], model: str, alpha: float, epsilon: float | None
) -> dict[int, float]:
    """Test accuracy by seed; the heads alone are the same at every ε."""
    asked = (case(model, alpha), None if model == ALONE else epsilon, None)
    return {
        r["seed"]: r["accuracy"]
        for r in runs.values()
        if (r["case"], r["target_epsilon"], r["trial"]) == asked
    }


_COLUMNS = tuple("no privacy" if e is None else f"ε = {e:g}" for e in EPSILONS)


def accuracies(runs: dict[str, Any]) -> str:
    """Every model at every ε, mean and spread over the seeds."""
    rows = [
        (
            f"Dirichlet({alpha:g})",
            model,
            *(shown(scores(runs, model, alpha, e).values()) for e in EPSILONS),
        )
        for alpha in ALPHAS
        for model in (*MODELS, ALONE)
    ]
    return table(("clients", "model", *_COLUMNS), rows)


def margins(runs: dict[str, Any]) -> str:
    """Points, paired by seed, of personal heads over each other model, with 95 % intervals."""
    rows = []
    for alpha, other in itertools.product(ALPHAS, (GLOBAL, AFTERWARDS, ALONE)):
        pairs = [
            (scores(runs, PERSONAL, alpha, e), scores(runs, other, alpha, e)) for e in EPSILONS
        ]
        rows.append((f"Dirichlet({alpha:g})", other, *(signed(margin(*pair)) for pair in pairs)))
    return table(("clients", f"{PERSONAL} over", *_COLUMNS), rows)


TABLES = {"personal layers": accuracies, "personal layers margins": margins}


def report() -> None:
    """The tables into the page of results; nothing where nothing was run."""
    runs = Results(PATH).runs
    if runs:
        for name, make in TABLES.items():
            pages.put(pages.RESULTS, name, make(runs))
