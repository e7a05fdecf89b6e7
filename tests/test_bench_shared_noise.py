"""The accuracy of noise that rounds share: methods that differ in nothing else, tuned alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import accuracy, pages, shared_noise
from bench.accuracy_runs import build, compose, records
from fl_lightning import from_arrays

STUDIES = [pytest.param(study, id=study.name) for study in shared_noise.STUDIES]
METHODS = [*shared_noise.METHODS, shared_noise.WITHOUT]
# Clients, clients a round and rounds; records and classes.
SHAPES = {"shared_noise": (1000, 50, 200, 256, 10), "shared_noise_chem97": (2000, 100, 60, 4, 6)}


def arrays(width: int, classes: int):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6000, width, generator=generator)
    y, owner = torch.arange(6000) % classes, torch.arange(6000) // 3
    return from_arrays(x, y, num_classes=classes, client=owner)


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_a_run_of_the_configuration(study, method: str, tmp_path: Path) -> None:
    epsilon = None if method == shared_noise.WITHOUT else 3.0
    tried = shared_noise.trials(study, method, epsilon)
    assert len({str(t) for t in tried}) == len(tried) >= 3
    options = tried[0] | ({} if epsilon is None else {"privacy.epsilon": epsilon})
    *sizes, width, classes = SHAPES[study.name]
    # Every client keeps its three records: nothing is held out.
    config = compose((study.config,), options | {"data.val_fraction": 0.0})
    module, data, trainer = build(config, arrays(width, classes), 1, str(tmp_path))
    privacy = module.privacy
    assert [data.num_clients, module.rules.clients_per_round, trainer.max_epochs] == sizes
    assert module.network(torch.zeros(2, width)).shape == (2, classes)
    assert data.partition.sizes.min() >= 2
    if epsilon is not None:
        assert (privacy.epsilon, privacy.delta, privacy.guarantee) == (3.0, 1e-4, True)
        assert privacy.correlated == ("bands" in method)
        assert privacy.poisson_cohort == ("Poisson" in method)


@pytest.mark.parametrize("study", STUDIES)
def test_all_methods_try_the_same_at_the_same_epsilon(study) -> None:
    assert {1.0, 3.0, 8.0} <= set(study.pairs)
    for epsilon in study.pairs:
        tried = [
            [(t[shared_noise._CLIP], t[shared_noise._LR]) for t in trials]
            for trials in (shared_noise.trials(study, m, epsilon) for m in shared_noise.METHODS)
        ]
        assert all(t == tried[0] for t in tried)


def test_records_are_loaded_by_the_arguments_of_their_source(tmp_path: Path) -> None:
    load = records()
    for name, label in (("a", 0), ("b", 1)):
        path = tmp_path / f"{name}.csv"
        path.write_text(f"x,y\n1,{label}\n2,1\n")
        found = load({"data": {"source": "csv", "source_args": {"path": str(path), "label": "y"}}})
        assert (found.name, found.y_train.tolist()) == (name, [label, 1])


def test_the_best_trial_by_validation_is_run_with_all_seeds(tmp_path: Path, monkeypatch) -> None:
    def by_rate(config, seed, *, test, arrays):
        rate = config["model"]["server_optimizer"]["init_args"]["lr"]
        assert test == (seed != accuracy.TRIAL_SEED)
        return {"accuracy": 100 - abs(rate - 4.0), "seconds": 0.0}

    study = shared_noise.FASHION

    monkeypatch.setattr(accuracy, "run", by_rate)
    results = accuracy.Results(tmp_path / "found.json")
    for case, epsilon in ((shared_noise.WITHOUT, None), ("fixed cohorts, 2 bands", 3.0)):
        shared_noise.tuned(study, case, epsilon, results, lambda config: None)
        kept = shared_noise.scores(results.runs, case, epsilon)
        assert kept == dict.fromkeys(accuracy.SEEDS, 100.0)
    text = shared_noise.accuracy_table(results.runs)
    assert text.count("100.0 ± 0.0") == 2


@pytest.mark.parametrize("study", STUDIES)
def test_the_page_shows_the_committed_runs(study) -> None:
    runs = accuracy.Results(study.results).runs
    assert runs
    assert pages.written(shared_noise.PAGE, study.part) == shared_noise.accuracy_table(runs)
